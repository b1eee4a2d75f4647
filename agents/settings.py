"""Hyperparameters of the learners, with SB3's names and meanings, and their validation."""

from __future__ import annotations

import difflib
from dataclasses import dataclass, fields
from typing import Any, ClassVar, Self

POLICIES: dict[str, dict[str, Any]] = {
    "MlpPolicy": {"net_arch": (64, 64), "gru": 0},
    "GruPolicy": {"net_arch": (64,), "gru": 64},
}
COUNT = "a whole number of at least 1"


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Settings of all learners.

    `learning_rate` and `temperature` are numbers, or "linear A" or "linear A B": linear from A to B (default 0)
    over the training. `policy_kwargs` has `net_arch` (a list, for policy and value each) and `gru` (units of a GRU
    before both, 0 for none). Actions are sampled from the logits divided by the temperature.
    """

    learning_rate: float | str = 3e-4
    n_steps: int = 2048
    batch_size: int | None = 64
    gamma: float = 0.99
    gae_lambda: float = 0.95
    normalize_advantage: bool = True
    ent_coef: float = 0.0
    vf_coef: float = 0.5
    max_grad_norm: float = 0.5
    temperature: float | str = 1.0
    normalize_observations: bool = False
    normalize_rewards: bool = False
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
        for name in ("n_steps", "n_epochs", "batch_size"):
            value = getattr(self, name, 1)
            whole = value is None and name == "batch_size" and self.whole_rollouts
            _require(whole or is_count(value), name, value, COUNT)
        for name in ("gamma", "gae_lambda"):
            _require(0 <= getattr(self, name) <= 1, name, getattr(self, name), "from 0 to 1")
        for name in ("max_grad_norm", "clip_range", "target_kl"):
            value = getattr(self, name, None)
            _require(value is None or (isinstance(value, int | float) and value > 0), name, value, "a positive number")
        for name, last in (("learning_rate", 0.0), ("temperature", 1e-9)):
            try:
                begin, end = schedule(getattr(self, name))
            except (TypeError, ValueError) as error:
                raise ValueError(f"{name}: {error}") from error
            _require(begin > 0 and end >= last, name, getattr(self, name), "positive")
        policy, known = self.policy_kwargs or {}, POLICIES["MlpPolicy"]
        if unknown := policy.keys() - known.keys():
            raise ValueError(f"policy_kwargs has {', '.join(sorted(unknown))}; known are {', '.join(known)}")
        widths = policy.get("net_arch", [])
        fits = isinstance(widths, list | tuple) and all(map(is_count, widths))
        _require(fits, "net_arch", widths, "a list of widths, for policy and value each")

    @property
    def epochs(self) -> int:
        """Number of passes over a rollout."""
        return int(getattr(self, "n_epochs", 1))

    def now(self, name: str, share: float) -> float:
        """Value of a setting or schedule after a share of the training."""
        begin, end = schedule(getattr(self, name))
        return begin + (end - begin) * min(1.0, share)


def schedule(value: float | str) -> tuple[float, float]:
    """Start and end value of a number, "linear A" or "linear A B"; raises `ValueError` for anything else."""
    if isinstance(value, str):
        kind, *numbers = value.split()
        if kind != "linear" or len(numbers) not in (1, 2):
            raise ValueError(f"{value!r} is not a number, 'linear A' or 'linear A B'")
        begin, end = (*map(float, numbers), 0.0)[:2]
        return begin, end
    return float(value), float(value)


def is_count(value: object) -> bool:
    """Whether a value is a whole number of at least 1."""
    return isinstance(value, int) and value > 0


def _require(fits: bool, name: str, value: object, wanted: str) -> None:
    if not fits:
        raise ValueError(f"{name}={value!r}: must be {wanted}")
