"""Report of monitor logs: costs per epoch, cost against accuracy, normalised costs, and alerts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.results.tables import markdown as markdown_table
from benchmarks.results.tables import records
from cost.files import write_text
from cost.machine import provenance
from cost.monitor import SCHEMA
from cost.normalize import BOUND, METHODS, CostNormalizer

COSTS = {"total": "time of a batch", "rss": "memory of the process", "energy": "energy of a batch"}
ACCURACIES = ("validation_accuracy", "test_accuracy", "accuracy")
UPDATE = 64  # batches per update of the normaliser
SLOW_EPOCH, GROWTH, LOST, TAIL = 1.5, 0.2, 0.02, 2.0
Result = dict[str, Any]


class LogsError(ValueError):
    """A folder has no monitor logs, or logs that cannot be reported."""


def read(logs: Path) -> tuple[pd.DataFrame, pd.DataFrame, dict[str, Any]]:
    """Read batches, epochs and `monitor.json`; raises `LogsError` naming the file."""
    try:
        about = json.loads((logs / "monitor.json").read_text())
        if about["schema"] != SCHEMA:
            raise LogsError(f"{logs}/monitor.json has schema {about['schema']}; this moe-envs reads {SCHEMA}")
        batches, epochs = (pd.read_csv(logs / name, on_bad_lines="skip") for name in ("batches.csv", "epochs.csv"))
        batches["total"] = pd.to_numeric(batches["total"], errors="coerce")
        batches = batches.dropna(subset=list(COSTS))  # the last line is cut if the process was killed
        (
            epochs[["seconds", "total", "rss", "energy", "finite"]],
            about["energy_source"],
        )  # raises KeyError if a column is missing
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        reason = str(error).splitlines()[0]
        raise LogsError(
            f"{logs} holds no whole logs of a monitor: {reason}; cost.monitor.Monitor writes them"
        ) from error
    if len(batches) < 2:
        raise LogsError(f"{logs}/batches.csv has {len(batches)} measured batches; a report needs 2")
    return batches, epochs, about


def analyse(logs: Path) -> Result:
    """Results for the report."""
    batches, epochs, about = read(logs)
    times = batches["total"]
    result: Result = {
        "energy_source": about["energy_source"],
        "logged_on": about["fingerprint"],
        "batch": {"median": times.median(), "p95": times.quantile(0.95), "measured": len(batches)},
        "accuracy_is": next((name for name in ACCURACIES if name in epochs), None),
        "normalised": _normalised(batches),
        "alerts": alerts(batches, epochs),
    }
    if result["accuracy_is"]:
        epochs["accuracy_per_ms"] = epochs[result["accuracy_is"]] / (epochs["total"] * 1e3)
        epochs["accuracy_per_joule"] = epochs[result["accuracy_is"]] / epochs["energy"]
        result["correlation"] = {
            cost: epochs[[result["accuracy_is"]]].corrwith(epochs[cost].cumsum()).iloc[0]
            for cost in ("seconds", "energy")
        }
    result["epochs"] = epochs.astype(object).where(epochs.notna(), None).to_dict("records")
    return json.loads(json.dumps(result), parse_constant=lambda name: None)


def alerts(batches: pd.DataFrame, epochs: pd.DataFrame) -> list[str]:
    """Alerts, each with its value and its bound."""
    found = []
    slowest, typical = epochs["seconds"].max(), epochs["seconds"].median()
    if slowest > SLOW_EPOCH * typical:
        where = int(epochs["seconds"].to_numpy().argmax())
        found.append(f"epoch {where} took {slowest / typical:.1f} times the median epoch (bound {SLOW_EPOCH})")
    ratio = batches["total"].quantile(0.95) / batches["total"].median()
    if ratio > TAIL:
        found.append(f"P95 of a batch's time is {ratio:.1f} times its median (bound {TAIL})")
    memory = epochs["rss"].dropna()
    if len(memory) > 1 and memory.iloc[-1] > (1 + GROWTH) * memory.iloc[0]:
        found.append(f"the process grew by {memory.iloc[-1] / memory.iloc[0] - 1:.0%} (bound {GROWTH:.0%})")
    for name in (each for each in ACCURACIES if each in epochs):
        lost = epochs[name].max() - epochs[name].iloc[-1]
        if lost > LOST:
            found.append(f"{name} ended {lost:.3f} below its best (bound {LOST})")
    for epoch in epochs["epoch"][~epochs["finite"].astype(bool)]:
        found.append(f"a loss or accuracy of epoch {epoch} is not finite")
    return found


def normalise(batches: pd.DataFrame, method: str) -> np.ndarray:
    """Normalise the logged costs `[n, 3]` while updating the normaliser every `UPDATE` batches."""
    normalizer = CostNormalizer(list(COSTS), method)
    costs = batches[list(COSTS)].to_numpy(dtype=np.float64)
    return np.concatenate([normalizer(costs[start : start + UPDATE]) for start in range(0, len(costs), UPDATE)])


def write(logs: Path, out: Path) -> Result:
    """Write report.md, results.json and plots for a monitor folder to `out`."""
    result = analyse(logs)
    out.mkdir(parents=True, exist_ok=True)
    pictures = "\n".join(f"![{name}]({name})\n" for name in plot(logs, result, out))
    write_text(out / "results.json", json.dumps(result | provenance(), indent=1))
    write_text(out / "report.md", f"{markdown(result)}\n{pictures}")
    return result


def tables(result: Result) -> dict[str, list[dict[str, Any]]]:
    """The tables of the report by title."""
    found: dict[str, list[dict[str, Any]]] = {}
    if "epochs" in result:
        epochs = pd.DataFrame(result["epochs"])
        columns = {
            "epoch": ("epoch", 1), "seconds": ("time, s", 1), "total": ("batch, ms", 1e3), "rss": ("rss, MiB", 2**-20),
            "energy": ("energy, mJ", 1e3), "loss": ("loss", 1), result["accuracy_is"]: ("accuracy", 1),
            "accuracy_per_ms": ("acc/ms", 1.0), "accuracy_per_joule": ("acc/J", 1.0),
        }  # fmt: skip
        shown = {title: epochs[name] * scale for name, (title, scale) in columns.items() if name in epochs}
        found = {"By epoch": records(pd.DataFrame(shown)), "Normalised costs": result["normalised"]}
    found["Slow-down by the monitor"] = [
        {
            "every": row["every"], "clock": row["clock"], "pairs": row["pairs"],
            "median": f"{row['median']:+.2%}", "95 %": f"{row['ci95'][0]:+.2%} .. {row['ci95'][1]:+.2%}",
            "µs per batch": row["seconds_per_batch"] * 1e6,
        }
        for row in result.get("overhead", [])
    ]  # fmt: skip
    found["Look-up of a profiled cost"] = [
        {"look-up": name, "µs": seconds * 1e6} for name, seconds in result.get("look_up", {}).items()
    ]
    return found


def markdown(result: Result) -> str:
    """The report as Markdown."""
    lines = ["# What the training cost", ""]
    if "batch" in result:
        batch = {name: f"{value * 1e3:.3f} ms" for name, value in result["batch"].items() if name != "measured"}
        lines += [f"Energy: {result['energy_source']}. A batch took {batch['median']} (median of "
                  f"{result['batch']['measured']}), P95 {batch['p95']}.", ""]  # fmt: skip
    lines += [f"**Alert:** {each}.\n" for each in result.get("alerts", [])]
    if "correlation" in result:
        found = {
            cost: "undefined" if value is None else f"{value:+.2f}" for cost, value in result["correlation"].items()
        }
        with_costs = ", ".join(f"{cost} {value}" for cost, value in found.items())
        lines += [f"Correlation of {result['accuracy_is']} with the cost spent so far: {with_costs}.", ""]
    if "attach" in result:
        lines += [f"Making and closing a monitor, and the first batches: {result['attach'] * 1e3:.1f} ms, once.", ""]
    for title, rows in tables(result).items():
        lines += markdown_table(title, rows) if rows else []
    return "\n".join(lines)


def plot(logs: Path | None, result: Result, out: Path) -> list[str]:
    """Plot epochs.png, efficiency.png, distributions.png and overhead.png if data exist; returns the file names."""
    names = []
    if logs is not None and "epochs" in result:
        epochs = pd.DataFrame(result["epochs"])
        _draw_epochs(epochs, result, out / "epochs.png")
        _draw_distributions(read(logs)[0], out / "distributions.png")
        names += ["epochs.png", "distributions.png"]
        if result["accuracy_is"]:
            _draw_efficiency(epochs, result, out / "efficiency.png")
            names.append("efficiency.png")
    if result.get("overhead"):
        _draw_overhead(result["overhead"], out / "overhead.png")
        names.append("overhead.png")
    return names


def _normalised(batches: pd.DataFrame) -> list[dict[str, Any]]:
    costs = batches[list(COSTS)].to_numpy(dtype=np.float64)
    spread = costs.std(0)
    raw = np.abs(costs - costs.mean(0)) / np.where(spread > 0, spread, 1)
    rows = [{"method": "none, in sigmas", "beyond 3": int((raw > BOUND).sum()), "largest": float(raw.max())}]
    for method in METHODS:
        values = np.abs(normalise(batches, method))
        at_bound = float((values == BOUND).mean())
        rows.append({"method": method, "beyond 3": int((values > BOUND).sum()), "largest": float(values.max())})
        rows[-1]["held at 3"] = at_bound
    return rows


def _draw_epochs(epochs: pd.DataFrame, result: Result, path: Path) -> None:
    figure = Figure((13, 3.4), layout="constrained")
    axes = figure.subplots(1, 4)
    for panel, (name, label, scale) in zip(
        axes,
        [
            ("seconds", "time of the epoch, s", 1),
            ("rss", "memory of the process, MiB", 2**-20),
            ("energy", "energy, J", 1),
        ],
        strict=False,
    ):
        panel.plot(epochs["epoch"], epochs[name] * scale, "o-")
        panel.set(xlabel="epoch", title=label, ylim=(0, 1.1 * epochs[name].max() * scale))
    axes[2].set_title("energy, J" + (" (proxy)" if result["energy_source"].startswith("proxy") else ""))
    for name in ("loss", result["accuracy_is"]):
        if name in epochs:
            axes[3].plot(epochs["epoch"], epochs[name], "o-", label=name)
    axes[3].set(xlabel="epoch", title="loss and accuracy")
    axes[3].legend()
    figure.savefig(path, dpi=120)


def _draw_efficiency(epochs: pd.DataFrame, result: Result, path: Path) -> None:
    figure = Figure((12, 3.6), layout="constrained")
    axes = figure.subplots(1, 3)
    accuracy = epochs[result["accuracy_is"]]
    for panel, cost, label in ((axes[0], "seconds", "time spent, s"), (axes[1], "energy", "energy spent, J")):
        panel.plot(epochs[cost].cumsum(), accuracy, "o-")
        panel.set(xlabel=label, ylabel=result["accuracy_is"])
    axes[2].plot(epochs["epoch"], epochs["accuracy_per_ms"], "o-", label="accuracy per ms of a batch")
    axes[2].legend(loc="upper left")
    axes[2].set(xlabel="epoch")
    twin = axes[2].twinx()
    twin.plot(
        epochs["epoch"], epochs["accuracy_per_joule"], "s--", color="tab:orange", label="accuracy per J of an epoch"
    )
    twin.legend(loc="lower right")
    figure.savefig(path, dpi=120)


def _draw_distributions(batches: pd.DataFrame, path: Path) -> None:
    figure = Figure((13, 7), layout="constrained")
    axes = figure.subplots(len(COSTS), 1 + len(METHODS))
    values = {"as measured": batches[list(COSTS)].to_numpy()} | {
        method: normalise(batches, method) for method in METHODS
    }
    for column, (method, costs) in enumerate(values.items()):
        for row, label in enumerate(COSTS.values()):
            panel: Axes = axes[row, column]
            panel.hist(costs[:, row], bins=60, color="tab:blue" if column else "tab:gray")
            panel.set_yscale("log")
            panel.set_title(f"{label}, {method}", fontsize="small")
            if column:
                panel.set_xlim(-BOUND - 0.3, BOUND + 0.3)
    figure.savefig(path, dpi=120)


def _draw_overhead(overhead: list[dict[str, Any]], path: Path) -> None:
    figure = Figure((8, 3.4), layout="constrained")
    panel = figure.subplots()
    labels = [f"every {row['every']}, {row['clock']}" for row in overhead]
    for place, row in enumerate(overhead):
        panel.plot(np.array(row["values"]) * 100, np.full(len(row["values"]), place), ".", color="tab:gray", alpha=0.6)
        error = np.abs(np.array(row["ci95"])[:, None] - row["median"]) * 100
        panel.errorbar(row["median"] * 100, place, xerr=error, fmt="D", color="tab:red", capsize=4)
    panel.axvline(0, color="black", linewidth=0.8)
    panel.set_yticks(range(len(labels)), labels)
    panel.set(xlabel="overhead of the monitor [%] (grey: pairs; red: median and 95 % interval)")
    figure.savefig(path, dpi=120)
