"""Classifiers with a closed form, the peers of replay: one pass over the features of a stream, and no forgetting.

Streaming linear discriminant analysis (Hayes & Kanan 2020) keeps class means and one covariance; ridge regression on
one-hot labels keeps two matrices of sums. Given the features both are the same for any order of the inputs.

Shape legend: n inputs, D features, C classes.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from typing import Literal, get_args

import numpy as np
import torch

from experts.continual.inputs import Encoding
from experts.continual.learner import StreamLearner
from experts.continual.network import ContinualNetwork
from experts.continual.result import Curves, Result
from experts.continual.strategy import NetworkShape, Strategy
from experts.continual.stream import Stream, components
from experts.threads import reproducible

CHUNK = 2048  # inputs at once
LEAST = 1e-9  # variance
Features = Literal["pixels", "pca", "random", "trunk"]


@dataclass(frozen=True)
class ClosedForm:
    """`kind` "slda" or "ridge" on `features`: the pixels; `size` principal components of the first task; `size` random
    rectified features of the pixels (Rahimi & Recht 2008); or those of a network's trunk, trained on the first task
    and not changed afterwards. `shrinkage` is the share of the identity in the covariance, or the ridge's weight
    relative to the mean of the diagonal. `side` and `bits` make small images, as in `Strategy`."""

    kind: Literal["slda", "ridge"] = "slda"
    features: Features = "trunk"
    size: int = 64
    shrinkage: float = 1e-2
    side: int | None = None
    bits: Literal[1, 2, 4, 8] = 8

    def __post_init__(self) -> None:
        if self.kind not in ("slda", "ridge") or self.features not in get_args(Features):
            raise ValueError(
                f"kind={self.kind!r}, features={self.features!r}: kinds are slda, ridge; features "
                f"{', '.join(get_args(Features))}"
            )
        if self.size < 1 or not 0 < self.shrinkage < 1e6:
            raise ValueError(f"size={self.size}, shrinkage={self.shrinkage}: must be above 0")

    def run(
        self, stream: Stream, seed: int = 0, *, split: str = "test", strategy: Strategy | None = None,
        shape: NetworkShape | None = None,
    ) -> Result:  # fmt: skip
        """Learn a stream; `strategy` and `shape` are those of the network whose trunk is used, on images of this
        `side` and `bits`."""
        if split not in ("validation", "test"):
            raise ValueError(f"split={split!r} is not one of validation, test")
        with reproducible(seed):
            return self._run(stream, seed, split, strategy or Strategy(), shape or NetworkShape())

    def _run(self, stream: Stream, seed: int, split: str, strategy: Strategy, shape: NetworkShape) -> Result:
        began = time.perf_counter()
        extractor = _Extractor(self, stream, seed, strategy, shape)
        sums, curves = _Sums(extractor.width, stream.num_classes), Curves()
        for number, task in enumerate(stream.tasks):
            inputs, labels = task["train"]
            for start in range(0, len(labels), CHUNK):
                sums.add(extractor(inputs[start : start + CHUNK]), labels[start : start + CHUNK])
            weights, bias = sums.slda(self.shrinkage) if self.kind == "slda" else sums.ridge(self.shrinkage)
            seconds = time.perf_counter() - began
            accuracy = np.full(len(stream.tasks), np.nan)
            for other in range(number + 1):
                x, y = stream.tasks[other][split]
                scores = extractor(x) @ weights + bias
                if stream.scenario == "task":
                    masked = np.full(stream.num_classes, -np.inf)
                    masked[list(stream.tasks[other].classes)] = 0
                    scores = scores + masked
                accuracy[other] = float((scores.argmax(1) == y).mean())
            parameters = extractor.parameters + weights.size + bias.size
            curves.append(
                accuracy=accuracy.tolist(), expert_load=[[1.0]] * (number + 1), parameters=parameters,
                bytes_after=extractor.nbytes + sums.nbytes, experts=1, seconds=seconds,
            )  # fmt: skip
            began = time.perf_counter()
        return curves.result(stream, seed, split, False)


class _Sums:
    """Sums from which both classifiers are solved, float32; they are solved in float64."""

    def __init__(self, width: int, num_classes: int) -> None:
        self.counts = np.zeros(num_classes)
        self._of_class = np.zeros((num_classes, width), np.float32)
        self._squares = np.zeros((width, width), np.float32)

    def add(self, features: np.ndarray, labels: np.ndarray) -> None:
        one_hot = np.eye(len(self.counts))[labels]
        self.counts += one_hot.sum(0)
        self._of_class += one_hot.T @ features
        self._squares += features.T @ features

    @property
    def of_class(self) -> np.ndarray:
        """Sums of the features of each class `[C, D]`."""
        return self._of_class.astype(np.float64)

    @property
    def squares(self) -> np.ndarray:
        """Sum of the features' outer products `[D, D]`."""
        return self._squares.astype(np.float64)

    def slda(self, shrinkage: float) -> tuple[np.ndarray, np.ndarray]:
        """Weights `[D, C]` and bias `[C]` of the discriminant; classes without inputs score minus infinity."""
        means = self.of_class / np.maximum(self.counts, 1)[:, None]
        within = (self.squares - (means.T * self.counts) @ means) / self.counts.sum()
        eye = np.eye(len(within)) * max(np.trace(within) / len(within), LEAST)
        weights = np.linalg.solve((1 - min(shrinkage, 1)) * within + shrinkage * eye, means.T)
        bias = -0.5 * (means.T * weights).sum(0)
        return weights, np.where(self.counts > 0, bias, -np.inf)

    def ridge(self, shrinkage: float) -> tuple[np.ndarray, np.ndarray]:
        """Weights `[D, C]` and bias `[C]` of the regression on centred features and labels."""
        total = self.counts.sum()
        mean, share = self.of_class.sum(0) / total, self.counts / total
        squares = self.squares / total - np.outer(mean, mean)
        products = self.of_class.T / total - np.outer(mean, share)
        held = shrinkage * max(np.trace(squares) / len(squares), LEAST)
        weights = np.linalg.solve(squares + held * np.eye(len(squares)), products)
        return weights, np.where(self.counts > 0, share - mean @ weights, -np.inf)

    @property
    def nbytes(self) -> int:
        """Bytes of what must be kept, one triangle of the matrix of squares."""
        width = len(self._squares)
        return 4 * (width * (width + 1) // 2 + self._of_class.size + self.counts.size)


class _Extractor:
    """Inputs `[n, ...]` to features `[n, D]`, fixed after the first task."""

    def __init__(
        self, settings: ClosedForm, stream: Stream, seed: int, strategy: Strategy, shape: NetworkShape
    ) -> None:
        self.network: ContinualNetwork | None = None
        self.matrix, self.shift = np.zeros((0, 0), np.float32), np.zeros(0, np.float32)
        self.kind, size = settings.features, settings.size
        self.encoding = Encoding(stream.shape, settings.side, settings.bits)
        first = self._flat(stream.tasks[0]["train"][0])
        self.width = first.shape[1]
        if self.kind == "pca":
            self.shift, self.matrix = components(first, size)
        elif self.kind == "random":
            random = np.random.default_rng(seed)
            deviation = max(float(first.std()), 1e-6)
            drawn = random.standard_normal((self.width, size)) / (deviation * self.width**0.5)
            self.matrix, self.shift = drawn.astype(np.float32), random.uniform(-1, 1, size).astype(np.float32)
        elif self.kind == "trunk":
            alone = Stream("first task", "domain", stream.tasks[:1])
            small = replace(strategy, side=settings.side, bits=settings.bits)
            learner = StreamLearner(alone, small, seed, shape, "validation")
            learner.run(lambda share, text: None, lambda: None, 10**9)
            self.network = learner.network
        self.width = shape.d_model if self.network is not None else (self.matrix.shape[1] or self.width)

    def __call__(self, inputs: np.ndarray) -> np.ndarray:
        if self.network is not None:
            with torch.no_grad():
                parts = np.array_split(inputs, -(-len(inputs) // CHUNK))
                found = [self.network.features(self._decoded(part)).numpy() for part in parts]
            return np.concatenate(found).astype(np.float64)
        x = self._flat(inputs)
        if self.kind == "pca":
            x = (x - self.shift) @ self.matrix
        elif self.kind == "random":
            x = np.maximum(x @ self.matrix + self.shift, 0)
        return x.astype(np.float64)

    def _decoded(self, inputs: np.ndarray) -> torch.Tensor:
        return self.encoding.decode(self.encoding.encode(inputs))

    def _flat(self, inputs: np.ndarray) -> np.ndarray:
        return self._decoded(inputs).numpy().reshape(len(inputs), -1)

    @property
    def parameters(self) -> int:
        """Numbers that turn inputs into features."""
        if self.network is not None:
            return sum(weights.numel() for weights in self.network.trunk.parameters())
        return self.matrix.size + self.shift.size

    @property
    def nbytes(self) -> int:
        """Bytes of what turns inputs into features; random ones are made anew of a seed and a deviation."""
        return 16 if self.kind == "random" else 4 * self.parameters
