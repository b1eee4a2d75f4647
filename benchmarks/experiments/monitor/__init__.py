"""Training cost per epoch, and overhead of the monitor in pairs of epochs with and without it.

A training of the reference MoE is monitored at every batch, and its logs are plotted, normalised and summarised. The
same training then runs in interleaved pairs of epochs with and without the monitor. To report your own logs, use
moe-profile logs FOLDER.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pandas as pd

from benchmarks.experiments.monitor import report
from benchmarks.results.statistics import median_interval
from benchmarks.runner.setup import Arguments
from cost.monitor import Monitor
from cost.profile import Profile
from cost.timing import torch_threads
from experts.data import load
from experts.reference_bundles import SETTINGS as REFERENCE

if TYPE_CHECKING:
    import torch

    from experts.data import Dataset

EVERY, WARM_UP = (10, 1), 20
SEEDS = (0,)
SETTINGS = {part: {"part": part} for part in ("training", "overhead", "look-up")}
QUICK = {"settings": {"data": "digits", "epochs": 2, "pairs": 2, "batch_size": 32, "warm_up": 2}}


class MonitorSetup(Arguments):
    """`epochs` of the monitored training; `pairs` of epochs with and without the monitor; `warm_up` batches before each
    timed epoch."""

    part: Literal["training", "overhead", "look-up"]
    data: Literal["fashion-mnist", "digits"] = "fashion-mnist"
    epochs: int = 20
    pairs: int = 100
    batch_size: int = 256
    warm_up: int = WARM_UP


Setup = MonitorSetup


def measure(setup: MonitorSetup, seed: int, split: str, folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Run one part of the experiment."""
    if setup.part == "look-up":
        return {}, {"look_up": look_up()}
    with torch_threads(1):
        training = Training(load(setup.data), seed, setup.batch_size)
        if setup.part == "overhead":
            return {}, pair(training, setup.pairs, setup.warm_up)
        logs = folder / f"logs-{setup.data}-{setup.epochs}-{setup.batch_size}"
        train(training, setup.epochs, logs, 1)
    return {}, {"costs": report.analyse(logs), "logs": str(logs)}


def score(frame: pd.DataFrame) -> dict[str, Any]:
    """Results for the report."""
    result: dict[str, Any] = {}
    for column in ("costs", "overhead", "attach", "look_up"):
        there = frame[column].dropna().tolist() if column in frame else []
        if there:
            result |= there[0] if column == "costs" else {column: there[0]}
    tables = {title: rows for title, rows in report.tables(result).items() if rows}
    return result | {"tables": tables, "notes": [f"Alert: {each}." for each in result.get("alerts", [])]}


def plot(frame: pd.DataFrame, result: dict[str, Any], out: Path) -> list[str]:
    """Plot the overhead, and the logs if they still exist."""
    logs = [Path(each) for each in frame["logs"].dropna().tolist()] if "logs" in frame else []
    return report.plot(logs[0] if logs and logs[0].exists() else None, result, out)


text = report.markdown


class Training:
    """Training of the reference MoE by cross-entropy on the split `train` of a data set."""

    def __init__(self, source: Dataset, seed: int, batch_size: int = 256) -> None:
        import torch

        from experts.model import MoEClassifier

        self.batch_size = batch_size
        self.inputs, self.labels = (torch.from_numpy(part) for part in source["train"])
        self.held_out = [torch.from_numpy(part) for part in source["validation"]]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            widths = REFERENCE[source.name].widths
            self.model = MoEClassifier(self.inputs.shape[1], int(self.labels.max()) + 1, widths=widths)
        self.generator = torch.Generator().manual_seed(seed)
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=1e-3)

    def epoch(self) -> list[torch.Tensor]:
        """Yield the row indices of each batch in random order."""
        import torch

        return list(torch.randperm(len(self.inputs), generator=self.generator).split(self.batch_size))

    def step(self, rows: torch.Tensor, monitor: Monitor | None = None) -> None:
        """Run one optimiser step."""
        import torch.nn.functional as F

        loss = F.cross_entropy(self.model(self.inputs[rows]), self.labels[rows])
        self.optimizer.zero_grad()
        loss.backward()
        if monitor:
            monitor.record(loss=loss)
        self.optimizer.step()

    def accuracy(self) -> float:
        """Validation accuracy."""
        import torch

        self.model.eval()
        with torch.inference_mode():
            found = float((self.model(self.held_out[0]).argmax(1) == self.held_out[1]).float().mean())
        self.model.train()
        return found


def train(training: Training, epochs: int, logs: Path, every: int) -> None:
    """Train for some epochs under a monitor, with the accuracy on validation after each."""
    with Monitor(training.model, training.optimizer, every, logs, overwrite=True) as monitor:
        for _ in range(epochs):
            for rows in training.epoch():
                training.step(rows, monitor)
            monitor.end_epoch(validation_accuracy=training.accuracy())


def pair(training: Training, pairs: int, warm_up: int = WARM_UP) -> dict[str, Any]:
    """Train with alternating epochs with and without the monitor.

    Returns median slow-downs with 95 % intervals. An epoch has full batches only and, if monitored, ends with
    `end_epoch`. One-time costs are excluded and reported as `attach`: opening and closing the monitor, and the first
    batches, one of which has its FLOPs counted.
    """
    batches = len(training.inputs) // training.batch_size
    if batches < 2:
        raise ValueError(f"{len(training.inputs)} rows make no two batches of {training.batch_size}")
    spent: dict[int, list[list[np.ndarray]]] = {every: [] for every in EVERY}
    for number in range(pairs):
        for every, found in spent.items():
            order = (every, None) if number % 2 else (None, every)
            times = {each: _epoch(training, each, warm_up) for each in order}
            found.append([times[every], times[None]])
    rows, attach = [], []
    for every, found in spent.items():
        walls, processors, outside = np.array(found).T
        attach += list(np.subtract(*outside))
        for clock, (on, off) in (("wall", walls), ("CPU", processors)):
            row = {"every": every, "clock": clock, "pairs": pairs, "median": float(np.median(on / off - 1))}
            row |= {"ci95": list(median_interval(on / off - 1)), "values": (on / off - 1).tolist()}
            rows.append(row | {"seconds_per_batch": float(np.median(on - off)) / batches})
    return {"overhead": rows, "attach": float(np.median(attach))}


def _epoch(training: Training, every: int | None, warm_up: int) -> np.ndarray:
    """Wall and CPU time in s of an epoch, monitored unless `every` is None, and the wall time before and after."""
    batches = [rows for rows in training.epoch() if len(rows) == training.batch_size]
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        begun, monitor = time.perf_counter(), None
        if every:
            monitor = stack.enter_context(Monitor(training.model, training.optimizer, every, Path(folder) / "logs"))
        for rows in batches[:warm_up]:
            training.step(rows, monitor)
        before = np.array([time.perf_counter(), time.process_time()])
        for rows in batches:
            training.step(rows, monitor)
        if monitor:
            monitor.end_epoch()
        after = np.array([time.perf_counter(), time.process_time()])
        stack.close()
    return np.array([*after - before, before[0] - begun + time.perf_counter() - after[0]])


def look_up(repeats: int = 100_000) -> dict[str, float]:
    """Seconds per look-up of a profiled cost: by name in a profile, and in a step of MoERouting-v0."""
    import timeit

    import gymnasium

    from cost.profile import parse
    from experts import bundle as bundles

    profile: Profile = parse(bundles.load("fashion-mnist").profile, "fashion-mnist")
    env: Any = gymnasium.make("moe_envs:MoERouting-v0").unwrapped
    env.reset(seed=0)
    env.step(0)
    prices = env._prices
    (key,) = prices

    def best(code: Callable[[], object]) -> float:
        return min(timeit.repeat(code, number=repeats, repeat=5)) / repeats

    empty = best(lambda: None)
    return {
        "profile.cost": best(lambda: profile.cost("expert 0", 7)) - empty,
        "in a step": best(lambda: prices.get(key)) - empty,
    }
