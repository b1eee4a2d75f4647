"""The leaderboard of MoELayerTopK-v0: PPO and Ada-K beside rules, at cost weights and under budgets."""

from __future__ import annotations

from agents.baselines.layertopk import ID
from benchmarks.leaderboards.board import Leaderboard, Problem


class LayerTopKProblem(Problem):
    """Fewer episodes and looks than elsewhere, as the model is really run: 256 decisions an episode."""

    learners = {"PPO": ("ppo", "own"), "SB3 PPO": ("ppo", "sb3")}
    own = {"Ada-K": "agents.baselines.adak:trained"}
    looks = 5
    episodes = {"validation": 528, "test": 704}
    bound_is = "an oracle that sees the loss of each token"


BOARD = Leaderboard(LayerTopKProblem(ID))
