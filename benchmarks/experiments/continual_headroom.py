"""Is there a decision in continual learning that is worth learning?

Before each task a schedule sets the learning rate, the weight of the replay, whether an expert is added, how much
those of earlier tasks learn, and whether the replay keeps inputs of the task. Constants, random schedules, and strong
constants with one task changed are judged in contexts: orders of the classes, and which segments come again or have
wrong labels. A learned policy would adapt to the context, so what it could gain is the best schedule of each context
over the best one for all. Chosen on validation by a few runs and judged by another run on test, that gain is a lower
bound, as few runs choose badly; by the runs that choose it is an upper one, among the schedules that were tried.

Where labels are wrong, a detector that knows in which segments stands beside a rule that does not: the replay keeps
only inputs whose label the network itself believes.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from benchmarks.results.statistics import seeds_interval
from benchmarks.runner.setup import Arguments
from experts.continual import Expansion, NetworkShape, Replay, Strategy, Stream, StreamTask, load, run
from experts.continual.result import Result

WORTH = 0.02  # accuracy over the best schedule from which on an environment is worth building
NOISY = ", wrong labels"
KINDS = "known length", "unknown length", "recurring", "raw images"
RATES = (0.5, 1.0, 2.0, 4.0)  # times 0.003
WEIGHTS = (0.5, 1.0, 2.0, 4.0, 8.0)  # of the replay
FREEZINGS = (0.0, 0.1, 1.0)
CONFIDENCES = (0.1, 0.3, 0.6)  # with which the network must believe a label for the replay to keep it
SEEDS = (0, 1, 2, 3, 4)
SETTINGS: dict[str, dict[str, Any]] = {
    f"{kind}, {data}": {"kind": kind, "data": data}
    for kind in KINDS for data in ("digits", "fashion-mnist") if (kind, data) != ("raw images", "fashion-mnist")
}  # fmt: skip
QUICK = {
    "seeds": [0, 1],
    "setups": {kind: {"kind": kind, "data": "digits"} for kind in ("unknown length", "recurring")},
    "settings": {"constants": 2, "schedules": 2, "contexts": 1, "selecting": 1, "most": 48, "epochs": 1},
}


class HeadroomSetup(Arguments):
    """With an unknown length the accuracy counts after each task, not only in the end. Of `schedules` random ones and
    the first `constants`, in `contexts` of each seed, the best one of a context is chosen by `selecting` runs and
    judged by another. `most` training inputs a task are used."""

    kind: Literal["known length", "unknown length", "recurring", "raw images"]
    data: Literal["digits", "fashion-mnist"] = "digits"
    constants: int = 24
    schedules: int = 36
    contexts: int = 2
    selecting: int = 2
    most: int = 600
    epochs: int = 3
    buffer: int = 50


Setup = HeadroomSetup


@dataclass(frozen=True)
class TaskChoice:
    """What a schedule decides for a task."""

    rate: float = 1.0
    weight: float = 1.0
    add: bool = False
    freezing: float = 1.0
    late: bool = False
    keep: bool = True
    confident: float = 0.0


STRONG = tuple(TaskChoice(rate, weight) for rate in (1.0, 2.0) for weight in (2.0, 4.0))
CONSTANTS = (
    *(TaskChoice(rate, weight) for rate in RATES for weight in WEIGHTS),
    *(TaskChoice(2.0, 4.0, add=True, freezing=freezing) for freezing in FREEZINGS),
    TaskChoice(2.0, 4.0, freezing=0.1),
)


def measure(setup: HeadroomSetup, seed: int, split: str, folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Accuracies `[contexts, candidates]` of the runs that choose, and of the run that judges, and how many candidates
    are of each group."""
    chosen, judged, counts = [], [], dict[str, int]()
    for number in range(setup.contexts):
        context = seed * setup.contexts + number
        stream = stream_of(setup, context)
        groups = candidates_of(setup, stream)
        counts = {name: len(group) for name, group in groups.items()}
        candidates = [each for group in groups.values() for each in group]
        runs = np.array(
            [[_value(setup, stream, each, 100 * context + again, "test" if again == setup.selecting else "validation")
              for each in candidates] for again in range(setup.selecting + 1)]
        )  # fmt: skip
        chosen.append(runs[:-1].mean(0).tolist())
        judged.append(runs[-1].tolist())
    return {"chosen by": chosen, "judged by": judged, "groups": counts}, {}


def score(frame: pd.DataFrame) -> dict[str, Any]:
    """The best constant, the best schedule for all contexts, and the best one of each context."""
    rows = []
    for setup, group in frame.groupby("setup", sort=False):
        every = [np.array(group[name].tolist()) for name in ("chosen by", "judged by")]  # [seeds, contexts, S]
        counts = group["groups"].iloc[0]
        constants, ends = counts["constants"], counts["constants"] + counts["schedules"]
        by, judged = (each[..., :ends] for each in every)
        constant, schedule = (_of_other_seeds(by, judged, among) for among in (constants, ends))
        best = by.argmax(2)
        hindsight = np.take_along_axis(judged, best[..., None], 2)[..., 0].mean(1)
        promised = by.max(2).mean(1)
        gain, chosen = hindsight - schedule, _of_other_seeds(by, by, by.shape[2])
        rows.append({
            "setting": setup, "best constant": float(constant.mean()), "best schedule": float(schedule.mean()),
            "schedule - constant": float((schedule - constant).mean()),
            "schedule - constant, 95 %": seeds_interval(schedule - constant),
            "best of each context": float(hindsight.mean()), "headroom": float(gain.mean()),
            "headroom, 95 %": seeds_interval(gain),
            "headroom, at most": float((promised - chosen).mean()),
            "worth it": _verdict(seeds_interval(gain), float((promised - chosen).mean())),
            **_with_wrong_labels(every[0], every[1], counts),
        })  # fmt: skip
    return {"tables": {"Accuracy": rows}, "notes": [
        "Accuracy after the last task; with unknown length its mean over time. Best constant and best schedule are "
        "chosen by the other seeds, whose contexts differ, and judged by this one. Headroom: best schedule of each "
        "context, chosen on validation and judged on test, minus the best schedule: a lower bound. At most: both on "
        f"validation, by the runs that choose. Worth it: yes if the interval of the headroom is above {WORTH:g}, no if "
        "what it is at most is below. Rule: a constant whose replay keeps only inputs whose label the network believes "
        "at the end of the segment. Detector: a constant whose replay keeps nothing of the segments with wrong labels, "
        "which are learned or not. Both beside constants whose replay is filled at the end of a segment, too.",
    ]}  # fmt: skip


def plot(frame: pd.DataFrame, result: dict[str, Any], out: Path) -> list[str]:
    """Plot the headroom with intervals."""
    rows = result["tables"]["Accuracy"]
    figure = Figure((8, 0.5 * len(rows) + 1.5), layout="constrained")
    axis = figure.subplots()
    for place, row in enumerate(rows):
        for shift, name, colour in ((-0.15, "schedule - constant", "C0"), (0.15, "headroom", "C1")):
            interval = row[f"{name}, 95 %"] or [row[name]] * 2
            error = [[100 * (row[name] - interval[0])], [100 * (interval[1] - row[name])]]
            axis.errorbar(100 * row[name], place + shift, xerr=error, fmt="o", color=colour,
                          label=name if not place else None)  # fmt: skip
    axis.axvline(100 * WORTH, color="grey", ls="--", label="worth an environment")
    axis.axvline(0, color="grey", lw=0.8)
    axis.set_yticks(range(len(rows)), [row["setting"] for row in rows])
    axis.set_xlabel("points of accuracy")
    axis.legend(loc="upper left", bbox_to_anchor=(1, 1))
    figure.savefig(out / "headroom.png", dpi=120)
    return ["headroom.png"]


def _with_wrong_labels(by: np.ndarray, judged: np.ndarray, counts: dict[str, int]) -> dict[str, Any]:
    """Gain of the rule over the best constant, and of the detector over the rule."""
    if "rule" not in counts:
        return {}
    ends = np.cumsum(list(counts.values()))
    places = dict(zip(counts, (np.arange(end - size, end) for end, size in zip(ends, counts.values(), strict=True)),
                      strict=True))  # fmt: skip

    def best(*names: str) -> np.ndarray:
        among = np.concatenate([places[name] for name in names])
        return _of_other_seeds(by[..., among], judged[..., among], len(among))

    plain = "constants", "late"
    constant, rule, detector = best(*plain), best(*plain, "rule"), best(*plain, "detector")
    return {
        "best constant, also late": float(constant.mean()), "best rule": float(rule.mean()),
        "rule - constant": float((rule - constant).mean()),
        "rule - constant, 95 %": seeds_interval(rule - constant), "detector": float(detector.mean()),
        "detector - rule": float((detector - rule).mean()), "detector - rule, 95 %": seeds_interval(detector - rule),
    }  # fmt: skip


def _verdict(gain: tuple[float, float] | None, most: float) -> str:
    return "yes" if gain and gain[0] >= WORTH else "no" if most < WORTH else "not known"


def _of_other_seeds(by: np.ndarray, judged: np.ndarray, among: int) -> np.ndarray:
    """Accuracy of each seed with the candidate that is best for the others, `[seeds]`; of one seed, for itself."""
    found = []
    for seed in range(len(by)):
        others = np.delete(by, seed, 0) if len(by) > 1 else by
        found.append(judged[seed, :, int(others[..., :among].mean((0, 1)).argmax())].mean())
    return np.array(found)


def candidates_of(setup: HeadroomSetup, stream: Stream) -> dict[str, list[list[TaskChoice]]]:
    """Constants and schedules, the same for all contexts; where labels are wrong also the detector and the rule."""
    random, tasks, recurring = np.random.default_rng(0), len(stream.tasks), setup.kind == "recurring"
    rates = (0.0, *RATES) if recurring else RATES

    def drawn() -> TaskChoice:
        rate, weight, freezing = (float(random.choice(each)) for each in (rates, WEIGHTS, FREEZINGS))
        keep = not recurring or bool(random.random() < 0.8)
        return TaskChoice(rate, weight, bool(random.integers(2)), freezing, keep=keep)

    def changed() -> list[TaskChoice]:
        schedule = [STRONG[random.integers(len(STRONG))]] * tasks
        schedule[random.integers(tasks)] = drawn()
        return schedule

    found = {
        "constants": [[each] * tasks for each in CONSTANTS[: setup.constants]],
        "schedules": [
            changed() if number % 2 else [drawn() for _ in range(tasks)] for number in range(setup.schedules)
        ],
    }
    if not recurring:
        return found
    noisy = [task.name.endswith(NOISY) for task in stream.tasks]
    late = [replace(each, late=True) for each in STRONG]
    unkept = [(each, replace(each, keep=False)) for each in (*STRONG, *late)]
    unkept += [(each, replace(each, keep=False, rate=0.0)) for each in STRONG]
    return found | {
        "late": [[each] * tasks for each in late],
        "detector": [[other if wrong else each for wrong in noisy] for each, other in unkept],
        "rule": [[replace(each, confident=least)] * tasks for least in CONFIDENCES for each in STRONG],
    }


def _value(setup: HeadroomSetup, stream: Stream, schedule: list[TaskChoice], seed: int, split: str) -> float:
    strategy = Strategy(
        replay=Replay("balanced", setup.buffer), expansion=Expansion(6, similarity=1.0), epochs=setup.epochs,
        learning_rate=3e-3,
    )  # fmt: skip

    def control(task: int, given: Strategy) -> Strategy:
        choice = schedule[task]
        assert given.replay is not None
        return replace(
            given, learning_rate=given.learning_rate * choice.rate, freezing=choice.freezing,
            replay=replace(given.replay, weight=choice.weight, late=choice.late, keep=choice.keep,
                           confident=choice.confident),
            expansion=given.expansion if choice.add else None,
        )  # fmt: skip

    shape = NetworkShape(num_experts=2)
    if setup.kind != "raw images":
        shape = replace(shape, trunk="linear", d_model=32, d_ff=16)
    found: Result = run(stream, strategy, seed, shape=shape, split=split, control=control)
    return found.average if setup.kind == "unknown length" else found.final


def stream_of(setup: HeadroomSetup, context: int) -> Stream:
    """The stream of a setup in one context: an order of the classes, and of the segments."""
    stream = load(f"split-{setup.data}", order=context)
    tasks = []
    for task in stream.tasks:
        x, y = task["train"]
        tasks.append(StreamTask(task.name, task.classes, {**task.splits, "train": (x[: setup.most], y[: setup.most])}))
    stream = Stream(stream.name, stream.scenario, tuple(tasks))
    if setup.kind != "raw images":
        stream = stream.pca(64)
    return _recurring(stream, context) if setup.kind == "recurring" else stream


def _recurring(stream: Stream, context: int) -> Stream:
    """Ten segments: each task once, then five tasks drawn at random. In three segments after the first one half of the
    labels is drawn from all classes."""
    random = np.random.default_rng([context, 1])
    count, classes = len(stream.tasks), tuple(range(stream.num_classes))
    order = [*range(count), *random.integers(count, size=count).tolist()]
    noisy = set(random.choice(np.arange(1, 2 * count), 3, replace=False).tolist())
    segments = []
    for place, number in enumerate(order):
        splits = dict(stream.tasks[number].splits)
        if place in noisy:
            x, y = splits["train"]
            wrong = random.random(len(y)) < 0.5
            splits["train"] = x, np.where(wrong, random.integers(len(classes), size=len(y)), y)
        name = f"segment {place + 1}" + (NOISY if place in noisy else "")
        segments.append(StreamTask(name, classes, splits))
    return Stream(f"{stream.name}, recurring", "domain", tuple(segments))
