"""The leaderboard of MoECompression-v0: what plans within budgets of bytes cost in accuracy."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from agents.baselines import compression as rules
from agents.deploy.compression import levels_of
from benchmarks.experiments import compression, compression_bound
from benchmarks.leaderboards.board import Leaderboard
from benchmarks.results.scores import Verdict
from moe_envs.compression.env import SHARES
from moe_envs.compression.tables import CompressionTables

SMALL = "digits-mlp, by layer"
EVALUATIONS = 400  # of a search


class Compression:
    """Each training is as many tasks as there are budgets; a score is the change of accuracy in points, mean over the
    split's models."""

    ID = "moe_envs:MoECompression-v0"
    SPLITS: dict[str, dict[str, Any]] = {
        SMALL: {"model": ["digits-mlp"], "granularity": "layer"},
        "fashion-mnist-conv": {"model": [f"fashion-mnist-conv-{seed}" for seed in range(3)]},
    }
    LEARNERS = {"PPO": ("ppo", "own")}
    BOUND_IS = "best of all plans"
    EPISODIC = False  # a plan for each budget is all there is to judge

    def prepared(self, agent: Any, total: int) -> Callable[[Any], object]:
        """PPO trains three fifths of its steps on the sum of sensitivities."""
        return compression.prepare(agent, total, warm=0.6, masks=True, shares=SHARES)

    def watched(self, policy: Any, split: str, episodes: int | None, folder: Path) -> float:
        """The mean over models and budgets, on images that no plan is searched by."""
        return 100 * float(np.mean(self._changes(split, self._plans(policy, split), "validation")))

    def judged(self, policy: Any, split: str, episodes: int | None, folder: Path) -> dict[str, Verdict]:
        """The policy's plan for each budget, from sensitivities alone."""
        return self._verdicts(split, self._plans(policy, split))

    def baselines(self, split: str, episodes: int | None, folder: Path) -> dict[str, dict[str, Verdict]]:
        """Uniform levels, greedy, exact allocation, and searches of 400 evaluations for each model and budget."""
        plans: dict[str, list[list[np.ndarray]]] = {name: [] for name in compression.BASELINES}
        for model in self.SPLITS[split]["model"]:
            tables = self._tables(model, split, "train")
            rooms = [budget - tables.overhead for budget in self._budgets(model, split)]
            for name, found in plans.items():
                found.append([compression.find(name, tables, room, EVALUATIONS, 0) for room in rooms])
        return {name: self._verdicts(split, found) for name, found in plans.items()}

    def bound(self, split: str, episodes: int | None, folder: Path) -> dict[str, Verdict]:
        """Of the small model the plan that is best on the test images, of all that fit."""
        if split != SMALL:
            return {}
        (model,) = self.SPLITS[split]["model"]
        tables = self._tables(model, split, "test")
        plans = rules.all_plans(tables.sizes)
        points = np.concatenate([
            tables.quality(np.zeros(len(part), dtype=np.int64), part)[1]
            for part in np.array_split(plans, max(1, len(plans) // 500))
        ])  # fmt: skip
        used = np.take_along_axis(tables.sizes.T, plans, axis=0).sum(1) + tables.overhead
        best = [plans[np.where(used <= budget, points, -np.inf).argmax()] for budget in self._budgets(model, split)]
        return self._verdicts(split, [best])

    def unit(self, task: str) -> str:
        """The budgets of a split: what a single one says is a matter of a few images."""
        return self.group(task)

    def group(self, task: str) -> str:
        """The budgets of a split."""
        return task.rpartition(",")[0]

    def _plans(self, policy: Any, split: str) -> list[list[np.ndarray]]:
        """A policy's, by model and budget."""
        return [
            [walk[0] for walk in levels_of(policy, model, self._budgets(model, split))]
            for model in self.SPLITS[split]["model"]
        ]

    def _changes(self, split: str, plans: list[list[np.ndarray]], on: str) -> np.ndarray:
        """Changes of accuracy by budget, means over the models."""
        return np.mean([
            self._tables(model, split, on).quality(np.zeros(len(found), dtype=np.int64), np.stack(found))[1]
            for model, found in zip(self.SPLITS[split]["model"], plans, strict=True)
        ], axis=0)  # fmt: skip

    def _verdicts(self, split: str, plans: list[list[np.ndarray]]) -> dict[str, Verdict]:
        """Of plans by model and budget; cost is the share of the float32 bytes, quality the change of accuracy."""
        shares = []
        for model, found in zip(self.SPLITS[split]["model"], plans, strict=True):
            tables = self._tables(model, split, "train")
            shares.append([(rules.size(plan, tables.sizes) + tables.overhead) / tables.bytes for plan in found])
        columns = *(self._changes(split, plans, on) for on in ("validation", "test")), np.mean(shares, axis=0)
        budgets = self._budgets(self.SPLITS[split]["model"][0], split)
        return {
            f"{split}, {budget / 1000:.3g} kB": Verdict(100 * chosen, 100 * test, test, share)
            for budget, chosen, test, share in zip(budgets, *(each.tolist() for each in columns), strict=True)
        }

    def _budgets(self, model: str, split: str) -> list[int]:
        if split != SMALL:
            return compression.budgets_of(model)
        return compression_bound.budgets_of(self._tables(model, split, "train"))

    def _tables(self, model: str, split: str, on: str) -> CompressionTables:
        granularity = self.SPLITS[split].get("granularity", "expert")
        return CompressionTables((model,), on, granularity, "accuracy and loss", "reference")


BOARD = Leaderboard(
    Compression(),
    "Scores are changes of test accuracy in points, nothing trained, means over the models of a split, within a budget "
    "of bytes; the budgets of a split count as one, by their mean. Plans are searched by one half of the validation "
    "images and compared on the other. Searches have 400 evaluations for each model and budget, one run of each. A "
    "policy has none when it plans, but its training had: two fifths of its steps end in a plan whose quality is "
    "measured, up to 120,000 plans of the small model, which has 21,560. The bound is the best of all plans, chosen by "
    "the 360 test images; the larger models have none.",
    quick=(SMALL,),
)
