"""Classifiers with a closed form, the peers of replay: one pass over the features of a stream, and no forgetting.

Streaming linear discriminant analysis (Hayes & Kanan 2020) keeps class means and one covariance; ridge regression on
one-hot labels keeps two matrices of sums. Given the features both are the same for any order of the inputs.

Shape legend: n inputs, D features, C classes.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal, get_args

import numpy as np
import torch
from safetensors.torch import save as to_bytes

from cost.arguments import one_line
from cost.files import alone, read_arrays, sealed, write_bytes
from experts.continual import checkpoint
from experts.continual.inputs import Encoding
from experts.continual.learner import StreamLearner
from experts.continual.network import ContinualNetwork, of_weights
from experts.continual.result import Curves, Result, as_content
from experts.continual.strategy import NetworkShape, Strategy
from experts.continual.stream import Stream, components
from experts.data import DataError
from experts.threads import reproducible

CHUNK = 2048  # inputs at once
LEAST, LEAST_DEVIATION = 1e-9, 1e-6  # variance, and standard deviation of inputs
FILE = "closed-form.safetensors"
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
        shape: NetworkShape | None = None, folder: str | Path | None = None,
    ) -> Result:  # fmt: skip
        """Learn a stream; `strategy` and `shape` are those of the network whose trunk is used, on images of this
        `side` and `bits`. The classifier is written to `folder`, for `experts.continual.predictor`."""
        if split not in ("validation", "test"):
            raise ValueError(f"split={split!r} is not one of validation, test")
        shape = shape or NetworkShape()
        with reproducible(seed):
            result, classifier = self._run(stream, seed, split, strategy or Strategy(), shape)
        if folder is not None:
            with alone(Path(folder), DataError):
                if (Path(folder) / checkpoint.FILE).exists():
                    raise DataError(f"{folder} holds the run of a network: name another folder")
                classifier.save(Path(folder) / FILE, self, shape)
        return result

    def _run(
        self, stream: Stream, seed: int, split: str, strategy: Strategy, shape: NetworkShape
    ) -> tuple[Result, _Classifier]:
        began = time.perf_counter()
        extractor = _fitted(self, stream, seed, strategy, shape)
        sums, curves = _Sums(extractor.width, stream.num_classes), Curves()
        for number, task in enumerate(stream.tasks):
            inputs, labels = task["train"]
            for start in range(0, len(labels), CHUNK):
                sums.add(extractor(inputs[start : start + CHUNK]), labels[start : start + CHUNK])
            solved = sums.slda(self.shrinkage) if self.kind == "slda" else sums.ridge(self.shrinkage)
            classifier = _Classifier(extractor, *solved)
            seconds = time.perf_counter() - began
            accuracy = np.full(len(stream.tasks), np.nan)
            for other in range(number + 1):
                x, y = stream.tasks[other][split]
                scores = classifier(x)
                if stream.scenario == "task":
                    masked = np.full(stream.num_classes, -np.inf)
                    masked[list(stream.tasks[other].classes)] = 0
                    scores = scores + masked
                accuracy[other] = float((scores.argmax(1) == y).mean())
            parameters = extractor.parameters + sum(each.size for each in solved)
            curves.append(
                accuracy=accuracy.tolist(), expert_load=[[1.0]] * (number + 1), parameters=parameters,
                bytes_after=extractor.nbytes + sums.nbytes, experts=1, seconds=seconds,
            )  # fmt: skip
            began = time.perf_counter()
        return curves.result(stream, seed, split, False), classifier


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


@dataclass(frozen=True)
class _Extractor:
    """Inputs `[n, ...]` to features `[n, D]`, fixed after the first task."""

    kind: Features
    encoding: Encoding
    matrix: np.ndarray
    shift: np.ndarray
    network: ContinualNetwork | None

    @property
    def width(self) -> int:
        """Number of features."""
        if self.network is not None:
            return self.network.shape.d_model
        return int(self.matrix.shape[1]) if self.matrix.size else int(np.prod(self.encoding.decoded))

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


def _fitted(
    settings: ClosedForm, stream: Stream, seed: int, strategy: Strategy, shape: NetworkShape
) -> _Extractor:  # fmt: skip
    """The features of the first task of a stream."""
    encoding = Encoding(stream.shape, settings.side, settings.bits)
    plain = _Extractor("pixels", encoding, np.zeros((0, 0), np.float32), np.zeros(0, np.float32), None)
    if settings.features == "trunk":
        only = Stream("first task", "domain", stream.tasks[:1])
        small = replace(strategy, side=settings.side, bits=settings.bits)
        learner = StreamLearner(only, small, seed, shape, "validation")
        learner.run(lambda share, text: None, lambda: None, 10**9)
        return replace(plain, kind="trunk", network=learner.network)
    first, random = plain(stream.tasks[0]["train"][0]).astype(np.float32), np.random.default_rng(seed)
    if settings.features == "pca":
        shift, matrix = components(first, settings.size)
        return replace(plain, kind="pca", shift=shift, matrix=matrix)
    if settings.features == "random":
        deviation = max(float(first.std()), LEAST_DEVIATION)
        drawn = random.standard_normal((first.shape[1], settings.size)) / (deviation * first.shape[1] ** 0.5)
        shift = random.uniform(-1, 1, settings.size).astype(np.float32)
        return replace(plain, kind="random", matrix=drawn.astype(np.float32), shift=shift)
    return plain


@dataclass(frozen=True)
class _Classifier:
    """Inputs `[n, ...]` to scores `[n, C]`; minus infinity for classes that were not seen."""

    extractor: _Extractor
    weights_DC: np.ndarray
    bias_C: np.ndarray

    def __call__(self, inputs: np.ndarray) -> np.ndarray:
        return np.asarray(self.extractor(inputs) @ self.weights_DC + self.bias_C)

    def save(self, path: Path, settings: ClosedForm, shape: NetworkShape) -> None:
        """Write it, sealed."""
        of = self.extractor
        arrays = {name: torch.from_numpy(each) for name, each in (
            ("weights", self.weights_DC), ("bias", self.bias_C), ("matrix", of.matrix), ("shift", of.shift),
        )}  # fmt: skip
        if of.network is not None:
            arrays |= {f"network/{name}": each for name, each in of.network.state_dict().items()}
        arrays = {name: each.detach().contiguous().clone() for name, each in arrays.items()}
        said = {"form": asdict(settings), "inputs": of.encoding.shape, "shape": as_content(shape)}
        write_bytes(path, to_bytes(arrays, sealed(arrays, json.dumps(said))))


def predictor(path: Path) -> Callable[[np.ndarray], np.ndarray]:
    """A saved classifier: inputs `[n, ...]` as the stream has them to scores `[n, C]`; raises `DataError` for a file
    that is damaged."""
    metadata, read = read_arrays(path, DataError, "learn the stream again")
    try:
        said = json.loads(metadata["settings"])
        settings = ClosedForm(**said["form"])
        encoding = Encoding(tuple(said["inputs"]), settings.side, settings.bits)
        network = None
        if settings.features == "trunk":
            shape = NetworkShape(**said["shape"] | {"channels": tuple(said["shape"]["channels"])})
            weights = {name[8:]: torch.from_numpy(each.copy()) for name, each in read.items() if name[:8] == "network/"}
            network = of_weights(encoding.decoded, shape, weights)
        extractor = _Extractor(settings.features, encoding, read["matrix"], read["shift"], network)
        if read["weights"].shape != (extractor.width, *read["bias"].shape):
            raise ValueError(f"weights {read['weights'].shape} do not fit {extractor.width} features")
    except (KeyError, ValueError, TypeError, RuntimeError, IndexError, AttributeError) as error:
        raise DataError(f"{path} gives no predictor: {one_line(error)}") from error
    return _Classifier(extractor, read["weights"], read["bias"])
