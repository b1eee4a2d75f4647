"""The leaderboard of MoEServing-v0."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from agents.baselines.serving import ID
from benchmarks.leaderboards.board import Leaderboard, Problem


class ServingProblem(Problem):
    """Fewer episodes than elsewhere, as each has about a thousand decisions."""

    learners = {"PPO": ("ppo", "own"), "SB3 PPO": ("ppo", "sb3")}
    looks = 8
    episodes = {"validation": 128, "test": 256}
    bound_is = "a server that knows the future"

    def within(self, env: Mapping[str, Any]) -> Problem:
        """The same problem with these arguments of the environment, with which the optimum may be known."""
        found = super().within(env)
        if env.get("answers") == "latency":  # of latencies there is no other bound
            found.bound_is = "the optimum"
        return found


BOARD = Leaderboard(ServingProblem(ID))
