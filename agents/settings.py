"""Hyperparameters of the learners, with SB3's names and meanings, and their validation."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import cache
from math import inf
from typing import Annotated, Any, ClassVar, Self, get_type_hints

from annotated_types import Ge, Le

from cost.arguments import Adapters, NonNegative, Positive, adapters_of, check, short

POLICIES: dict[str, dict[str, Any]] = {
    "MlpPolicy": {"net_arch": (64, 64), "gru": 0},
    "GruPolicy": {"net_arch": (64,), "gru": 64},
}
Share = Annotated[float, Ge(0), Le(1)]
Scheduled = Annotated[float | str, "positive: a number, 'linear A' or 'linear A B'"]
Width = Annotated[int, Ge(1), Le(2**14)]
KNOWN = {  # in policy_kwargs
    "net_arch": Sequence[Width], "gru": Annotated[int, Ge(0), Le(2**14)], "residual": bool, "equivariant": bool,
}  # fmt: skip
_KNOWN = adapters_of(KNOWN)
Steps = Annotated[int, Ge(1), Le(2**24)]


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Settings of all learners.

    `learning_rate` and `temperature` are numbers, or "linear A" or "linear A B": linear from A to B (default 0)
    over the training. `policy_kwargs` has `net_arch` (a list, for policy and value each), `gru` (units of a GRU before
    both, 0 for none), `residual` (whether the policy starts from the environment's `advice`, if it gives any, and
    learns what to add to it) and `equivariant` (whether all actions share their weights, so that a policy serves any
    number of actions: the observation must have parts of one number for each action). Actions are sampled from the
    logits divided by the temperature. `weight_decay` is that of AdamW.
    Rows in a group of `group_size` have the same seed and play the same episodes (the same text), as far as these do
    not depend on the actions; an advantage is relative to the mean of the others in the same step, a leave-one-out
    baseline (Kool et al. 2019). Their episodes must have equal lengths.
    """

    learning_rate: Scheduled = 3e-4
    n_steps: Steps = 2048
    batch_size: Steps | None = 64
    gamma: Share = 0.99
    gae_lambda: Share = 0.95
    normalize_advantage: bool = True
    ent_coef: float = 0.0
    vf_coef: NonNegative = 0.5
    max_grad_norm: Positive = 0.5
    weight_decay: NonNegative = 0.0
    temperature: Scheduled = 1.0
    normalize_observations: bool = False
    normalize_rewards: bool = False
    group_size: Annotated[int, Ge(1), Le(2**14)] = 1
    policy_kwargs: dict[str, Any] | None = None

    whole_rollouts: ClassVar[bool] = False  # whether batch_size=None, the whole rollout, is allowed

    @classmethod
    def of(cls, values: dict[str, Any]) -> Self:
        """Create settings from keyword arguments; raises `ValueError` for an unknown one, with a suggestion."""
        names = [field.name for field in fields(cls)]
        for name in values:
            if name not in names:
                close = difflib.get_close_matches(name, names, n=1)
                hint = f"; did you mean {close[0]}?" if close else ""
                raise ValueError(f"{name} is no argument of this learner{hint} There are {', '.join(names)}")
        return cls(**values)

    def __post_init__(self) -> None:
        """Validate all settings by their annotations."""
        kind: Any = type(self)
        for name, value in check(_adapters(kind), vars(self)).items():
            object.__setattr__(self, name, value)
        if self.batch_size is None and not self.whole_rollouts:
            raise ValueError("batch_size=None: must be a whole number of at least 1, as there are minibatches")
        for name, last in (("learning_rate", 0.0), ("temperature", 1e-9)):
            try:
                begin, end = schedule(getattr(self, name))
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from error
            if not (0 < begin < inf and last <= end < inf):
                raise ValueError(f"{name}={getattr(self, name)!r}: must be positive")
        if unknown := (self.policy_kwargs or {}).keys() - KNOWN.keys():
            raise ValueError(f"policy_kwargs has {', '.join(sorted(unknown))}; known are {', '.join(KNOWN)}")
        if self.policy_kwargs is not None:
            object.__setattr__(self, "policy_kwargs", check(_KNOWN, self.policy_kwargs))

    @property
    def epochs(self) -> int:
        """Number of passes over a rollout."""
        return int(getattr(self, "n_epochs", 1))

    def now(self, name: str, share: float) -> float:
        """Value of a setting or schedule after a share of the training."""
        begin, end = schedule(getattr(self, name))
        return begin + (end - begin) * min(1.0, share)


@cache
def _adapters(kind: Any) -> Adapters:
    return adapters_of(get_type_hints(kind, include_extras=True))


def schedule(value: float | str) -> tuple[float, float]:
    """Start and end value of a number, "linear A" or "linear A B"; raises `ValueError` for anything else."""
    if isinstance(value, str):
        kind, *numbers = value.split()
        if kind != "linear" or len(numbers) not in (1, 2):
            raise ValueError(f"{short(value)} is not a number, 'linear A' or 'linear A B'")
        begin, end = (*map(float, numbers), 0.0)[:2]
        return begin, end
    return value, value
