"""Reward of all environments: R = quality - cost_weight * cost."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from cost.model import Array, Cost, RelativeCost
from cost.normalize import CostNormalizer, FrozenNormalizer


@dataclass(frozen=True)
class Reward:
    """Quality minus weighted cost. The cost is relative to a reference of cost 1, and normalised if there is a
    normalizer."""

    cost_weight: float
    relative: RelativeCost
    normalizer: FrozenNormalizer | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.cost_weight, int | float) or not 0 <= self.cost_weight < float("inf"):
            raise ValueError(f"cost_weight must be a finite number >= 0, got {self.cost_weight!r}")

    @classmethod
    def of(cls, cost_weight: float, reference: Cost, weights: Cost, normalizer: str | None = None) -> Reward:
        """Create the reward from environment arguments; `normalizer` is the file of a `CostNormalizer`."""
        frozen = None if normalizer is None else CostNormalizer.load(normalizer).frozen("reward/cost")
        return cls(cost_weight, RelativeCost(reference, weights), frozen)

    def __call__(self, quality: Array, cost: Array) -> Array:
        """Reward for a quality and a relative cost, floats or arrays."""
        return quality - self.cost_weight * self.normalized(cost)

    def normalized(self, cost: Array) -> Array:
        """Relative cost after normalisation."""
        return cost if self.normalizer is None else self.normalizer(cost)

    def price(self, cost: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Relative costs `[n]` and negative relative terms `[n, 3]` for costs `[n, 3]` in s, B, J."""
        of: Any = self.relative.reference
        return self.relative(*cost.T), -cost / (of.time, of.memory, of.energy)
