"""What does a training cost, and what does watching it cost? Reports of a monitor's logs, and pairs with and without.

A training of the reference MoE is monitored at every batch; its logs are drawn, normalised and summed up. Then the same
training runs in interleaved pairs, with the monitor and without.
"""

from __future__ import annotations

import json
import shutil
import tempfile
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from benchmarks import runs
from benchmarks.experiments import cost_report
from benchmarks.references import SETTINGS
from benchmarks.statistics import median_interval
from cost.files import write_text
from cost.monitor import Monitor
from cost.profile import Profile
from cost.timing import torch_threads

if TYPE_CHECKING:
    from experts.data import Dataset

EVERY = (10, 1)
BATCH_SIZE = 128
Result = dict[str, Any]


def run(
    data: str,
    epochs: int,
    pairs: int,
    out: Path,
    seed: int = 0,
    add_task: Callable[[str], Callable[[float], object]] = lambda description: lambda share: None,
) -> Result:
    """Monitor a training and pair it; writes report.md, results.json, four PNGs and the logs into `out`."""
    from experts.data import load

    source = load(data)
    report_training, report_pairs = add_task(f"training on {data}, monitored"), add_task(f"{pairs} pairs")
    logs = out / "monitor"
    shutil.rmtree(logs, ignore_errors=True)
    with torch_threads(1):
        train(source, epochs, seed, logs, every=1, validate=True, progress=report_training)
        overhead = pair(source, max(1, epochs // 2), pairs, seed, report_pairs)
    settings = {"data": data, "epochs": epochs, "pairs": pairs, "seed": seed, "batch_size": BATCH_SIZE}
    return write(logs, out, {"settings": settings, "overhead": overhead, "look_up": look_up()})


def write(logs: Path, out: Path, more: Result) -> Result:
    """The report of a monitor's folder; `more` goes into results.json."""
    result = cost_report.analyse(logs) | more | runs.provenance()
    out.mkdir(parents=True, exist_ok=True)
    cost_report.plot(logs, result, out)
    write_text(out / "results.json", json.dumps(result, indent=1))
    write_text(out / "report.md", cost_report.markdown(result))
    return result


def train(
    source: Dataset,
    epochs: int,
    seed: int,
    logs: Path,
    every: int | None,
    validate: bool = False,
    progress: Callable[[float], object] = lambda share: None,
) -> tuple[float, float]:
    """Train the reference MoE's gate and experts by cross-entropy, monitored unless `every` is None; returns the wall
    time and the process's CPU time in s, from before the monitor is made until it has closed."""
    import torch
    import torch.nn.functional as F

    from experts.model import MoEClassifier

    x, y = (torch.from_numpy(part) for part in source["train"])
    held_out = [torch.from_numpy(part) for part in source["validation"]]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = MoEClassifier(x.shape[1], int(y.max()) + 1, widths=SETTINGS[source.name].widths)
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    wall, cpu = time.perf_counter(), time.process_time()
    with Monitor(model, optimizer, every, logs) if every else nullcontext() as monitor:
        for epoch in range(epochs):
            for rows in torch.randperm(len(x), generator=generator).split(BATCH_SIZE):
                logits = model(x[rows])
                loss = F.cross_entropy(logits, y[rows])
                optimizer.zero_grad()
                loss.backward()
                if monitor:
                    monitor.record(loss=loss)
                optimizer.step()
            if monitor:
                monitor.end_epoch(**({"validation_accuracy": _accuracy(model, *held_out)} if validate else {}))
            progress((epoch + 1) / epochs)
    return time.perf_counter() - wall, time.process_time() - cpu


def pair(
    source: Dataset, epochs: int, pairs: int, seed: int, progress: Callable[[float], object]
) -> list[dict[str, Any]]:
    """The same training with and without the monitor, in turns; medians of the slow-down with 95 % intervals."""
    slower: dict[int, list[list[float]]] = {every: [] for every in EVERY}
    with tempfile.TemporaryDirectory() as folder:
        for number in range(pairs):
            for every, found in slower.items():
                logs = Path(folder) / f"{every}-{number}"
                order = (every, None) if number % 2 else (None, every)
                times = {each: np.array(train(source, epochs, seed, logs, each)) for each in order}
                found.append((times[every] / times[None] - 1).tolist())
            progress((number + 1) / pairs)
    rows = []
    for every, found in slower.items():
        for clock, values in zip(("wall", "CPU"), np.array(found).reshape(-1, 2).T, strict=True):
            if len(values):
                row = {"every": every, "clock": clock, "pairs": pairs, "median": float(np.median(values))}
                rows.append(row | {"ci95": list(median_interval(values)), "values": values.tolist()})
    return rows


def look_up(repeats: int = 100_000) -> dict[str, float]:
    """Seconds that the look-up of a profiled cost takes: by name in a profile, and in a step of MoERouting-v0."""
    import timeit

    import gymnasium

    from cost.profile import parse
    from experts import bundle as bundles

    profile: Profile = parse(bundles.load("fashion-mnist").profile, "fashion-mnist")
    env: Any = gymnasium.make("moe_envs:MoERouting-v0").unwrapped
    env.reset(seed=0)
    env.step(0)
    moves = env._moves
    (move,) = moves

    def best(code: Callable[[], object]) -> float:
        return min(timeit.repeat(code, number=repeats, repeat=5)) / repeats

    empty = best(lambda: None)
    return {
        "profile.cost": best(lambda: profile.cost("expert 0", 7)) - empty,
        "in a step": best(lambda: moves.get(move)) - empty,
    }


def _accuracy(model: Any, x: Any, y: Any) -> float:
    import torch

    model.eval()
    with torch.inference_mode():
        accuracy = float((model(x).argmax(1) == y).float().mean())
    model.train()
    return accuracy
