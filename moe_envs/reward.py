"""The one reward of all environments: R = quality - cost_weight * cost."""

from dataclasses import dataclass

from cost.model import Array, RelativeCost
from cost.normalize import FrozenNormalizer


@dataclass(frozen=True)
class Reward:
    """Quality minus the weighted cost; the cost is relative to a reference policy whose cost is 1.

    With a `normalizer` the relative cost of a step goes through it first.
    """

    cost_weight: float
    relative: RelativeCost
    normalizer: FrozenNormalizer | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.cost_weight, int | float) or not 0 <= self.cost_weight < float("inf"):
            raise ValueError(f"cost_weight must be a finite number >= 0, got {self.cost_weight!r}")

    def __call__(self, quality: Array, cost: Array) -> Array:
        """The reward of a quality and a relative cost, floats or arrays."""
        return quality - self.cost_weight * cost
