"""How fast do exported models answer? PyTorch beside ONNX, in float32 and int8, by batch and threads.

Medians and 95th percentiles of 50 runs after ten, and what onnxruntime makes of the graph. Run it on an otherwise idle
machine.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from benchmarks.runner.setup import Arguments
from experts.serving.export import export
from experts.serving.latency import BATCHES, REPEATS, THREADS, compare, fusion, recommended

SEEDS = (0, 1, 2)  # repetitions
SETTINGS: dict[str, dict[str, Any]] = {
    name: {"model": name} for name in ("fashion-mnist", "fashion-mnist-conv", "language")
}
QUICK: dict[str, Any] = {
    "seeds": [0], "setups": {"short": {"model": "digits", "batches": [1, 4], "threads": [1], "repeats": 3}},
}  # fmt: skip
FORMS = "onnx", "onnx-int8"


class LatencySetup(Arguments):
    """A model as `moe-export` takes it; the sizes of the batches, the threads, and how often each is run."""

    model: str = "fashion-mnist"
    batches: list[int] = list(BATCHES)
    threads: list[int] = list(THREADS)
    repeats: int = REPEATS


Setup = LatencySetup


def measure(setup: LatencySetup, seed: int, split: str, folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Latencies, and operators before and after."""
    from benchmarks.cli.export import source_of

    source, graphs = source_of(setup.model), {}
    for form in FORMS:
        place = folder / f"{Path(setup.model).name}-{form}"
        export(source, place, form)  # type: ignore[arg-type]
        graphs[form] = (place / "model.onnx").read_bytes()
    rows = compare(source, graphs, setup.batches, setup.threads, setup.repeats)
    return {"operators": {form: fusion(raw) for form, raw in graphs.items()}}, {"latencies": rows}


def score(frame: pd.DataFrame) -> dict[str, Any]:
    """A table for each model: medians over the repetitions."""
    tables: dict[str, list[dict[str, Any]]] = {}
    for setup, rows in frame.groupby("setup", sort=False):
        every = pd.DataFrame([row for each in rows["latencies"] for row in each])
        keys = ["runtime", "threads", "inter_op", "batch"]
        found = every.groupby(keys, sort=False)[["median", "p95"]].median().reset_index()
        records: list[dict[str, Any]] = [
            dict(zip(found.columns.astype(str), row, strict=True)) for row in found.itertuples(index=False)
        ]
        table: dict[tuple[Any, ...], dict[str, Any]] = {}
        for each in records:
            about = {"runtime": each["runtime"], "threads": each["threads"], "inter-op": each["inter_op"]}
            cell = f"{_ms(each['median'])} ({_ms(each['p95'])})"
            table.setdefault(tuple(about.values()), about)[str(each["batch"])] = cell
        tables[str(setup)] = list(table.values())
        tables[f"{setup}: recommended"] = [{"for": what, **row} for what, row in recommended(records).items()]
        counts = rows["operators"].iloc[0]
        tables[f"{setup}: operators"] = [
            {"file": form, "graph": graph, "operators": sum(each.values()), "kinds": _named(each)}
            for form, graphs in counts.items() for graph, each in graphs.items()
        ]  # fmt: skip
    return {"tables": tables, "notes": [
        "ms for a batch of that many inputs: median (95th percentile). threads: of one product; inter-op: products at "
        "once. optimized: the graph that onnxruntime runs.",
    ]}  # fmt: skip


def _ms(seconds: float) -> str:
    return f"{1e3 * seconds:.3g}" if seconds < 0.1 else f"{1e3 * seconds:,.0f}"


def _named(counts: dict[str, int]) -> str:
    return ", ".join(f"{count} {name}" for name, count in sorted(counts.items(), key=lambda each: -each[1])[:8])


def plot(frame: pd.DataFrame, result: dict[str, Any], out: Path) -> list[str]:
    """Median against batch for each runtime with one thread."""
    import matplotlib.pyplot as plt

    groups = list(frame.groupby("setup", sort=False))
    figure, axes = plt.subplots(1, len(groups), figsize=(4 * len(groups), 3.5), layout="constrained", squeeze=False)
    for axis, (name, rows) in zip(axes[0], groups, strict=True):
        every = pd.DataFrame([row for each in rows["latencies"] for row in each])
        for runtime, part in every[(every["threads"] == 1) & (every["inter_op"] == 1)].groupby("runtime"):
            medians = part.groupby("batch")["median"].median()
            axis.plot(medians.index, 1e3 * np.asarray(medians), "o-", label=str(runtime))
        axis.set(title=str(name), xlabel="batch", ylabel="median, ms", xscale="log", yscale="log")
        axis.grid(alpha=0.3)
        axis.legend()
    figure.savefig(out / "latency.png", dpi=110)
    plt.close(figure)
    return ["latency.png"]
