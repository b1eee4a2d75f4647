"""Does a learned router beat every baseline? PPO on MoERouting-v0 for four cost weights, one training each."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from benchmarks.leaderboards.board import Leaderboard, Problem
from benchmarks.results.pareto import front
from benchmarks.results.tables import records

WEIGHTS = (0.4, 0.2, 0.1, 0.05)
COLOURS = {"learned": "tab:red", "baseline": "tab:gray", "bound": "tab:green"}


class Demo(Problem):
    """PPO on Fashion-MNIST with four cost weights."""

    learners = {"PPO": ("ppo", "own")}
    looks = 10

    def __init__(self, env_id: str, bundle: str = "fashion-mnist") -> None:
        super().__init__(env_id)
        self.splits = {f"cost weight {weight:g}": {"bundle": bundle, "cost_weight": weight} for weight in WEIGHTS}

    def group(self, task: str) -> str:
        """Put all tasks in one group."""
        return "all cost weights"


class DemoBoard(Leaderboard):
    """Leaderboard with an additional plot of accuracy against cost."""

    SEEDS: tuple[int, ...] = (0,)

    def plot(self, frame: pd.DataFrame, result: dict[str, Any], out: Path) -> list[str]:
        """Plot the leaderboard and pareto.png."""
        points = [
            {"split": task["task"], **row} for task in result["tasks"] for row in task["policies"]
            if row["policy"] != "random"
        ]  # fmt: skip
        draw(pd.DataFrame(points), out / "pareto.png")
        return ["pareto.png", *super().plot(frame, result, out)]


def draw(points: pd.DataFrame, path: Path) -> None:
    """Plot test accuracy against cost: PPO per cost weight, baselines with Pareto front, and the bound."""
    figure = Figure((9, 6), layout="constrained")
    panel = figure.subplots()
    for kind, (marker, size) in {"baseline": ("o", 18), "bound": ("^", 50), "learned": ("D", 42)}.items():
        part = points[points["kind"] == kind]
        label = {"learned": "PPO, by cost weight", "baseline": "baselines", "bound": "exact bound (sees the labels)"}[
            kind
        ]
        panel.scatter(part["cost"], part["quality"], s=size, c=COLOURS[kind], marker=marker, label=label, zorder=3)
        best = part[["cost", "quality"]].to_numpy()
        if len(best):
            best = best[front(best)]
            best = best[np.argsort(best[:, 0])]
            panel.step(best[:, 0], best[:, 1], where="post", color=COLOURS[kind], linewidth=1, zorder=2)
    for row in records(points[points["kind"] == "learned"]):
        panel.annotate(row["split"].removeprefix("cost weight "), (row["cost"], row["quality"]), ha="center",
                       textcoords="offset points", xytext=(0, 10), color=COLOURS["learned"],
                       bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.5})  # fmt: skip
    for name, above in (("gate top-1", 50), ("gate top-2", 25)):
        for row in records(points[points["policy"] == name].head(1)):
            line = {"arrowstyle": "-", "color": COLOURS["baseline"]}
            panel.annotate(f"model's own {name.removeprefix('gate ')} gate", (row["cost"], row["quality"]), ha="center",
                           textcoords="offset points", xytext=(0, above), fontsize=10, arrowprops=line)  # fmt: skip
    shown = points[(points["cost"] < 1.3) & (points["quality"] > points["quality"].median() - 0.15)]
    panel.set(xlabel="cost per batch (1 = the model's own top-2 gate)", ylabel="accuracy on test images",
              xlim=(0, 1.3), ylim=(shown["quality"].min() - 0.01, None))  # fmt: skip
    panel.legend(loc="lower right", fontsize=11)
    panel.grid(alpha=0.3)
    figure.savefig(path, dpi=120)


_BOARD = DemoBoard(Demo("MoERouting-v0"))
Setup, SETTINGS, SPLITS, SEEDS = _BOARD.Setup, _BOARD.SETTINGS, _BOARD.SPLITS, _BOARD.SEEDS
QUICK = {
    "splits": ["cost weight 0.4"], "settings": {"timesteps": 8192, "episodes": 50},
    "setups": {name: SETTINGS[name] for name in ("bound", "PPO")},
}  # fmt: skip
measure, score, plot, text = _BOARD.measure, _BOARD.score, _BOARD.plot, _BOARD.text
once, check, headline = _BOARD.once, _BOARD.check, _BOARD.headline
