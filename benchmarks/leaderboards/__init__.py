"""Leaderboards: compare learners with all baselines and the bound of an environment on test data."""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec
from typing import Any

import moe_envs


def board_of(env_id: str) -> Any:
    """Leaderboard of a registered environment, specialised if its problem has its own class."""
    from benchmarks.leaderboards.board import Leaderboard, Problem

    spec = moe_envs.find(env_id)
    package, _, problem = spec.baselines.rpartition(".")
    special = f"{__name__}.{problem}"
    if package == "agents.baselines" and find_spec(special) is not None:
        return import_module(special).BOARD
    return Leaderboard(Problem(env_id))
