"""Which way of learning task after task forgets least, at equal bytes of images?

Each method learns a stream by mini-batches; images come raw, classes always in the same order. Its learning rate, then
its weight, are tuned for each buffer on validation data by a seed of their own, by three to seven runs. Closed-form
classifiers and joint training stand beside. A buffer of n has the bytes of n raw images: methods with small images keep
more of them, and closed forms have as many features as fit.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from benchmarks.results.pareto import front
from benchmarks.results.statistics import seeds_interval
from benchmarks.runner.kept import found_once
from benchmarks.runner.setup import Arguments
from cost.files import sha256_of
from experts.continual import ClosedForm, Expansion, Penalty, Replay, Result, Strategy, Stream, load, run
from experts.continual.stream import NAMES, Scenario

TUNING_SEED = 1000
RATES = (1e-3, 3e-3, 1e-2)
SMALL_SIDE = 14
SMALL_BITS: Literal[4] = 4
ROW, SMALL_ROW = 28 * 28 + 4, SMALL_SIDE**2 * SMALL_BITS // 8 + 4  # bytes of an image with its label and task
SMALL_LOGITS_ROW = SMALL_ROW + 4 * 10
SMALL_NETWORK = 354_000  # bytes of the network for small images and four added experts
PER_TASK = 32  # raw images in the bytes of an added expert
BUFFERS = (50, 200, 500, 2000)
ONE = (200,)
NONE = 0  # buffer of methods without one
USUAL = "ER", "DER++", "GDumb", "together", "joint"  # in every plot
FEW = 10  # methods that a plot tells apart without choosing
Learned = Strategy | ClosedForm
Tried = tuple[float, float | None, float]  # learning rate, weight (None: the method's own), validation accuracy


@dataclass(frozen=True)
class Method:
    """`of(buffer)` makes a strategy; `weights` are values to try, `weighted` sets one. `per_task` raw images more are
    kept for each task after the first. `of_task`: needs the task."""

    of: Callable[[int], Learned]
    weights: tuple[float, ...] = ()
    weighted: Callable[[Any, float], Learned] = lambda learned, weight: learned
    buffers: tuple[int, ...] = BUFFERS
    per_task: int = 0
    of_task: bool = False

    @property
    def buffered(self) -> bool:
        """Whether it keeps images, or is as large as those that do."""
        return self.buffers != (NONE,)


GROWING = Expansion(8, similarity=1.0)
EWC, MAS = Penalty("ewc", 10.0), Penalty("mas", 1.0)
SHRINKAGES = (1e-5, 1e-4, 1e-3, 1e-1)  # beside 1e-2


def _er(kind: Literal["fifo", "reservoir", "balanced"] = "reservoir", **more: Any) -> Callable[[int], Strategy]:
    return lambda buffer: Strategy(replay=Replay(kind, buffer, 64), **more)


def _der(kind: Literal["reservoir", "balanced"] = "reservoir", **more: Any) -> Callable[[int], Strategy]:
    weight = more.pop("weight", 1.0)
    return lambda buffer: Strategy(
        replay=Replay(kind, buffer, 32, weight=weight, logits=0.3, late=True), all_classes=True, **more
    )


def _gdumb(buffer: int | None) -> Strategy:
    return Strategy(replay=Replay("balanced", buffer, 96, only=True))


def _small(made: Callable[[int], Strategy], row: int = SMALL_ROW) -> Callable[[int], Strategy]:
    return lambda buffer: replace(made(buffer * ROW // row), side=SMALL_SIDE, bits=SMALL_BITS)


def _small_form(kind: Literal["slda", "ridge"]) -> Callable[[int], ClosedForm]:
    """On as many random features as fit the bytes of a network and a buffer."""
    return lambda buffer: ClosedForm(
        kind, "random", int(((SMALL_NETWORK + ROW * buffer) / 2) ** 0.5) - 10, side=SMALL_SIDE, bits=SMALL_BITS
    )


def _set_penalty(strategy: Strategy, weight: float) -> Strategy:
    assert strategy.regularizer is not None
    return replace(strategy, regularizer=replace(strategy.regularizer, weight=weight))


def _set_logits(strategy: Strategy, weight: float) -> Strategy:
    assert strategy.replay is not None
    return replace(strategy, replay=replace(strategy.replay, logits=weight))


def _set_distillation(strategy: Strategy, weight: float) -> Strategy:
    return replace(strategy, distillation=weight)


def _set_freezing(strategy: Strategy, weight: float) -> Strategy:
    return replace(strategy, freezing=weight)


def _set_similarity(strategy: Strategy, weight: float) -> Strategy:
    assert strategy.expansion is not None
    return replace(strategy, expansion=replace(strategy.expansion, similarity=weight))


def _set_shrinkage(form: ClosedForm, weight: float) -> ClosedForm:
    return replace(form, shrinkage=weight)


def _closed(
    kind: Literal["slda", "ridge"], features: Literal["pixels", "random", "trunk"], size: int = 64, small: bool = False
) -> Method:
    form = ClosedForm(kind, features, size)
    if small:
        form = replace(form, side=SMALL_SIDE, bits=SMALL_BITS)
    return Method(lambda buffer: form, SHRINKAGES, _set_shrinkage, (NONE,))


def _expanding(expansion: Expansion = GROWING, **more: Any) -> Callable[[int], Strategy]:
    return _er(expansion=expansion, freezing=0.1, **more)


# A step of methods with a replay learns 96 inputs: 32 new and 64 old ones (32 of these for their logits in DER), or 96
# where nothing is new; without a replay, and in the first task, it learns the 32 new ones.
METHODS: dict[str, Method] = {
    "no replay": Method(lambda buffer: Strategy(), buffers=(NONE,)),
    "EWC": Method(lambda buffer: Strategy(regularizer=EWC), (100.0,), _set_penalty, (NONE,)),
    "MAS": Method(lambda buffer: Strategy(regularizer=MAS), (10.0,), _set_penalty, (NONE,)),
    "distillation": Method(lambda buffer: Strategy(distillation=1.0), (3.0,), _set_distillation, (NONE,)),
    "expansion": Method(lambda buffer: Strategy(expansion=GROWING, freezing=0.1), (0.0,), _set_freezing, (NONE,)),
    "ER": Method(_er()),
    "ER, bytes of the experts": Method(_er(), per_task=PER_TASK, buffers=ONE),
    "ER, FIFO": Method(_er("fifo"), buffers=ONE),
    "ER, balanced": Method(_er("balanced")),
    "ER, even draws": Method(_er(balance="sampling"), buffers=ONE),
    "ER, class weights": Method(_er(balance="weights"), buffers=ONE),
    "ER, bfloat16": Method(_er(precision="bfloat16"), buffers=ONE),
    "ER + EWC": Method(_er(regularizer=EWC), (1.0, 100.0), _set_penalty),
    "ER + MAS": Method(_er(regularizer=MAS), (0.1, 10.0), _set_penalty),
    "ER + distillation": Method(_er(distillation=0.3), (0.1, 1.0), _set_distillation),
    "ER + freezing": Method(_er(freezing=0.1), (0.0,), _set_freezing),
    "ER + expansion": Method(_expanding(), (0.0, 1.0), _set_freezing),
    "ER + expansion, reuse": Method(_expanding(Expansion(8, similarity=0.9)), (0.7, 0.8), _set_similarity, ONE),
    "ER + expansion, merge": Method(
        _expanding(Expansion(5, similarity=1.0, merge=True)), (0.0, 1.0), _set_freezing, ONE
    ),
    "ER + domain gate": Method(_er(gate="domain"), buffers=ONE),
    "ER, task gate": Method(_er(gate="task"), buffers=ONE, of_task=True),
    "ER + expansion, task gate": Method(_expanding(gate="task"), (0.0, 1.0), _set_freezing, ONE, of_task=True),
    "ER-ACE": Method(_er("balanced", asymmetric=True)),
    "DER": Method(_der(weight=0.0), (0.1, 1.0), _set_logits, ONE),
    "DER++": Method(_der(), (0.1, 1.0), _set_logits),
    "DER++, ACE, shift": Method(_der("balanced", asymmetric=True, shift=2), (0.1, 1.0), _set_logits, ONE),
    "DER++, small images": Method(_small(_der("balanced"), SMALL_LOGITS_ROW), (0.1, 1.0), _set_logits),
    "GDumb": Method(_gdumb),
    "GDumb, small images": Method(_small(_gdumb)),
    "ER-ACE, small images": Method(_small(_er("balanced", asymmetric=True))),
    "together": Method(
        _small(_er("balanced", asymmetric=True, expansion=GROWING, freezing=0.1)), (0.0, 1.0), _set_freezing
    ),
    "SLDA, small images": Method(_small_form("slda"), SHRINKAGES, _set_shrinkage),
    "ridge, small images": Method(_small_form("ridge"), SHRINKAGES, _set_shrinkage),
    "SLDA, pixels": _closed("slda", "pixels"),
    "SLDA, trunk": _closed("slda", "trunk"),
    "SLDA, trunk, small images": _closed("slda", "trunk", small=True),
    "SLDA, 1000 random features": _closed("slda", "random", 1000),
    "ridge, trunk": _closed("ridge", "trunk"),
    "ridge, trunk, small images": _closed("ridge", "trunk", small=True),
    "ridge, 1000 random features": _closed("ridge", "random", 1000),
    "joint": Method(lambda buffer: _gdumb(None), buffers=(NONE,)),
}
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
    for (stream, buffer), group in frame.groupby([_title(frame), "buffer"], sort=False):
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


def plot(frame: pd.DataFrame, result: dict[str, Any], out: Path) -> list[str]:
    """Plot accuracy against bytes, growth, and how often each task chooses each expert."""
    names = []
    for stream, runs in frame.groupby(_title(frame), sort=False):
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
    groups = list(shown.groupby(_title(shown), sort=False))
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
    groups, seeds = list(shown.groupby([_title(shown), "buffer"], sort=False)), sorted(shown["seed"].unique())
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


def _title(frame: pd.DataFrame) -> pd.Series:
    """Name of the stream of each run, with its scenario where that is not the stream's own."""
    if "scenario" not in frame:
        return frame["stream"]
    return frame["stream"].where(frame["scenario"].isna(), frame["stream"] + " by " + frame["scenario"].astype(str))


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
