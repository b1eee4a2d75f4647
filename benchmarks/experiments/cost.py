"""What does a training cost, and what does watching it cost? Reports of a monitor's logs, and pairs with and without.

A training of the reference MoE is monitored at every batch; its logs are drawn, normalised and summed up. Then the same
training runs in interleaved pairs, with the monitor and without.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from benchmarks.experiments import cost_report
from benchmarks.results.statistics import median_interval
from cost.files import write_text
from cost.machine import provenance
from cost.monitor import Monitor
from cost.profile import Profile
from cost.timing import torch_threads
from experts.reference_bundles import SETTINGS

if TYPE_CHECKING:
    import torch

    from experts.data import Dataset

EVERY, WARM_UP = (10, 1), 20
Result = dict[str, Any]


def run(
    data: str,
    epochs: int,
    pairs: int,
    out: Path,
    seed: int = 0,
    batch_size: int = 256,
    add_task: Callable[[str], Callable[[float], object]] = lambda description: lambda share: None,
) -> Result:
    """Monitor a training and pair it; writes report.md, results.json, four PNGs and the logs into `out`."""
    from experts.data import load

    source = load(data)
    report_pairs, report_training = add_task(f"{pairs} pairs of epochs"), add_task(f"training on {data}, monitored")
    logs = out / "monitor"
    with torch_threads(1):
        overhead = pair(Training(source, seed, batch_size), pairs, report_pairs) if pairs else {}
        train(Training(source, seed, batch_size), epochs, logs, 1, report_training)
    settings = {"data": data, "epochs": epochs, "pairs": pairs, "seed": seed, "batch_size": batch_size}
    return write(logs, out, {"settings": settings, "look_up": look_up(), **overhead})


def write(logs: Path, out: Path, more: Result) -> Result:
    """The report of a monitor's folder; `more` goes into results.json."""
    result = cost_report.analyse(logs) | more | provenance()
    out.mkdir(parents=True, exist_ok=True)
    cost_report.plot(logs, result, out)
    write_text(out / "results.json", json.dumps(result, indent=1))
    write_text(out / "report.md", cost_report.markdown(result))
    return result


class Training:
    """The reference MoE's gate and experts, trained by cross-entropy on a data set's split `train`."""

    def __init__(self, source: Dataset, seed: int, batch_size: int = 256) -> None:
        import torch

        from experts.model import MoEClassifier

        self.batch_size = batch_size
        self.inputs, self.labels = (torch.from_numpy(part) for part in source["train"])
        self.held_out = [torch.from_numpy(part) for part in source["validation"]]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            widths = SETTINGS[source.name].widths
            self.model = MoEClassifier(self.inputs.shape[1], int(self.labels.max()) + 1, widths=widths)
        self.generator = torch.Generator().manual_seed(seed)
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=1e-3)

    def epoch(self) -> list[torch.Tensor]:
        """The rows of each batch, in a new order."""
        import torch

        return list(torch.randperm(len(self.inputs), generator=self.generator).split(self.batch_size))

    def step(self, rows: torch.Tensor, monitor: Monitor | None = None) -> None:
        """One step of the optimiser."""
        import torch.nn.functional as F

        loss = F.cross_entropy(self.model(self.inputs[rows]), self.labels[rows])
        self.optimizer.zero_grad()
        loss.backward()
        if monitor:
            monitor.record(loss=loss)
        self.optimizer.step()

    def accuracy(self) -> float:
        """The accuracy on validation."""
        import torch

        self.model.eval()
        with torch.inference_mode():
            found = float((self.model(self.held_out[0]).argmax(1) == self.held_out[1]).float().mean())
        self.model.train()
        return found


def train(training: Training, epochs: int, logs: Path, every: int, progress: Callable[[float], object]) -> None:
    """Train for some epochs under a monitor, with the accuracy on validation after each."""
    with Monitor(training.model, training.optimizer, every, logs, overwrite=True) as monitor:
        for epoch in range(epochs):
            for rows in training.epoch():
                training.step(rows, monitor)
            monitor.end_epoch(validation_accuracy=training.accuracy())
            progress((epoch + 1) / epochs)


def pair(training: Training, pairs: int, progress: Callable[[float], object]) -> Result:
    """One training, its epochs by turns with the monitor and without.

    An epoch, of full batches only, ends with `end_epoch` where it has the monitor. What a training pays once is
    outside: making and closing the monitor and the first batches, one of which has its FLOPs counted; by how much they
    take longer is `attach`. Medians of the slow-down with 95 % intervals.
    """
    batches = len(training.inputs) // training.batch_size
    if batches < 2:
        raise ValueError(f"{len(training.inputs)} rows make no two batches of {training.batch_size}")
    spent: dict[int, list[list[np.ndarray]]] = {every: [] for every in EVERY}
    for number in range(pairs):
        for every, found in spent.items():
            order = (every, None) if number % 2 else (None, every)
            times = {each: _epoch(training, each) for each in order}
            found.append([times[every], times[None]])
        progress((number + 1) / pairs)
    rows, attach = [], []
    for every, found in spent.items():
        walls, processors, outside = np.array(found).T
        attach += list(np.subtract(*outside))
        for clock, (on, off) in (("wall", walls), ("CPU", processors)):
            row = {"every": every, "clock": clock, "pairs": pairs, "median": float(np.median(on / off - 1))}
            row |= {"ci95": list(median_interval(on / off - 1)), "values": (on / off - 1).tolist()}
            rows.append(row | {"seconds_per_batch": float(np.median(on - off)) / batches})
    return {"overhead": rows, "attach": float(np.median(attach))}


def _epoch(training: Training, every: int | None) -> np.ndarray:
    """Wall and CPU time in s of an epoch of training, monitored unless `every` is None; the wall time before, after."""
    batches = [rows for rows in training.epoch() if len(rows) == training.batch_size]
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        begun, monitor = time.perf_counter(), None
        if every:
            monitor = stack.enter_context(Monitor(training.model, training.optimizer, every, Path(folder) / "logs"))
        for rows in batches[:WARM_UP]:
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
