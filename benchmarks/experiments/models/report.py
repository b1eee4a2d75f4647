"""Report of the experiment `models`: Markdown and plots."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import ScalarFormatter

from benchmarks.experiments.models.corruptions import KINDS
from benchmarks.results.tables import markdown_header as header
from benchmarks.results.tables import markdown_row as cells

Row = dict[str, Any]
COSTS = {  # label and unit factor
    "batch_ms": ("time of a batch of 256 [ms]", 1),
    "energy_j": ("energy of a batch of 256 [mJ]", 1000),
}


def text(result: Row) -> str:
    """The report as Markdown."""
    rows = [row for row in result["rows"] if "accuracy" in row]
    if not rows:
        return f"# Models on {result['data']}\n\nNo run on clean images is there yet."
    seeds, source = max(row["seeds"] for row in rows), rows[0]["energy_source"]
    lines = [
        f"# Models on {result['data']}", "",
        f"Means of {seeds} seeds; each trains its own models. 95 % intervals are Student's t over seeds.", "",
        "## Clean test images", "",
        *header("setup", "top-1", "95 %", f"points over {rows[0]['setup']}, paired", "top-5", "loss",
                "experts per input", "parameters", "kB", "ms", "P95", "fastest with", "mJ", "thriftiest with",
                "peak MB", "noisy"),
        *(
            cells(row["setup"], f"{row['accuracy']:.2%}", _interval(row["accuracy_ci95"]), _points(row),
                 f"{row['top5']:.2%}", f"{row['loss']:.3f}", f"{row['experts_per_input']:.2f}",
                 f"{row['parameters']:,.0f}", f"{row['bytes'] / 1000:.1f}", f"{row['batch_ms']:.2f}",
                 f"{row['batch_p95_ms']:.2f}", row["fastest"],
                 f"{1000 * row['energy_j']:.3f}", row["thriftiest"], f"{row['memory_bytes'] / 1e6:.2f}",
                 f"{row['noisy']} of {row['runs']}")
            for row in rows
        ), "",
        f"Time is the median of 40 batches of 256 after two that do not count, energy ({source}) and peak memory are "
        "of one; medians over all runs of a setup, of which noisy are those whose P95 is above twice the median. Each "
        "cost is that of the cheaper of two ways to the same logits: all experts as two products, or the chosen "
        "experts alone, each on its inputs. Other runs may have shared the machine. Adam trains all models but those "
        "that AdamW is said of. Policies have learned from labels that the other setups do not see: the RL router's "
        "from those of `rl_train`, MetaOpt's from some of `rl_train` and of validation, which it also sees while it "
        "trains a model.", "",
        "## Calibration", "",
        "Of the likeliest class, 15 bins; the temperature is fitted on validation, to how sure the likeliest class is. "
        "Asked for: 20 % less where it is "
        "above 0.02.", "",
        *header("setup", "ECE", "with temperature", "less by", "MCE", "with temperature", "entropy", "top-2 gap"),
        *(
            cells(row["setup"], f"{row['ece']:.4f}", f"{row['ece_calibrated']:.4f}", f"{row['ece_down']:.0%}",
                 f"{row['mce']:.3f}", f"{row['mce_calibrated']:.3f}", f"{row['entropy']:.3f}", f"{row['top2_gap']:.3f}")
            for row in rows
        ), "",
        *_robustness([row for row in rows if "curves" in row]),
        *_recommendations(result, rows),
    ]  # fmt: skip
    return "\n".join(lines)


def _points(row: Row) -> str:
    if "points" not in row:
        return ""
    low, high = row["points_ci95"]
    return f"{row['points']:+.2f}" + ("" if np.isnan(low) else f" ({low:+.2f} .. {high:+.2f})")


def _robustness(rows: list[Row]) -> list[str]:
    if not rows:
        return []
    kinds = [kind for kind in KINDS if any(kind in row["curves"] for row in rows)]
    return [
        "## Corrupted test images", "",
        "Points of accuracy that corruption costs at level 3, mean and worst kind (less than 20 asked for). Relative: "
        "share of the clean accuracy that is left, over all levels. Stable: share of the inputs whose class stays. "
        "Spread: variance over seeds, of that on clean images (at most 1.5 asked for). Rank: mean over kinds, levels "
        "and seeds.", "",
        *header("setup", "corrupted", "95 %", "drop", "worst", "relative", "stable", "spread", "ECE",
                "with temperature", "rank"),
        *(
            cells(row["setup"], f"{row['corrupted']:.2%}", _interval(row["corrupted_ci95"]),
                 f"{row.get('drop', np.nan):.1f}", f"{row.get('worst_drop', np.nan):.1f}, {row.get('worst_kind', '')}",
                 f"{row['relative_robustness']:.3f}", f"{row['stability']:.1%}",
                 f"{row['spread']:.2f}" if "spread" in row else "",
                 f"{row['ece_corrupted']:.3f}", f"{row['ece_corrupted_calibrated']:.3f}", f"{row['rank']:.2f}")
            for row in sorted(rows, key=lambda row: row["rank"])
        ), "",
        "Accuracy at the highest level, by kind:", "",
        *header("setup", *kinds),
        *(
            cells(row["setup"], *(f"{row['curves'][kind][-1]['accuracy']:.1%}" if kind in row["curves"] else ""
                                 for kind in kinds))
            for row in rows
        ), "",
    ]  # fmt: skip


def _recommendations(result: Row, rows: list[Row]) -> list[str]:
    by_name = {row["setup"]: row for row in rows}
    lines = [
        "## What to take", "",
        "Of the front of accuracy on validation against cost: the most accurate, the cheapest, and the one nearest to "
        "both; costs within 5 % are ties; accuracies here are on test; `matrix.json` lies beside this page. Validation "
        "flatters the MetaOpt policy, which has seen it. What is compressed is smaller on disk and runs in float32.",
        "",
        *header("cost", "wanted", "setup", "accuracy", "cost", "command"),
    ]  # fmt: skip
    for cost, (label, scale) in COSTS.items():
        for wanted, name in result[f"recommended_{cost}"].items():
            row = by_name[name]
            command = f'`moe-benchmark run matrix.json --only "{name}" --out DIR`'
            figures = f"{row['accuracy']:.2%}", f"{scale * row[cost]:.3g}"
            lines.append(cells(label, wanted, name, *figures, command))
    volumes = {cost: result[f"hypervolume_{cost}"] for cost in COSTS}
    names = volumes["batch_ms"]
    worst = (f"({result['worst'][cost][0] * scale:g}, 0)" for cost, (_, scale) in COSTS.items())
    lines += ["", f"Hypervolume of (cost in ms or J, accuracy), reference points {' ms and '.join(worst)} mJ:", "",
              *header("setup", "time", "energy"),
              *(cells(name, *(f"{volumes[cost][name]:.4g}" for cost in COSTS)) for name in names), ""]  # fmt: skip
    return lines


def plot(frame: pd.DataFrame, result: Row, out: Path) -> list[str]:
    """Plot robustness.png, reliability.png and pareto.png if rows for them exist."""
    rows = [row for row in result["rows"] if "accuracy" in row]
    if not rows:
        return []
    drawn: dict[str, Callable[[list[Row]], Figure]] = {"reliability.png": _reliability}
    if any("curves" in row for row in rows):
        drawn = {"robustness.png": _curves, **drawn}
    for name, draw in drawn.items():
        draw(rows).savefig(out / name, dpi=110)
    _fronts(result, rows).savefig(out / "pareto.png", dpi=110)
    return [*drawn, "pareto.png"]


def _curves(rows: list[Row]) -> Figure:
    figure = Figure((14, 6.5), layout="constrained")
    panels: list[Axes] = list(figure.subplots(2, 4).flat)
    kinds = [kind for kind in KINDS if any(kind in row.get("curves", {}) for row in rows)]
    for panel, kind in zip(panels, kinds, strict=False):
        for number, row in enumerate(rows):
            points = row.get("curves", {}).get(kind, [])
            levels = [0, *(each["level"] for each in points)]
            means = [row["accuracy"], *(each["accuracy"] for each in points)]
            low, high = np.array([row["accuracy_ci95"], *(each["ci95"] for each in points)]).clip(0, 1).T
            panel.plot(levels, 100 * np.array(means), f"C{number}", label=row["setup"], marker="o", ms=3)
            panel.fill_between(levels, 100 * low, 100 * high, color=f"C{number}", alpha=0.12, lw=0)
        panel.set(title=kind, xlabel="level", ylabel="test accuracy [%]", xticks=range(6))
        panel.grid(alpha=0.3)
    for panel in panels[len(kinds) :]:
        panel.axis("off")
    panels[-1].legend(*panels[0].get_legend_handles_labels(), loc="center", title="95 % intervals over seeds")
    return figure


def _reliability(rows: list[Row]) -> Figure:
    columns = min(4, len(rows))
    figure = Figure((3.6 * columns, 3.5 * -(-len(rows) // columns)), layout="constrained")
    panels = list(figure.subplots(-(-len(rows) // columns), columns, squeeze=False).flat)
    for panel, row in zip(panels, rows, strict=False):
        panel.plot([0, 1], [0, 1], color="grey", lw=0.8, ls="--")
        for side, label in (("", "as it is"), ("_calibrated", "with temperature")):
            bins = {key: np.array(values) for key, values in row[f"reliability{side}"].items()}
            many = bins["counts"] >= 20
            panel.plot(bins["confidence"][many], bins["right"][many], marker="o", ms=3, label=label)
        panel.set(xlabel="confidence", ylabel="accuracy", xlim=(0, 1), ylim=(0, 1.02))
        errors = f"{row['ece']:.3f}, with temperature {row['ece_calibrated']:.3f}"
        panel.set_title(f"{row['setup']}\nECE {errors}", fontsize=9)
    for panel in panels[len(rows) :]:
        panel.axis("off")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=2)
    return figure


def _fronts(result: Row, rows: list[Row]) -> Figure:
    figure = Figure((12, 4.8), layout="constrained")
    for panel, (cost, (label, scale)) in zip(figure.subplots(1, 2), COSTS.items(), strict=True):
        for number, row in enumerate(rows):
            low, high = np.clip(row["accuracy_ci95"], 0, 1)
            on = row["setup"] in result[f"front_{cost}"]
            panel.plot([scale * row[cost]] * 2, [100 * low, 100 * high], f"C{number}", lw=1)
            panel.plot(scale * row[cost], 100 * row["accuracy"], f"C{number}", marker="D" if on else "o", ls="",
                       ms=8 if on else 5, label=row["setup"])  # fmt: skip
        front = sorted((row for row in rows if row["setup"] in result[f"front_{cost}"]), key=lambda row: row[cost])
        corners = np.array([[scale * row[cost], 100 * row["accuracy"]] for row in front])
        panel.step(*corners.T, where="post", color="grey", lw=0.8, zorder=0)
        panel.set(xlabel=label, ylabel="test accuracy [%]", xscale="log", title="diamonds: Pareto front")
        panel.xaxis.set_major_formatter(ScalarFormatter())
        panel.xaxis.set_minor_formatter(ScalarFormatter())
        panel.grid(alpha=0.3)
    figure.legend(*panel.get_legend_handles_labels(), loc="outside right center")
    return figure


def _interval(ends: tuple[float, float]) -> str:
    low, high = ends
    return "" if np.isnan(low) else f"{100 * low:.2f} .. {100 * high:.2f}"
