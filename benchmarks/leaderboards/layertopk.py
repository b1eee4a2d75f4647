"""The leaderboard of MoELayerTopK-v0: PPO and Ada-K beside rules, at cost weights and under budgets."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd

from agents import baselines as rules
from agents.baselines.layertopk import ID, PASSAGES
from agents.evaluate import make_rows, play
from benchmarks.leaderboards.board import Leaderboard, Problem


class LayerTopKProblem(Problem):
    """Fewer episodes and looks than elsewhere, as the model is really run: 256 decisions an episode. An episode is a
    passage of the split, and each is played once."""

    learners = {"PPO": ("ppo", "own"), "SB3 PPO": ("ppo", "sb3")}
    own = {"Ada-K": "agents.baselines.adak:trained"}
    looks = 5
    episodes = {"validation": 528, "test": 704}
    about = (
        "Scores are mean returns of the passages of the test split, each once, {test:,} with the shipped model. Of "
        f"validation PPO's weights are chosen on {{validation:,}}, rules and Ada-K's on {PASSAGES} of a domain. "
        "A policy's own cost is not counted. The bound looks at the answers."
    )
    bound_is = "an oracle that sees the loss of each token"

    def _played(self, policy: Any, split: str, on: str, episodes: int | None) -> pd.DataFrame:
        arguments = rules.on_split(self.env_id, self.splits[split], on) | getattr(policy, "env_kwargs", {})
        one: Any = make_rows(self.env_id, 1, **arguments).unwrapped
        there = len(one.stepped.passages.ids)
        if (count := episodes or min(self.episodes[on], there)) > there:
            raise ValueError(f"episodes={count}: split {on!r} has {there} passages")
        passages = np.linspace(0, there - 1, count).round().astype(np.int64)
        env = make_rows(self.env_id, count, **arguments)
        try:
            return play(policy, env, count, 0, {"passage": passages})
        finally:
            env.close()


BOARD = Leaderboard(LayerTopKProblem(ID))
