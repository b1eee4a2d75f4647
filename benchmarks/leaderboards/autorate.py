"""The leaderboard of MoEAutoRate-v0."""

from __future__ import annotations

from agents.baselines.autorate import ID
from benchmarks.leaderboards.board import Leaderboard, Problem


class AutoRateProblem(Problem):
    """Fewer episodes and looks than elsewhere, as each episode is a whole training."""

    looks = 5
    episodes = {"validation": 128, "test": 512}


BOARD = Leaderboard(AutoRateProblem(ID))
