"""The leaderboard of MoERouting-v0: returns of batches, for two data sets and two cost weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from agents.evaluate import evaluate
from benchmarks.leaderboards.board import Leaderboard
from benchmarks.results.scores import Verdict

EPISODES = {"validation": 1000, "test": 2000}
FIRST_SEED = 10_000


class Routing:
    """Each training is one task."""

    ID = "moe_envs:MoERouting-v0"
    SPLITS: dict[str, dict[str, Any]] = {
        f"{bundle}, cost weight {weight:g}": {"bundle": bundle, "cost_weight": weight}
        for bundle in ("fashion-mnist", "digits")
        for weight in (0.1, 0.4)
    }
    LEARNERS = {"PPO": ("ppo", "own"), "REINFORCE": ("reinforce", "own"), "SB3 PPO": ("ppo", "sb3")}
    BOUND_IS = "exact bound"

    def watched(self, policy: Any, split: str, episodes: int | None, folder: Path) -> float:
        """The mean return on validation."""
        return float(self._played(policy, split, "validation", episodes)["return"].mean())

    def judged(self, policy: Any, split: str, episodes: int | None, folder: Path) -> dict[str, Verdict]:
        """Mean returns; accuracy and relative cost on test."""
        test = self._played(policy, split, "test", episodes)
        found = (float(test[column].mean()) for column in ("return", "quality", "cost"))
        return {split: Verdict(self.watched(policy, split, episodes, folder), *found)}

    def baselines(self, split: str, episodes: int | None, folder: Path) -> dict[str, dict[str, Verdict]]:
        """Every baseline, tuned on validation."""
        from agents.baselines.routing import baselines

        tuned = baselines(self.ID, **self.SPLITS[split])
        rules = {name: policy for name, policy in tuned.items() if policy.kind == "baseline"}
        return {name: self.judged(policy, split, episodes, folder) for name, policy in rules.items()}

    def bound(self, split: str, episodes: int | None, folder: Path) -> dict[str, Verdict]:
        """The exact bound."""
        from agents.baselines.routing import Oracle

        return self.judged(Oracle(), split, episodes, folder)

    def unit(self, task: str) -> str:
        """Each by itself."""
        return task

    def group(self, task: str) -> str:
        """The cost weights of a data set."""
        return task.partition(",")[0]

    def _played(self, policy: Any, split: str, on: str, episodes: int | None) -> Any:
        return evaluate(policy, self.ID, episodes or EPISODES[on], FIRST_SEED, **self.SPLITS[split], split=on)


BOARD = Leaderboard(
    Routing(),
    "Scores are mean returns of batches of 32, accuracy less the cost weight times the relative cost; cost 1 is what "
    "the model's own top-2 gate costs. The bound is exact: the best plan for each batch, labels known.",
    quick=("fashion-mnist, cost weight 0.4", "digits, cost weight 0.4"),
)
