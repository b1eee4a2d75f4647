"""Pictures of a comparison of continual learning."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from benchmarks.experiments.continual.methods import NONE, ONE
from benchmarks.results.pareto import front

USUAL = "ER", "DER++", "GDumb", "together", "joint"  # in every plot
FEW = 10  # methods that a plot tells apart without choosing


def plot(frame: pd.DataFrame, result: dict[str, Any], out: Path) -> list[str]:
    """Plot accuracy against bytes, growth, and how often each task chooses each expert."""
    names = []
    for stream, runs in frame.groupby(title_of(frame), sort=False):
        figure = Figure((9, 5.5), layout="constrained")
        axis, told = figure.subplots(), _told_apart(runs)
        for method, several in runs.groupby("method", sort=False):
            line = several.groupby("buffer")[["bytes", "accuracy"]].mean()
            axis.plot(line["bytes"] / 1e3, line["accuracy"], ms=4, lw=1, **_style(str(method), told))
        axis.set(xscale="log", xlabel="kB of network, replay and statistics", ylabel="accuracy after the last task",
                 title=str(stream))  # fmt: skip
        axis.grid(alpha=0.3)
        _legend(figure)
        names.append(f"{stream}.png".replace(" ", "-"))
        figure.savefig(out / names[-1], dpi=120)
    return [*names, *_growth(frame, out), *_heatmap(frame, out)]


def _told_apart(runs: pd.DataFrame) -> list[str]:
    """Methods with a colour each: of many, the usual ones and those that no other beats in bytes and accuracy."""
    methods = runs["method"].unique().tolist()
    points = runs.groupby(["method", "buffer"])[["bytes", "accuracy"]].mean()
    best = set(points.index.get_level_values("method")[front(points.to_numpy(dtype=float))])
    return methods if len(methods) <= FEW else [each for each in methods if each in best or each in USUAL]


def _style(method: str, told: list[str]) -> dict[str, Any]:
    if method not in told:
        return {"color": "0.8", "marker": ".", "zorder": 1, "label": "others"}
    number = told.index(method)
    return {"color": f"C{number % 10}", "marker": "os"[number // 10 % 2], "label": method}


def _legend(figure: Figure) -> None:
    """Beside the axes, each name once, "others" last."""
    lines = {str(line.get_label()): line for axis in figure.axes for line in axis.get_lines()}
    names = sorted(lines, key=lambda name: name == "others")
    figure.legend([lines[name] for name in names], names, fontsize=7, loc="outside right upper")


def _growth(frame: pd.DataFrame, out: Path) -> list[str]:
    """Plot what is kept, and the time, task by task."""
    shown = frame[frame["buffer"].isin((NONE, *ONE))]
    if not len(shown):
        return []
    groups = list(shown.groupby(title_of(shown), sort=False))
    told = list(dict.fromkeys(method for _, runs in groups for method in _told_apart(runs)))
    figure = Figure((4 * len(groups) + 3, 7), layout="constrained")
    axes = figure.subplots(2, len(groups), squeeze=False)
    for column, (stream, runs) in zip(axes.T, groups, strict=True):
        for method, several in runs.groupby("method", sort=False):
            for axis, name, scale in zip(column, ("bytes after", "seconds of tasks"), (1e3, 1), strict=True):
                values = np.mean(several[name].tolist(), axis=0) / scale
                axis.plot(range(1, len(values) + 1), values, ms=3, lw=1, **_style(str(method), told))
        column[0].set(title=str(stream), ylabel="kB kept", yscale="log")
        column[1].set(xlabel="task", ylabel="seconds", yscale="log")
    _legend(figure)
    figure.savefig(out / "growth.png", dpi=120)
    return ["growth.png"]


def _heatmap(frame: pd.DataFrame, out: Path) -> list[str]:
    shown = frame[frame["method"] == "together"]
    if not len(shown):
        return []
    groups, seeds = list(shown.groupby([title_of(shown), "buffer"], sort=False)), sorted(shown["seed"].unique())
    figure = Figure((1.8 * len(groups) + 1, 1.5 * len(seeds) + 0.5), layout="constrained")
    axes = figure.subplots(len(seeds), len(groups), squeeze=False)
    for column, ((stream, buffer), runs) in zip(axes.T, groups, strict=True):
        for axis, seed in zip(column, seeds, strict=True):
            for load_TE in runs.loc[runs["seed"] == seed, "expert load"]:
                image = axis.imshow(np.array(load_TE), vmin=0, vmax=1, cmap="viridis")
            axis.set(xticks=[], yticks=[], ylabel=f"seed {seed}")
        column[0].set_title(f"{stream}\n{buffer} images", fontsize=7)
        column[-1].set_xlabel("expert")
    figure.supylabel("task", fontsize=9)
    figure.colorbar(image, ax=figure.axes, label="share of the task's choices")
    figure.savefig(out / "experts.png", dpi=120)
    return ["experts.png"]


def title_of(frame: pd.DataFrame) -> pd.Series:
    """Name of the stream of each run, with its scenario where that is not the stream's own."""
    if "scenario" not in frame:
        return frame["stream"]
    return frame["stream"].where(frame["scenario"].isna(), frame["stream"] + " by " + frame["scenario"].astype(str))
