"""Baselines and bounds: each problem has a module with `baselines(env_id, **kwargs)` and `bound(...)`."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any, Protocol

import moe_envs
from agents.evaluate import Policy

Report = Callable[[float], object]


class Baselines(Protocol):
    """Interface of a module of baselines."""

    def baselines(self, env_id: str, *, report: Report, **env_kwargs: Any) -> dict[str, Policy]:
        """Baselines of an environment with these arguments by name, tuned on validation; their `kind` is "baseline".
        `report` is called with the finished share."""

    def bound(self, env_id: str, **env_kwargs: Any) -> Policy | None:
        """Upper bound: a policy that uses the labels (`kind` is "bound"); None if no bound is known."""


def find(env_id: str) -> Baselines:
    """Find the baselines of a registered environment; raises `ValueError` for an unknown id."""
    found: Any = import_module(moe_envs.find(env_id).baselines)
    baselines: Baselines = found
    return baselines


def validation_episodes(env_id: str) -> int:
    """Episodes on which a training in an environment is validated, each time."""
    spec = moe_envs.SPECS.get(env_id.rpartition(":")[2])
    return spec.validation_episodes if spec else 1000


def on_split(env_id: str, env_kwargs: dict[str, Any], split: str) -> dict[str, Any]:
    """Add `split` to the arguments if the environment has it; other environments differ by seed only."""
    spec = moe_envs.SPECS.get(env_id.rpartition(":")[2])
    return {**env_kwargs, "split": split} if spec and split in spec.splits else env_kwargs
