"""The leaderboard of MoECompression-v0: accuracy change of plans within byte budgets."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from agents.baselines import compression as rules
from agents.deploy.compression import levels_of
from benchmarks.leaderboards.board import Leaderboard, Problem
from benchmarks.results.scores import Verdict
from experts import reference_models
from moe_envs.compression.tables import CompressionTables

SMALL, HELD_OUT = "digits-mlp, by layer", "fashion-mnist-conv, held-out models"
SHARES = {  # budgets as share of the float32 file: 98 to 500 kB for the convolutional model
    "fashion-mnist-conv": (0.034, 0.04, 0.048, 0.062, 0.069, 0.086, 0.104, 0.173),
    "digits-mlp": (0.07, 0.09, 0.12, 0.16),
}
TIMES_LEAST = 1.3, 1.6, 2.0, 2.5, 3.5, 5.0  # budgets of the small model over its smallest plan
WARM = {"PPO": 0.6, "PPO, no warm start": 0.0, "PPO, no masks": 0.6}  # share of the steps on sensitivities


class Compression(Problem):
    """One task per budget; the score is the accuracy change in points, averaged over the models of the split."""

    learners = {"PPO": ("ppo", "own")}
    extras = {name: ("ppo", "own") for name in WARM if name != "PPO"}
    settable = False  # budgets, models and plans are the board's own
    bound_is = "best of all plans"
    episodic = False  # one plan per budget is evaluated
    about = (
        "Scores are changes of test accuracy in points, nothing trained, means over the models of a split, within a "
        "budget of bytes; the budgets of a split count as one, by their mean. Plans are searched by one half of the "
        "validation images and compared on the other. Searches have 400 evaluations for each model and budget, one run "
        "of each. A policy has none when it plans, but its training had: two fifths of its steps end in a plan whose "
        "quality is measured, up to 120,000 plans of the small model, which has 21,560. The bound is the best of all "
        "plans, chosen by the 360 test images; the larger models have none."
    )

    def __init__(self, env_id: str) -> None:
        super().__init__(env_id)
        self.splits[HELD_OUT] = self.splits["fashion-mnist-conv"]
        self.judged_on: Mapping[str, list[str]] = {split: kwargs["model"] for split, kwargs in self.splits.items()} | {
            HELD_OUT: ["fashion-mnist-conv-3", "fashion-mnist-conv-4"]
        }

    def prepared(self, policy: str, agent: Any, total: int) -> Callable[[Any], object]:
        """Train PPO with action masks, the first three fifths of the steps on the sum of sensitivities."""
        env: Any = agent.get_env().unwrapped
        agent.rows.has_masks &= policy != "PPO, no masks"
        env.additive = WARM[policy] > 0

        def after(agent: Any) -> None:
            env.additive = agent.num_timesteps < WARM[policy] * total

        return after

    def watched(self, policy: Any, split: str, episodes: int | None, folder: Path) -> float:
        """Mean over models and budgets, on images not used for the search of plans."""
        models = self.splits[split]["model"]
        return 100 * float(np.mean(self._changes(split, models, self._plans(policy, split, models), "validation")))

    def judged(self, policy: Any, split: str, episodes: int | None, folder: Path) -> dict[str, Verdict]:
        """Evaluate the policy's plan for each budget."""
        return self._verdicts(split, self._plans(policy, split, self.judged_on[split]))

    def baselines(self, split: str, episodes: int | None, folder: Path) -> dict[str, dict[str, Verdict]]:
        """Uniform levels, greedy and exact allocation, and searches with 400 evaluations per model and budget."""
        plans: dict[str, list[list[np.ndarray]]] = {name: [] for name in rules.RULES}
        for model in self.judged_on[split]:
            tables = self._tables(model, split, "train")
            rooms = [budget - tables.overhead for budget in self._budgets(model, split)]
            for name, found in plans.items():
                found.append([rules.find_plan(name, tables, 0, room, rules.EVALUATIONS, 0) for room in rooms])
        return {name: self._verdicts(split, found) for name, found in plans.items()}

    def bound(self, split: str, episodes: int | None, folder: Path) -> dict[str, Verdict]:
        """Best feasible plan on the test images, for the small model only."""
        if split != SMALL:
            return {}
        (model,) = self.judged_on[split]
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
        """Group the budgets of a split, since the score of a single budget depends on a few images."""
        return self.group(task)

    def group(self, task: str) -> str:
        """Group the budgets of a split."""
        return task.rpartition(",")[0]

    def _plans(self, policy: Any, split: str, models: list[str]) -> list[list[np.ndarray]]:
        """Plans of a policy by model and budget."""
        return [[walk[0] for walk in levels_of(policy, model, self._budgets(model, split))] for model in models]

    def _changes(self, split: str, models: list[str], plans: list[list[np.ndarray]], on: str) -> np.ndarray:
        """Accuracy changes by budget, averaged over the models."""
        return np.mean([
            self._tables(model, split, on).quality(np.zeros(len(found), dtype=np.int64), np.stack(found))[1]
            for model, found in zip(models, plans, strict=True)
        ], axis=0)  # fmt: skip

    def _verdicts(self, split: str, plans: list[list[np.ndarray]]) -> dict[str, Verdict]:
        """Verdicts of plans by model and budget; cost is the share of float32 bytes, quality the accuracy change."""
        models, shares = self.judged_on[split], []
        for model, found in zip(models, plans, strict=True):
            tables = self._tables(model, split, "train")
            shares.append([(rules.size(plan, tables.sizes) + tables.overhead) / tables.bytes for plan in found])
        changes = (self._changes(split, models, plans, on) for on in ("validation", "test"))
        columns = *changes, np.mean(shares, axis=0)
        budgets = self._budgets(models[0], split)
        return {
            f"{split}, {budget / 1000:.3g} kB": Verdict(100 * chosen, 100 * test, test, share)
            for budget, chosen, test, share in zip(budgets, *(each.tolist() for each in columns), strict=True)
        }

    def _budgets(self, model: str, split: str) -> list[int]:
        """Budgets in bytes at which plans are compared."""
        tables = self._tables(model, split, "train")
        if split == SMALL:
            return [round(times * (tables.overhead + int(tables.least[0]))) for times in TIMES_LEAST]
        return [round(share * tables.bytes) for share in SHARES[reference_models.recipe_of(model)[0]]]

    def _tables(self, model: str, split: str, on: str) -> CompressionTables:
        granularity = self.splits[split].get("granularity", "expert")
        return CompressionTables((model,), on, granularity, "accuracy and loss", "reference")


BOARD = Leaderboard(Compression("MoECompression-v0"))
