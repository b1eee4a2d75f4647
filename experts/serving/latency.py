"""How fast an exported model answers, by runtime, batch and threads, and what the runtime made of its graph."""

from __future__ import annotations

import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from cost.timing import torch_threads
from experts.serving.runners import Run, Source, onnx_runner, torch_runner

BATCHES, THREADS = (1, 2, 4, 8, 16, 32, 64), (1, 2)
WARM_UP, REPEATS = 10, 50


def compare(
    source: Source, graphs: dict[str, bytes], batches: Sequence[int] = BATCHES, threads: Sequence[int] = THREADS,
    repeats: int = REPEATS,
) -> list[dict[str, Any]]:  # fmt: skip
    """Median and 95th percentile in seconds of PyTorch ("torch") and of ONNX `graphs` by name, for each batch, number
    of threads of a product and, of onnxruntime, of products at once."""
    found = []
    for count in threads:
        with torch_threads(count):
            found += _rows("torch", torch_runner(source.module), source, batches, repeats, threads=count, inter_op=1)
        for name, raw in graphs.items():
            for inter in sorted({1, count}):
                run = onnx_runner(raw, count, inter)
                found += _rows(name, run, source, batches, repeats, threads=count, inter_op=inter)
    return found


def _rows(
    name: str, run: Run, source: Source, batches: Iterable[int], repeats: int, **about: int
) -> list[dict[str, Any]]:
    return [
        {"runtime": name, **about, "batch": batch, **timed(run, source, batch, repeats)}
        for batch in ([source.batch] if source.batch else batches)
    ]


def timed(run: Run, source: Source, batch: int, repeats: int = REPEATS) -> dict[str, float]:
    """Median and 95th percentile of a runner's seconds, after ten runs."""
    inputs = np.take(source.examples, np.arange(batch), axis=0, mode="wrap")
    seconds = []
    for _ in range(WARM_UP + repeats):
        begun = time.perf_counter()
        run(inputs)
        seconds.append(time.perf_counter() - begun)
    middle, high = np.percentile(seconds[WARM_UP:], [50, 95]).tolist()
    return {"median": middle, "p95": high}


def recommended(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """What to run it with: the runtime and threads of the lowest median for one input, and those that answer most
    inputs a second, with their batch."""
    keys = "runtime", "threads", "inter_op", "batch", "median"
    one = min(
        (row for row in rows if row["batch"] == min(each["batch"] for each in rows)), key=lambda row: row["median"]
    )
    most = max(rows, key=lambda row: row["batch"] / row["median"])
    return {"single": {key: one[key] for key in keys}, "throughput": {key: most[key] for key in keys}}


def fusion(raw: bytes) -> dict[str, dict[str, int]]:
    """Operators of an ONNX graph, and what onnxruntime made of them, counted by name."""
    import onnx
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    with tempfile.TemporaryDirectory(prefix="moe-fusion-") as folder:
        options.optimized_model_filepath = str(Path(folder) / "optimized.onnx")
        onnxruntime.InferenceSession(raw, options, providers=["CPUExecutionProvider"])
        after = onnx.load(options.optimized_model_filepath)
    return {
        name: dict(sorted(Counter(node.op_type for node in model.graph.node).items()))
        for name, model in (("exported", onnx.load_from_string(raw)), ("optimized", after))
    }
