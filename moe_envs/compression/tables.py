"""Tables of MoECompression-v0: sizes, sensitivities, costs and features of the parts of each model.

Shape legend: M models, U units (parts that are given a level each), L levels, F features, n rows.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import torch

from cost.arguments import choose
from experts import data, library, profiles, reference_models
from experts.compression import KINDS, LEVELS, size_of
from experts.compression.evaluation import PlanEvaluator, loads
from experts.compression.execution import name_of, products, ways
from experts.compression.pieces import importance, pieces
from experts.compression.plan import Plan
from experts.compression.sensitivity import GRANULARITIES, Sensitivity, expand, sensitivity, unit_sizes, units
from moe_envs.core.threads import one_thread

SPLITS = ("train", "validation", "test")
QUALITIES = {"accuracy and loss": (10.0, -3.0), "accuracy": (1.0, 0.0), "loss": (0.0, -1.0)}
BATCH = 64  # inputs whose time is paid
PRICES = np.concatenate([[0.0], np.geomspace(1e-9, 1e-1, 254), [np.inf]])  # of a byte, in quality
CACHE_BYTES = 2**28


class ModelTables:
    """One model on the images of one split; a copy, or one that is unpickled, is the same object."""

    def __init__(self, name: str, split: str, granularity: str, costs: str) -> None:
        self.key = name, split, granularity, costs
        self.model: Any = library.load("model", name)
        self.recipe, recipe = reference_models.recipe_of(name)
        examples = reference_models.examples(name)
        calibration = torch.from_numpy(examples.calibration)
        parts = units(self.model, choose("granularity", granularity, GRANULARITIES))
        self.units, self.parts = list(parts), list(parts.values())
        with one_thread():
            self.importance = importance(self.model, calibration)
            self.evaluator = self._evaluator(*examples.half("train"))
            self.sensitivity: Sensitivity = sensitivity(self.evaluator, self.parts, self.importance)
            if split != "train":
                test = split == "test"
                self.evaluator = self._evaluator(*(data.load(recipe.source)["test"] if test else examples.half(split)))
            self.float32 = self.evaluator((0,) * len(self.evaluator.names))
            shares = np.array(list(loads(self.model, calibration, self.evaluator.top).values()))
        self.sizes = unit_sizes(self.model, self.parts)
        whole = Plan.of(self.model)
        self.overhead, self.bytes = whole.overhead, whole.bytes
        self.features = self._features(shares)
        self.costs = self._costs(calibration[:BATCH], costs, shares)

    def __deepcopy__(self, memo: dict[int, Any]) -> ModelTables:
        return self

    def __reduce__(self) -> Any:
        return load, self.key

    def score(self, levels: np.ndarray) -> tuple[float, float]:
        """Accuracy and loss of the units' levels `[U]`, less those of the model as it is."""
        with one_thread():
            score = self.evaluator(expand(levels.tolist(), self.parts))
        return score.accuracy - self.float32.accuracy, score.loss - self.float32.loss

    def plan(self, levels: np.ndarray) -> Plan:
        """The plan of the units' levels `[U]`."""
        return Plan.of(self.model, expand(levels.tolist(), self.parts))

    def _evaluator(self, inputs: np.ndarray, labels: np.ndarray) -> PlanEvaluator:
        return PlanEvaluator(self.model, inputs, labels, self.importance, cache_bytes=CACHE_BYTES)

    def _features(self, shares: np.ndarray) -> np.ndarray:
        """`[U, F]`, of the shares of inputs that pieces answer; see the environment's observation."""
        all_pieces = list(pieces(self.model).values())
        rows = []
        for places, size in zip(self.parts, self.sizes, strict=True):
            piece = all_pieces[places[0]]
            kind = [float(piece.kind == name) for name in KINDS]
            count = max(each.expert for each in all_pieces) + 1
            own = (piece.expert + 1) / count if len(places) == 1 else 0.0
            shape = [np.log2(side) / 16 for side in piece.shape]
            rows.append([*kind, own, *shape, size[0] / self.sizes[:, 0].sum(), shares[places].mean()])
        found = self.sensitivity
        errors = np.log10(np.clip(found.error, 1e-4, 1)) / 4 + 1
        return np.concatenate(
            [np.array(rows), errors, squeeze(100 * found.accuracy), squeeze(100 * found.loss)], axis=1
        ).astype(np.float32)

    def _costs(self, inputs: torch.Tensor, costs: str, shares: np.ndarray) -> np.ndarray:
        """Seconds, bytes and joules `[U, L, 3]` of a batch: products of low rank run as such where that is quicker."""
        found = products(self.model, inputs)
        profile = profiles.of_products(self.recipe, found, costs)
        table = np.zeros((len(self.parts), len(LEVELS), 3))
        for unit, places in enumerate(self.parts):
            for place in places:
                product = found[self.evaluator.names[place]]
                for level in range(len(LEVELS)):
                    runs = [profile.cost(name_of(product, way), BATCH * shares[place]) for way in ways(product, level)]
                    quickest = min(runs, key=lambda run: run.time)
                    table[unit, level] += quickest.time, size_of(product.shape, level), quickest.energy
        return table


class CompressionTables:
    """M models of the same shapes side by side, on one split, under one measure of quality."""

    def __init__(self, names: tuple[str, ...], split: str, granularity: str, quality: str, costs: str) -> None:
        choose("split", split, SPLITS)
        self.weights = np.array(QUALITIES[choose("quality", quality, QUALITIES)])
        self.models = [load(name, split, granularity, costs) for name in names]
        first = self.models[0]
        if any(model.units != first.units or (model.sizes != first.sizes).any() for model in self.models):
            raise ValueError(
                f"model={names!r}: they differ in their shapes; one environment is for models of one recipe"
            )
        self.units, self.sizes, self.overhead, self.bytes = first.units, first.sizes, first.overhead, first.bytes
        self.least = np.append(self.sizes.min(1)[::-1].cumsum()[::-1], 0)  # of the units from here on, [U + 1]
        self.rest = np.append(self.sizes[::-1, 0].cumsum()[::-1], 0)  # the same as float32
        self.gains = np.stack([self._value(*model.sensitivity[:2]) for model in self.models])  # [M, U, L]
        features = np.stack([model.features for model in self.models])
        self.features = np.pad(features, ((0, 0), (0, 1), (0, 0)))  # nothing is seen after the last unit
        self.costs = np.stack([model.costs for model in self.models])
        choices = self.gains[..., None] - self.sizes[..., None] * PRICES[:-1]
        cheapest = np.broadcast_to(self.sizes.argmin(1), (len(self.models), len(self.sizes)))
        # The level that each unit takes at each price of a byte, [M, U, prices], and what all from here on then take.
        self._choices = np.concatenate([choices.argmax(2), cheapest[..., None]], axis=2)
        taken = np.take_along_axis(self.sizes[None, :, :], self._choices, axis=2)
        self._taken = np.concatenate([taken[:, ::-1].cumsum(1)[:, ::-1], np.zeros_like(taken[:, :1])], axis=1)

    def suggested(self, model: np.ndarray, unit: np.ndarray, left: np.ndarray) -> np.ndarray:
        """The level `[n]` for the next unit in the plan of least additive loss for the bytes left (Lagrange)."""
        price = (self._taken[model, unit] > left[:, None]).argmin(1)
        return np.asarray(self._choices[model, np.minimum(unit, len(self.units) - 1), price])

    def quality(self, model: np.ndarray, levels: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Quality, change of accuracy and of loss, `[n]`, of plans `[n, U]`, the models run on what is not known."""
        found = np.zeros((len(levels), 2))
        for row in sorted(
            range(len(levels)), key=lambda row: (model[row], *levels[row])
        ):  # so that prefixes are shared
            found[row] = self.models[model[row]].score(levels[row])
        return self._value(found[:, 0], found[:, 1]), found[:, 0], found[:, 1]

    def _value(self, accuracy: np.ndarray, loss: np.ndarray) -> np.ndarray:
        return np.asarray(self.weights[0] * accuracy + self.weights[1] * loss)


def squeeze(values: np.ndarray) -> np.ndarray:
    """Logarithms that keep the sign: about -7..7 for -1000..1000."""
    return np.asarray(np.sign(values) * np.log1p(np.abs(values)))


@cache
def load(name: str, split: str, granularity: str, costs: str) -> ModelTables:
    """The tables of a model, made once in a process."""
    return ModelTables(name, split, granularity, costs)
