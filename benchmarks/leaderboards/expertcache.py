"""The leaderboard of MoEExpertCache-v0: PPO and a classifier of rollouts beside rules, by capacity and cost weight."""

from __future__ import annotations

from agents.baselines.expertcache import ID, STREAMS
from benchmarks.leaderboards.board import Leaderboard, Problem


class ExpertCacheProblem(Problem):
    """Fewer episodes and looks than elsewhere, as the model is really run: 1,024 decisions an episode."""

    learners = {"PPO": ("ppo", "own"), "SB3 PPO": ("ppo", "sb3")}
    own = {"rollout classifier": "agents.baselines.rollout_classifier:trained"}
    looks = 5
    episodes = {"validation": 132, "test": 352}
    about = (
        "Scores are mean returns of {test:,} test episodes, the same for all policies; their streams are drawn, some "
        f"more than once. Rules are tuned on {STREAMS} streams of validation, weights of PPO chosen on "
        "{validation:,} episodes of it; the classifier is taught by rl_train. A policy's own cost is not counted. "
        "The bound sees the future."
    )
    bound_is = "thresholds with an eviction that sees the future"


BOARD = Leaderboard(ExpertCacheProblem(ID))
