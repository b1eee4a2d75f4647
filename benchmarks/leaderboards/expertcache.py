"""The leaderboard of MoEExpertCache-v0: PPO beside rules, by capacity and cost weight."""

from __future__ import annotations

from agents.baselines.expertcache import ID
from benchmarks.leaderboards.board import Leaderboard, Problem


class ExpertCacheProblem(Problem):
    """Fewer episodes and looks than elsewhere, as the model is really run: 1,024 decisions an episode."""

    learners = {"PPO": ("ppo", "own"), "SB3 PPO": ("ppo", "sb3")}
    looks = 5
    episodes = {"validation": 132, "test": 352}
    bound_is = "thresholds with an eviction that sees the future"


BOARD = Leaderboard(ExpertCacheProblem(ID))
