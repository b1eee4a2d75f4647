"""Leaderboard report: Markdown and plots."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from benchmarks.results.tables import markdown_header, markdown_row

Row = dict[str, Any]
COLOURS = {"learned": "tab:red", "baseline": "tab:gray", "bound": "tab:green"}


def text(result: Row, about: str) -> str:
    """The report as Markdown."""
    env = result["env"].split(":")[-1]
    lines = [f"# Leaderboard of {env}", "", about, "", *_unusual(result["settings"]), *_learners(result["rows"])]
    for task in result["tasks"]:
        lines += [f"## {task['task']}", "", *markdown_header(
            "policy", "kind", "test", "95 % over seeds", "over the best baseline", "validation", "quality", "cost",
            "seeds",
        )]  # fmt: skip
        for row in sorted(task["policies"], key=lambda row: -row["test"]):
            name = f"**{row['policy']}**" if row["kind"] == "learned" else row["policy"]
            name += " (best on validation)" if row["policy"] == task["best_baseline"] else ""
            numbers = ("" if row[key] is None else f"{row[key]:.4g}" for key in ("validation", "quality", "cost"))
            lines.append(markdown_row(name, row["kind"], f"{row['test']:.4f}", _interval(row["test_ci95"], 4),
                                      _over(row), *numbers, str(row["seeds"])))  # fmt: skip
        lines.append("")
    cost, quality = result["reference_point"]
    lines += ["## Hypervolume", "", "Of (cost, quality) of the policies that have all tasks of a group, with the "
              f"reference point ({cost:g}, {quality:g}).", ""]  # fmt: skip
    for group, volumes in result["hypervolume"].items():
        ordered = sorted(volumes.items(), key=lambda item: -item[1])
        lines += [
            *markdown_header(group, "hypervolume"),
            *(markdown_row(name, f"{each:.4f}") for name, each in ordered),
            "",
        ]
    return "\n".join(lines)


def tables(result: Row, bound_is: str) -> dict[str, list[Row]]:
    """Tables for the terminal: each learner with the best baseline and the bound."""
    found: dict[str, list[Row]] = {}
    for task in result["tasks"]:
        ordered = sorted(task["policies"], key=lambda row: -row["test"])
        best = task["best_baseline"]
        rows = [row for row in ordered if row["kind"] == "learned" or row["policy"] in (best, "bound")]
        found[f"{task['task']}, test"] = [
            {
                "policy": {best: f"{best} (best baseline on validation)", "bound": bound_is}.get(name, name),
                "kind": row["kind"], "score": row["test"], "95 % over seeds": _interval(row["test_ci95"], 4),
                "over the best baseline": _over(row), "quality": row["quality"], "cost": row["cost"],
            }
            for row in rows for name in [row["policy"]]
        ]  # fmt: skip
    return found


def summary(result: Row) -> list[str]:
    """One row per task with the test scores of the best baseline on validation, the learners and the bound."""
    learners = [row["policy"] for row in result["rows"]]
    lines = markdown_header("task", "best baseline", *learners, result["bound_is"])
    for task in result["tasks"]:
        found = {row["policy"]: row for row in task["policies"]}
        best = task["best_baseline"]
        digits = _decimals(found[best]["test"]) if best else 3
        cells = [f"{found[best]['test']:.{digits}f}, {best}" if best else ""]
        cells += [_with_interval(found[name], digits) if name in found else "" for name in learners]
        lines.append(
            markdown_row(task["task"], *cells, f"{found['bound']['test']:.{digits}f}" if "bound" in found else "")
        )
    said = [
        f"{row['policy']} {row['iqm']:+.2f} ({_interval(row['iqm_ci95'], 2)})" for row in result["rows"] if "iqm" in row
    ]
    seeds = " to ".join(map(str, sorted({row["seeds"] for row in result["rows"]})))
    about = f"{seeds} seeds, 95 % intervals over them." if seeds else ""
    scores = f" Normalised scores, 0 the best baseline, 1 the bound: {', '.join(said)}." if said else ""
    return [*lines, "", about + scores]


def _decimals(score: float) -> int:
    """Decimals that show three digits of a score, three at least."""
    return max(3, 2 - math.floor(math.log10(abs(score)))) if score else 3


def _with_interval(row: Row, digits: int) -> str:
    interval = _interval(row["test_ci95"], digits)
    return f"{row['test']:.{digits}f}" + (f" ({interval})" if interval else "")


def _unusual(settings: Row) -> list[str]:
    said = [f"{key} {', '.join(map(str, values))}" for key, values in settings.items() if values]
    return [f"**Not the usual settings: {'; '.join(said)}.**", ""] if said else []


def _learners(rows: list[Row]) -> list[str]:
    if not rows:
        return []
    return [
        "Normalised score: 0 is the baseline that is best on validation, 1 the bound, interquartile mean over seeds "
        "and tasks, 95 % by a bootstrap that draws the seeds of each split, too narrow for a few seeds. Only tasks "
        "with a bound above that baseline have one. Improvement: probability that a training scores more than that "
        "baseline, over all tasks. Tasks of one unit count as one, by their mean. All policies meet the same test "
        "episodes; intervals are over trainings alone, not over episodes.", "",
        *markdown_header("learner", "normalised", "95 %", "units, seeds", "improvement on the baseline",
                         "on other learners"),
        *(
            markdown_row(
                row["policy"], f"{row['iqm']:+.3f}" if "iqm" in row else "no bound", _interval(row.get("iqm_ci95"), 3),
                f"{len(row['scored'])} of {row['of']}, {row['seeds']}", _share(row["over_baseline"]),
                ", ".join(f"{other} {_share(share)}" for other, share in row["over"].items()),
            )
            for row in rows
        ), "",
        "Training until validation was above the best baseline's, medians of the seeds that got there, without the "
        "looking; wall seconds beside whatever else the machine ran.", "",
        *markdown_header("learner", "split", "seeds that got there", "steps", "CPU s", "wall s", "CPU s of the whole"),
        *(
            markdown_row(
                row["policy"], each["split"], f"{each['seeds']} of {each['of']}",
                *((f"{each['steps']:,.0f}", f"{each['cpu_s']:.1f}", f"{each['wall_s']:.1f}") if each["seeds"]
                  else ("never", "", "")),
                f"{each['whole_cpu_s']:.1f}",
            )
            for row in rows for each in row["beats"]
        ), "",
    ]  # fmt: skip


def plot(frame: pd.DataFrame, result: Row, out: Path) -> list[str]:
    """Plot scores.png, and curves.png if learners were trained."""
    names = []
    learned = frame[frame["curve"].notna()] if "curve" in frame else frame[:0]
    if len(learned):
        _curves(learned, result).savefig(out / "curves.png", dpi=110)
        names.append("curves.png")
    _scores(result).savefig(out / "scores.png", dpi=110)
    return [*names, "scores.png"]


def _curves(learned: pd.DataFrame, result: Row) -> Figure:
    """Plot validation scores over steps (mean and range over seeds) and the best baseline."""
    splits = list(dict.fromkeys(learned["split"]))
    figure = Figure((5 * len(splits), 4), layout="constrained")
    for panel, split in zip(figure.subplots(1, len(splits), squeeze=False)[0], splits, strict=True):
        for number, (name, part) in enumerate(learned[learned["split"] == split].groupby("setup", sort=False)):
            steps = [[point["steps"] for point in curve] for curve in part["curve"]]
            means = [[point["validation"] for point in curve] for curve in part["curve"]]
            most = min(map(len, steps))
            table = np.array([each[:most] for each in means])
            panel.plot(steps[0][:most], table.mean(0), f"C{number}", label=name)
            panel.fill_between(steps[0][:most], table.min(0), table.max(0), color=f"C{number}", alpha=0.15, lw=0)
        targets = {each["target"] for row in result["rows"] for each in row["beats"] if each["split"] == split}
        for target in targets:
            panel.axhline(target, color="grey", ls="--", label="best baseline")
        panel.set(title=split, xlabel="steps", ylabel="validation score")
        panel.locator_params(axis="x", nbins=5)
        panel.grid(alpha=0.3)
        panel.legend(fontsize=8)
    return figure


def _scores(result: Row) -> Figure:
    """Plot test scores of all policies per task, best first; an arrow marks scores outside the axis."""
    tasks = result["tasks"]
    columns = min(4, len(tasks))
    lines = -(-len(tasks) // columns)
    most = max(len(task["policies"]) for task in tasks)
    figure = Figure((4.6 * columns, (0.22 * most + 1) * lines), layout="constrained")
    panels = list(figure.subplots(lines, columns, squeeze=False).flat)
    for panel, task in zip(panels, tasks, strict=False):
        rows = sorted(task["policies"], key=lambda row: row["test"])
        ends = [row["test"] for row in rows[len(rows) // 2 :]]
        ends += [end for row in rows if row["kind"] != "baseline" for end in (row["test"], *row["test_ci95"])]
        margin = 0.08 * (np.nanmax(ends) - np.nanmin(ends)) or 0.1
        left = np.nanmin(ends) - margin
        for place, row in enumerate(rows):
            panel.plot(row["test_ci95"], [place] * 2, color=COLOURS[row["kind"]])
            marker = "o" if row["test"] >= left else "<"  # outside the axis
            panel.plot(max(row["test"], left), place, marker, ms=4, color=COLOURS[row["kind"]], clip_on=False, zorder=5)
        panel.set(xlim=(left, np.nanmax(ends) + margin), yticks=range(len(rows)), xlabel="test score")
        panel.set_title(task["task"], loc="right")  # above the names of the policies, too
        panel.set_yticklabels([row["policy"] for row in rows], fontsize=7)
        panel.locator_params(axis="x", nbins=4)
        panel.tick_params(axis="x", labelsize=8)  # long numbers stay apart
        panel.grid(alpha=0.3)
    for panel in panels[len(tasks) :]:
        panel.axis("off")
    return figure


def _interval(ends: tuple[float | None, float | None] | None, digits: int) -> str:
    """Format an interval; a single seed has none (NaN, or None in a file)."""
    return (
        "" if ends is None or ends[0] is None or np.isnan(ends[0]) else f"{ends[0]:.{digits}f} .. {ends[1]:.{digits}f}"
    )


def _over(row: Row) -> str:
    if "over" not in row:
        return ""
    interval = _interval(row["over_ci95"], 4)
    return f"{row['over']:+.4f}" + (f" ({interval})" if interval else "")


def _share(value: float | None) -> str:
    return "" if value is None else f"{value:.0%}"
