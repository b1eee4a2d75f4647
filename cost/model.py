"""Cost model: time, memory and energy of an operation, affine in the number of inputs."""

from __future__ import annotations

from dataclasses import astuple, dataclass
from typing import TypeVar

import numpy as np

Array = TypeVar("Array", float, np.ndarray)
TERMS = ("time", "memory", "energy")


@dataclass(frozen=True)
class Cost:
    """Time in s, memory in B, energy in J."""

    time: float = 0.0
    memory: float = 0.0
    energy: float = 0.0

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.time + other.time, self.memory + other.memory, self.energy + other.energy)

    def __mul__(self, factor: float) -> Cost:
        return Cost(self.time * factor, self.memory * factor, self.energy * factor)

    __rmul__ = __mul__


@dataclass(frozen=True)
class CostModel:
    """Costs of E operations: `fixed [E, 3]` per batch and `slope [E, 3]` per input, in s, B, J."""

    fixed: np.ndarray
    slope: np.ndarray

    def cost(self, operation: int, n: int) -> Cost:
        """Cost of one operation on n inputs; 0 for n = 0."""
        return Cost(*(self.fixed[operation] + self.slope[operation] * n).tolist()) if n else Cost()

    def batch(self, loads: np.ndarray) -> np.ndarray:
        """Costs `[..., 3]` of batches in which operation e runs on `loads[..., e]` inputs."""
        return (loads > 0) @ self.fixed + loads @ self.slope

    def subsets(self, codes: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Fixed and per-input costs `[S, 3]` of subsets of the operations, by default of all 2^E; bit e of a code
        `[S]` = operation e."""
        count = len(self.fixed)
        codes = np.arange(2**count) if codes is None else codes
        members = (codes[:, None] >> np.arange(count) & 1).astype(np.float64)
        return members @ self.fixed, members @ self.slope


@dataclass(frozen=True)
class RelativeCost:
    """Scalar cost: sum of weight * term / reference over terms; 1 for the reference if the weights sum to 1.

    Floats and arrays use the same operations in the same order and give identical bits.
    """

    reference: Cost
    weights: Cost

    def __post_init__(self) -> None:
        if min(astuple(self.weights)) < 0 or not 0 < sum(astuple(self.weights)) < float("inf"):
            raise ValueError(f"the weights of time, memory and energy must be >= 0 and one > 0, got {self.weights}")
        if min(astuple(self.reference)) <= 0:
            raise ValueError(f"the reference cost must be > 0, got {self.reference}")
        scales = [w / r for w, r in zip(astuple(self.weights), astuple(self.reference), strict=True)]
        object.__setattr__(self, "_scales", tuple(scales))

    def __call__(self, time: Array, memory: Array, energy: Array) -> Array:
        scale_time, scale_memory, scale_energy = self._scales  # type: ignore[attr-defined]
        return scale_time * time + scale_memory * memory + scale_energy * energy
