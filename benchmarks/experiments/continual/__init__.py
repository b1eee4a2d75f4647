"""Which way of learning task after task forgets least, at equal bytes of images?

Each method learns a stream by mini-batches; images come raw, classes always in the same order. Its learning rate, then
its weight, are tuned for each buffer on validation data by a seed of their own, by three to seven runs. Closed-form
classifiers and joint training stand beside. A buffer of n has the bytes of n raw images: methods with small images keep
more of them, and closed forms have as many features as fit.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, replace
from functools import cache
from pathlib import Path
from typing import Any, Literal

import pandas as pd

from benchmarks.experiments.continual import plots
from benchmarks.experiments.continual.methods import METHODS, NONE, ONE
from benchmarks.experiments.continual.plots import title_of
from benchmarks.results.statistics import seeds_interval
from benchmarks.runner.kept import found_once
from benchmarks.runner.setup import Arguments
from cost.files import sha256_of
from experts.continual import ClosedForm, Result, Strategy, Stream, load, run
from experts.continual.stream import NAMES, Scenario

TUNING_SEED = 1000
RATES = (1e-3, 3e-3, 1e-2)
Tried = tuple[float, float | None, float]  # learning rate, weight (None: the method's own), validation accuracy
STREAMS = ("split-digits", "split-fashion-mnist")
EXPANDED = ("ER", "ER, bytes of the experts", "ER + expansion", "ER, task gate", "ER + expansion, task gate")
FORWARD = ("ER", "together")  # whose forward transfer is measured
OTHERS: dict[str, dict[str, Any]] = {  # where added experts may help
    "split-fashion-mnist-433": {},
    "digits-fashion-mnist": {"epochs": 3},
    "rotated-digits": {"epochs": 3},
    "split-fashion-mnist by task": {"stream": "split-fashion-mnist", "scenario": "task"},
}
SEEDS = (0, 1, 2, 3, 4)
SETTINGS: dict[str, dict[str, Any]] = {
    f"{stream}, {name}" + (f", {buffer}" if method.buffered else ""): {
        "stream": stream, "method": name, "buffer": buffer, "scratch": name in FORWARD and buffer in ONE,
    }
    for stream in STREAMS for name, method in METHODS.items() if not method.of_task for buffer in method.buffers
    if (stream, buffer) != ("split-digits", 2000)  # more than its 1,200 images
} | {
    f"{title}, {name}, 200": {"stream": title, "method": name, "buffer": 200, **more}
    for title, more in OTHERS.items() for name in EXPANDED
    if more.get("scenario") == "task" or not METHODS[name].of_task
}  # fmt: skip
QUICK = {
    "seeds": [0, 1],
    "setups": {
        name: {"stream": "split-digits", "method": name, "buffer": 50 if METHODS[name].buffered else NONE}
        for name in ("together", "ridge, 1000 random features")
    },
    "settings": {"epochs": 1, "rates": [1e-2]},
}


class ContinualSetup(Arguments):
    """`buffer` counts raw images; `rates` are the learning rates to try; `epochs` are those of each task, 8 for
    split-digits and 2 for others by default. `scratch` also trains a new network on each task, for the transfer."""

    stream: Literal["split-digits", "split-fashion-mnist"] | str = "split-fashion-mnist"
    scenario: Scenario | None = None
    method: Literal["ER", "DER++"] | str = "ER"
    buffer: int = 200
    epochs: int | None = None
    rates: list[float] = list(RATES)
    scratch: bool = False


Setup = ContinualSetup
plot = plots.plot


def check(setups: dict[str, ContinualSetup], splits: list[str]) -> None:
    """Raise `ValueError` for an unknown stream or method."""
    for setup in setups.values():
        if setup.method not in METHODS:
            raise ValueError(f"method={setup.method!r} is not one of {', '.join(METHODS)}")
        if METHODS[setup.method].buffered and setup.buffer < 1:
            raise ValueError(f"{setup.method} needs a buffer of at least 1 image")
        if METHODS[setup.method].of_task and setup.scenario != "task":
            raise ValueError(f"{setup.method} needs scenario=task")
        if not setup.rates:
            raise ValueError("rates=[]: at least one learning rate is needed")
        if setup.stream not in NAMES:
            raise ValueError(f"stream={setup.stream!r} is not one of {', '.join(NAMES)}")


def measure(setup: ContinualSetup, seed: int, split: str, folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Learn once with tuned settings; accuracies on test."""
    rate, weight, tried = _tuned(setup, folder)
    found = _run(setup, rate, weight, seed, "test", setup.scratch)
    row = found.summary()
    seconds = row.pop("seconds")
    return row | {
        "accuracies": [line[: task + 1] for task, line in enumerate(found.accuracy.tolist())],
        "expert load": found.expert_load.tolist(), "tried": tried,
        "bytes after": found.bytes_after, "parameters after": found.parameters,
    }, {"seconds": seconds, "seconds of tasks": found.seconds}  # fmt: skip


def score(frame: pd.DataFrame) -> dict[str, Any]:
    """Accuracy, forgetting, bytes and time of each method, and the loads of experts by task."""
    tables: dict[str, list[dict[str, Any]]] = {}
    for (stream, buffer), group in frame.groupby([title_of(frame), "buffer"], sort=False):
        title = f"{stream}, " + (f"{buffer} raw images" if buffer else "without a buffer")
        plain = group[group["method"] == "ER"].set_index("seed")["accuracy"]
        for method, runs in group.groupby("method", sort=False):
            values = runs["accuracy"].to_numpy(float)
            over = (runs.set_index("seed")["accuracy"] - plain).dropna().to_numpy(float)
            tables.setdefault(title, []).append({
                "method": method, "accuracy": float(values.mean()), "95 %": seeds_interval(values),
                "over ER": float(over.mean()) if len(over) else None,
                "over ER, 95 %": seeds_interval(over) if len(over) else None,
                "forgetting": float(runs["forgetting"].mean()),
                "online accuracy": _mean(runs, "online accuracy"), "transfer": _mean(runs, "transfer"),
                "experts": float(runs["experts"].mean()),
                "kB": float(runs["bytes"].mean()) / 1e3, "seconds": float(runs["seconds"].mean()),
            })  # fmt: skip
    return {"tables": tables, "notes": [
        "Accuracy: mean over the tasks after the last one, on test. Forgetting: mean over tasks of the best accuracy "
        "before minus the last one. Over ER: difference at the same buffer and seed. kB: of what is kept between "
        "tasks: network, replay, penalties and statistics. Seconds: of one thread; GDumb and joint training begin anew "
        "after each task, of which the last alone takes a third. Online accuracy: on batches before they are learned, "
        "among the task's own classes. Transfer: that minus the one of a network that begins with the task.",
    ]}  # fmt: skip


def _mean(runs: pd.DataFrame, name: str) -> float | None:
    """Mean of a column that methods may lack."""
    known = runs[name].dropna() if name in runs else runs["accuracy"][:0]
    return float(known.mean()) if len(known) else None


def _tuned(setup: ContinualSetup, folder: Path) -> tuple[float, float | None, list[Tried]]:
    """Learning rate and weight of the best validation accuracy, and all that were tried, once for all seeds."""
    method = METHODS[setup.method]
    plain = asdict(method.of(setup.buffer or 1))
    said = [setup.model_dump(exclude={"scratch"}), plain, method.weights, method.per_task, _epochs(setup), TUNING_SEED]
    path = folder / "tuning" / f"{sha256_of(json.dumps(said, sort_keys=True).encode())[:16]}.json"
    tried = found_once(path, lambda: {"setup": setup.model_dump(), "tried": list(_tries(setup))})["tried"]
    rate, weight, _ = max(tried, key=lambda each: each[2])
    return rate, weight, tried


def _tries(setup: ContinualSetup) -> Iterator[Tried]:
    """Learning rates with the method's own weight, then weights with the best rate; of a closed form without a trunk
    the rate does not matter."""
    method, found = METHODS[setup.method], list[Tried]()

    def judged(rate: float, weight: float | None) -> Tried:
        return rate, weight, _run(setup, rate, weight, TUNING_SEED, "validation").final

    learned = method.of(1)
    fixed = isinstance(learned, ClosedForm) and learned.features != "trunk"
    for rate in setup.rates[:1] if fixed else setup.rates:
        found.append(judged(rate, None))
        yield found[-1]
    best = max(found, key=lambda each: each[2])[0]
    for weight in method.weights:
        yield judged(best, weight)


@cache
def _loaded(name: str, scenario: Scenario | None) -> Stream:
    return load(name, scenario)


def _epochs(setup: ContinualSetup) -> int:
    return (8 if setup.stream == "split-digits" else 2) if setup.epochs is None else setup.epochs


def _run(
    setup: ContinualSetup, rate: float, weight: float | None, seed: int, split: str, scratch: bool = False
) -> Result:
    method, stream = METHODS[setup.method], _loaded(setup.stream, setup.scenario)
    learned = method.of(setup.buffer + method.per_task * (len(stream.tasks) - 1))
    if weight is not None:
        learned = method.weighted(learned, weight)
    epochs = _epochs(setup)
    if isinstance(learned, Strategy):
        return run(stream, replace(learned, learning_rate=rate, epochs=epochs), seed, split=split, scratch=scratch)
    return learned.run(stream, seed, split=split, strategy=Strategy(learning_rate=rate, epochs=epochs))
