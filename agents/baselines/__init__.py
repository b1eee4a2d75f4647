"""Agents that do not learn, and exact bounds: for each problem `baselines(env_id, **kwargs)` and `bound(...)`."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any, Protocol

import moe_envs
from agents.evaluate import Policy

Report = Callable[[float], object]


class Baselines(Protocol):
    """What a module of baselines offers."""

    def baselines(self, env_id: str, *, report: Report, **env_kwargs: Any) -> dict[str, Policy]:
        """By name, the strongest simple policies for an environment with these arguments, tuned on validation; their
        `kind` is "baseline". `report` is called with the share that is done."""

    def bound(self, env_id: str, **env_kwargs: Any) -> Policy | None:
        """A policy that nothing can beat, as it looks at the answers (`kind` is "bound"); None where none is known."""


def find(env_id: str) -> Baselines:
    """The baselines of a registered environment; raises `ValueError` for an unknown one."""
    found: Any = import_module(moe_envs.find(env_id).baselines)
    baselines: Baselines = found
    return baselines


def on_split(env_id: str, env_kwargs: dict[str, Any], split: str) -> dict[str, Any]:
    """The arguments with `split`, where the environment has that; others are told apart by their seeds alone."""
    spec = moe_envs.SPECS.get(env_id.rpartition(":")[2])
    return {**env_kwargs, "split": split} if spec and split in spec.splits else env_kwargs
