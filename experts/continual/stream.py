"""Streams of tasks: the classes or the domains of a data set, one after the other.

Scenarios are those of van de Ven & Tolias (2019). In "class" the task is unknown at test and the labels of all tasks
are told apart; in "task" the task is given at test; in "domain" all tasks have the same labels and other inputs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal, NamedTuple, get_args

import numpy as np

from cost.files import sha256_of
from experts.continual import sources
from experts.continual.sources import TASK_SPLITS, Arrays

Scenario = Literal["class", "task", "domain"]
LARGE = "cifar10-cifar100-tinyimagenet"


class StreamBatch(NamedTuple):
    """Inputs `[B, ...]`, labels `[B]` int64 and the number of the task."""

    inputs: np.ndarray
    labels: np.ndarray
    task: int


@dataclass(frozen=True)
class StreamTask:
    """A task: the labels that occur in it, and inputs and labels `[n]` int64 of each split.

    Inputs are images `[n, channels, side, side]` uint8, or features `[n, d]` float32.
    """

    name: str
    classes: tuple[int, ...]
    splits: Mapping[str, Arrays]

    def __getitem__(self, split: str) -> Arrays:
        """Inputs and labels of a split."""
        return self.splits[split]


@dataclass(frozen=True)
class Stream:
    """Tasks in the order in which they are learned; raises `ValueError` where they do not fit the scenario."""

    name: str
    scenario: Scenario
    tasks: tuple[StreamTask, ...]

    def __post_init__(self) -> None:
        if self.scenario not in get_args(Scenario):
            raise ValueError(f"scenario={self.scenario!r} is not one of {', '.join(get_args(Scenario))}")
        if not self.tasks:
            raise ValueError("a stream needs at least one task")
        for task in self.tasks:
            _check(task, self.tasks[0])
        seen = [label for task in self.tasks for label in task.classes]
        if self.scenario == "domain":
            if any(task.classes != self.tasks[0].classes for task in self.tasks):
                raise ValueError("tasks of the scenario 'domain' must have the same classes")
        elif len(set(seen)) < len(seen):
            raise ValueError(f"two tasks share a class: {seen}; give each its own, or use the scenario 'domain'")
        elif sorted(seen) != list(range(len(seen))):
            raise ValueError(f"the classes of all tasks must be 0 .. {len(seen) - 1}, not {sorted(seen)}")

    @classmethod
    def of_arrays(
        cls, name: str, tasks: Sequence[Mapping[str, Arrays]], scenario: Scenario = "class", names: Sequence[str] = ()
    ) -> Stream:
        """A stream of one's own data: for each task inputs and labels from 0 on of `train`, `validation` and `test`.

        Labels are moved behind those of the tasks before, unless the scenario is "domain".
        """
        made, start = list[StreamTask](), 0
        for number, splits in enumerate(tasks):
            if any(labels.dtype.kind not in "iu" for _, labels in splits.values()):
                raise ValueError(f"labels of task {number + 1} are not whole numbers")
            size = max(int(labels.max()) + 1 for _, labels in splits.values())
            moved = {split: (inputs, labels.astype(np.int64) + start) for split, (inputs, labels) in splits.items()}
            title = names[number] if names else f"task {number + 1}"
            made.append(StreamTask(title, tuple(range(start, start + size)), moved))
            start += 0 if scenario == "domain" else size
        return cls(name, scenario, tuple(made))

    @cached_property
    def sha256(self) -> str:
        """SHA-256 of all inputs and labels."""
        parts = (part for task in self.tasks for split in TASK_SPLITS for part in task[split])
        return sha256_of("".join(sha256_of(part.tobytes()) for part in parts).encode())

    @property
    def num_classes(self) -> int:
        """Number of labels of all tasks."""
        return 1 + max(label for task in self.tasks for label in task.classes)

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of one input: `(channels, side, side)` of images, `(d,)` of features."""
        return self.tasks[0]["train"][0].shape[1:]

    def classes_until(self, task: int) -> int:
        """Number of labels of the tasks up to and including this one."""
        return 1 + max(label for each in self.tasks[: task + 1] for label in each.classes)

    def batches(self, task: int, batch_size: int, *, seed: int, epoch: int = 0) -> Iterator[StreamBatch]:
        """One epoch of a task's training data in random order; the last batch may be smaller."""
        inputs, labels = self.tasks[task]["train"]
        order = np.random.default_rng([seed, task, epoch]).permutation(len(labels))
        for step in range(steps_of(len(labels), batch_size)):
            rows = order[step * batch_size : (step + 1) * batch_size]
            yield StreamBatch(inputs[rows], labels[rows], task)

    def map(self, change: Callable[[np.ndarray], np.ndarray], name: str) -> Stream:
        """The stream with other inputs, such as features."""
        tasks = tuple(
            StreamTask(task.name, task.classes, {split: (change(x), y) for split, (x, y) in task.splits.items()})
            for task in self.tasks
        )
        return Stream(name, self.scenario, tasks)

    def pca(self, size: int) -> Stream:
        """The stream with the `size` first principal components of the first task's training inputs, as a learner
        that sees only this task could compute them."""
        first = flat(self.tasks[0]["train"][0])
        mean, basis = components(first, size)
        scale = 1 / max(float(((first - mean) @ basis[:, :1]).std()), 1e-6)
        name = f"{self.name}, PCA {basis.shape[1]}"
        return self.map(lambda x: ((flat(x) - mean) @ basis * scale).astype(np.float32), name)


def steps_of(count: int, batch_size: int) -> int:
    """Batches of an epoch of `count` inputs."""
    return -(-count // batch_size)


def load(
    name: str, scenario: Scenario | None = None, *, order: int | None = None, folder: str | Path | None = None
) -> Stream:
    """A stream by its name in `NAMES`.

    `scenario` is "class" unless all tasks of the stream have the same classes, then it is "domain". `order` is the seed
    of another order of the classes (or of the domains); with None they are in the order of their labels. `folder` holds
    the data sets of `cifar10-cifar100-tinyimagenet`. Raises `ValueError` for an unknown name or a scenario that the
    stream does not have, or an order of a sequence of data sets, and `DataError` for absent data.
    """
    if name not in NAMES:
        raise ValueError(f"unknown stream {name!r}; there are {', '.join(NAMES)}")
    of_domains = name.startswith(("rotated-", "corrupted-"))
    scenario = scenario or ("domain" if of_domains else "class")
    if of_domains and scenario != "domain":
        raise ValueError(f"all tasks of {name} have the same classes: its scenario is 'domain', not {scenario!r}")
    if of_domains:
        kind, _, source = name.partition("-")
        return _of_domains(name, source, kind, order)
    if name.startswith("split-"):
        source, sizes = SPLIT_STREAMS[name]
        return _split(name, source, sizes, scenario, order)
    if order is not None:
        raise ValueError(f"order={order}: the data sets of {name} have one order")
    if name == LARGE:
        return Stream.of_arrays(name, sources.large(folder, name), scenario, ("CIFAR-10", "CIFAR-100", "TinyImageNet"))
    parts = [("digits", range(10)), ("fashion-mnist", range(5)), ("fashion-mnist", range(5, 10))]
    tasks = [sources.part(sources.images(source), classes) for source, classes in parts]
    return Stream.of_arrays(name, tasks, scenario, ("digits", "Fashion-MNIST 0-4", "Fashion-MNIST 5-9"))


SPLIT_STREAMS: dict[str, tuple[str, tuple[int, ...]]] = {
    "split-digits": ("digits", (2,) * 5),
    "split-fashion-mnist": ("fashion-mnist", (2,) * 5),
    "split-fashion-mnist-433": ("fashion-mnist", (4, 3, 3)),
}
NAMES = (
    *SPLIT_STREAMS, "digits-fashion-mnist", "rotated-digits", "rotated-fashion-mnist", "corrupted-digits",
    "corrupted-fashion-mnist", LARGE,
)  # fmt: skip


def _check(task: StreamTask, first: StreamTask) -> None:
    """Raise `ValueError` for data that cannot be learned."""
    if set(task.splits) != set(TASK_SPLITS):
        raise ValueError(f"{task.name} has the splits {', '.join(task.splits)}, not {', '.join(TASK_SPLITS)}")
    shape, dtype = first["train"][0].shape[1:], first["train"][0].dtype
    for split, (inputs, labels) in task.splits.items():
        what = f"{split} of {task.name}"
        if labels.ndim != 1 or labels.dtype.kind not in "iu":
            raise ValueError(f"{what} has labels {labels.shape} {labels.dtype}: whole numbers [n] are needed")
        if len(inputs) != len(labels) or not len(labels):
            raise ValueError(f"{what} has {len(inputs)} inputs and {len(labels)} labels")
        if inputs.shape[1:] != shape or inputs.dtype != dtype:
            raise ValueError(f"{what} has inputs {inputs.shape[1:]} {inputs.dtype}, not {shape} {dtype}")
        if (inputs.ndim, inputs.dtype) not in {(4, np.dtype(np.uint8)), (2, np.dtype(np.float32))}:
            raise ValueError(f"{what} has inputs {inputs.shape} {inputs.dtype}: images [n, channels, side, side] uint8 "
                             "or features [n, d] float32 are needed")  # fmt: skip
        if inputs.ndim == 4 and inputs.shape[2] != inputs.shape[3]:
            raise ValueError(f"{what} has images of {inputs.shape[2]} x {inputs.shape[3]} pixels: they must be square")
        if inputs.dtype == np.float32 and not np.isfinite(inputs).all():
            raise ValueError(f"{what} has inputs that are not finite")
        if not set(np.unique(labels)) <= set(task.classes):
            raise ValueError(f"{what} has labels beside {task.classes}")


def _split(name: str, source: str, sizes: tuple[int, ...], scenario: Scenario, order: int | None) -> Stream:
    classes = np.arange(sum(sizes)) if order is None else np.random.default_rng(order).permutation(sum(sizes))
    groups = [group.tolist() for group in np.split(classes, np.cumsum(sizes)[:-1])]
    if scenario == "domain" and len(set(sizes)) > 1:
        raise ValueError(f"the tasks of {name} have {', '.join(map(str, sizes))} classes: not the same in all")
    whole = sources.images(source)
    names = [f"classes {', '.join(map(str, group))}" for group in groups]
    return Stream.of_arrays(name, [sources.part(whole, group) for group in groups], scenario, names)


def _of_domains(name: str, source: str, kind: str, order: int | None) -> Stream:
    tasks = sources.domains(sources.images(source), kind)
    names = list(tasks) if order is None else np.random.default_rng(order).permutation(list(tasks)).tolist()
    return Stream.of_arrays(name, [tasks[each] for each in names], "domain", names)


def flat(inputs: np.ndarray) -> np.ndarray:
    """Inputs `[n, d]` float32; pixels in 0..1."""
    found = inputs.reshape(len(inputs), -1)
    return found.astype(np.float32) / 255 if inputs.dtype == np.uint8 else found


def components(inputs: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Mean `[D]` and the first principal components `[D, size]` of flat inputs; fewer where there are not as many."""
    mean = inputs.mean(0)
    return mean, np.linalg.svd(inputs - mean, full_matrices=False)[2][:size].T.copy()
