"""Fast evaluation of compression plans: every matrix is decompressed once per level, and results shared with previous
plans are cached.

Shape legend: n inputs, E experts, C classes.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from experts.compression import LEVELS, compress
from experts.compression.pieces import pieces
from experts.routers import mixing_weights, top_k


class Score(NamedTuple):
    """Accuracy and mean cross-entropy in nats on the evaluator's inputs."""

    accuracy: float
    loss: float


class PlanEvaluator:
    """Scores plans of a model of `trunk` (a Sequential), `gate` and `experts` (an `ExpertStack`) on inputs `[n, d]`.

    Activations after each trunk matrix are cached by their levels, up to `cache_bytes`.
    """

    def __init__(
        self,
        model: Any,
        inputs: np.ndarray,
        labels: np.ndarray,
        importance: Mapping[str, np.ndarray] | None = None,
        top: int = 2,
        cache_bytes: int = 2**30,
    ) -> None:
        self.model, self.top = model.eval(), top
        self.inputs, self.labels = torch.from_numpy(inputs), torch.from_numpy(labels)
        self.names = list(pieces(model))
        self.weights = variants(model, importance)
        self._stages = _stages(model.trunk)
        self._cache: OrderedDict[tuple[int, ...], torch.Tensor] = OrderedDict()
        self._cache_bytes, self._held = cache_bytes, 0
        self._scores: dict[tuple[int, ...], Score] = {}
        self.evaluations = 0  # of plans that were not known yet

    def __call__(self, levels: Sequence[int]) -> Score:
        """The score of a plan, its levels in the order of `pieces`."""
        plan = tuple(int(level) for level in levels)
        if len(plan) != len(self.names) or not all(0 <= level < len(LEVELS) for level in plan):
            raise ValueError(f"{len(plan)} levels for {len(self.names)} matrices, or none of 0 to {len(LEVELS) - 1}")
        if plan not in self._scores:
            self.evaluations += 1
            self._scores[plan] = self._evaluate(plan)
        return self._scores[plan]

    @torch.inference_mode()
    def _evaluate(self, plan: tuple[int, ...]) -> Score:
        logits = self.logits(plan)
        loss = F.cross_entropy(logits, self.labels)
        return Score(float((logits.argmax(1) == self.labels).float().mean()), float(loss))

    @torch.inference_mode()
    def logits(self, plan: tuple[int, ...]) -> torch.Tensor:
        """Class logits `[n, C]` under a plan."""
        inside = len(self._stages) - 1
        h = self._trunk(plan[:inside])
        gate = F.linear(h, self.weights[inside][plan[inside]], self.model.gate.bias)
        chosen = top_k(gate, min(self.top, gate.shape[1]))
        weights, stack = mixing_weights(gate, chosen), self.model.experts
        logits = weights @ stack.bias_EC
        ends = np.cumsum(stack.widths).tolist()
        for expert, end in enumerate(ends):  # a loop over experts, each of which has many rows
            rows = chosen[:, expert].nonzero()[:, 0]
            place = inside + 1 + 2 * expert
            into, out = (self.weights[place + part][plan[place + part]] for part in (0, 1))
            hidden = F.linear(h[rows], into, stack.hidden.bias[end - stack.widths[expert] : end]).relu()
            logits.index_add_(0, rows, weights[rows, expert, None] * F.linear(hidden, out))
        return logits

    def _trunk(self, levels: tuple[int, ...]) -> torch.Tensor:
        """Output of the trunk, computed from the longest cached prefix."""
        known = next((size for size in range(len(levels), 0, -1) if levels[:size] in self._cache), 0)
        if known:
            self._cache.move_to_end(levels[:known])
            found = self._cache[levels[:known]]
        else:
            found = self._stages[0](self.inputs)
        for size in range(known + 1, len(levels) + 1):
            found = self._stages[size](found, self.weights[size - 1][levels[size - 1]])
            self._keep(levels[:size], found)
        return found

    def _keep(self, key: tuple[int, ...], found: torch.Tensor) -> None:
        self._cache[key] = found
        self._held += found.nbytes
        while self._held > self._cache_bytes and len(self._cache) > 1:
            self._held -= self._cache.popitem(last=False)[1].nbytes


@torch.inference_mode()
def accuracy(model: nn.Module, inputs: np.ndarray, labels: np.ndarray) -> float:
    """Accuracy of a classifier on inputs `[n, ...]`, in batches of 1,000."""
    found = torch.cat([model(part).argmax(1) for part in torch.from_numpy(inputs).split(1000)])
    return float((found == torch.from_numpy(labels)).float().mean())


@torch.inference_mode()
def loads(model: Any, inputs: torch.Tensor, top: int = 2) -> dict[str, float]:
    """Share of the inputs routed to each piece, 1 outside experts."""
    gate = model.gate(model.trunk(inputs))
    shares = top_k(gate, min(top, gate.shape[1])).float().mean(0).tolist()
    return {name: 1.0 if piece.expert < 0 else shares[piece.expert] for name, piece in pieces(model).items()}


def variants(model: nn.Module, importance: Mapping[str, np.ndarray] | None = None) -> list[list[torch.Tensor]]:
    """Decompressed matrices of a model at every level, `[matrices][levels]`."""
    found = []
    for name, piece in pieces(model).items():
        weights, known = piece.read(), None if importance is None else importance[name]
        found.append([torch.from_numpy(compress(weights, level, known).weights) for level in range(len(LEVELS))])
    return found


def _stages(trunk: nn.Sequential) -> list[Any]:
    """Functions of the trunk: what comes before the first matrix, then for each matrix it and what follows up to the
    next, of an input and the matrix."""
    stages: list[Any] = [[]]
    for module in trunk:
        if isinstance(module, nn.Conv2d | nn.Linear):
            stages.append([module])
        else:
            stages[-1].append(module)
    return [partial(_plain, stages[0]), *(partial(_with_matrix, each[0], each[1:]) for each in stages[1:])]


def _plain(modules: list[nn.Module], x: torch.Tensor) -> torch.Tensor:
    for module in modules:
        x = module(x)
    return x


def _with_matrix(first: nn.Module, others: list[nn.Module], x: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    if isinstance(first, nn.Conv2d):
        kernel = weights.reshape(first.weight.shape)
        x = F.conv2d(x, kernel, first.bias, first.stride, first.padding, first.dilation, first.groups)
    else:
        assert isinstance(first, nn.Linear)
        x = F.linear(x, weights, first.bias)
    for module in others:  # x is ours, so that it may be overwritten
        x = x.relu_() if isinstance(module, nn.ReLU) else _halved(x) if _halves(module, x) else module(x)
    return x


def _halves(module: nn.Module, x: torch.Tensor) -> bool:
    """Whether this is a maximum over 2 x 2 places that do not overlap and leave none out."""
    settings = ((getattr(module, name, None)) for name in ("kernel_size", "stride", "padding", "dilation"))
    return isinstance(module, nn.MaxPool2d) and tuple(settings) == (2, 2, 0, 1) and not (x.shape[2] | x.shape[3]) & 1


def _halved(x: torch.Tensor) -> torch.Tensor:
    """Same result as torch's max_pool2d, four times as fast on a CPU."""
    rows = torch.maximum(x[:, :, ::2], x[:, :, 1::2])
    return torch.maximum(rows[..., ::2], rows[..., 1::2])
