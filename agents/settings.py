"""Settings of the learners: schedules, and errors that name what cannot be meant."""

from __future__ import annotations

from typing import Any

POLICY: dict[str, Any] = {"net_arch": (64, 64), "gru": 0}
COUNT = "a whole number of at least 1"


def schedule(value: float | str) -> tuple[float, float]:
    """Begin and end of a setting that is a number, "linear A" or "linear A B"; raises `ValueError` for others."""
    if isinstance(value, str):
        kind, *numbers = value.split()
        if kind != "linear" or len(numbers) not in (1, 2):
            raise ValueError(f"{value!r} is not a number, 'linear A' or 'linear A B'")
        begin, end = (*map(float, numbers), 0.0)[:2]
        return begin, end
    return float(value), float(value)


def validate(settings: dict[str, Any]) -> None:
    """Raise `ValueError` naming the first setting that cannot be meant."""
    whole = "batch_size" if "n_epochs" not in settings else ""  # REINFORCE's None is the whole rollout
    for name in ("n_envs", "n_steps", "n_epochs", "batch_size"):
        value = settings.get(name, 1)
        _require((value is None and name == whole) or (isinstance(value, int) and value > 0), name, value, COUNT)
    for name in ("gamma", "gae_lambda"):
        _require(0 <= settings[name] <= 1, name, settings[name], "from 0 to 1")
    for name in ("max_grad_norm", "clip_range", "target_kl"):
        value = settings.get(name)
        _require(value is None or (isinstance(value, int | float) and value > 0), name, value, "a positive number")
    for name, last in (("learning_rate", 0.0), ("temperature", 1e-9)):
        try:
            begin, end = schedule(settings[name])
        except (TypeError, ValueError) as error:
            raise ValueError(f"{name}: {error}") from error
        _require(begin > 0 and end >= last, name, settings[name], "positive")
    policy = settings["policy_kwargs"] or {}
    if unknown := policy.keys() - POLICY.keys():
        raise ValueError(f"policy_kwargs has {', '.join(sorted(unknown))}; known are {', '.join(POLICY)}")
    widths = policy.get("net_arch", [])
    fits = isinstance(widths, list | tuple) and all(isinstance(width, int) and width > 0 for width in widths)
    _require(fits, "net_arch", widths, "a list of widths, for policy and value each")


def _require(fits: bool, name: str, value: object, wanted: str) -> None:
    if not fits:
        raise ValueError(f"{name}={value!r}: must be {wanted}")
