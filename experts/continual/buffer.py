"""Bounded memory of earlier inputs: the last ones, a uniform sample, or as many of each class."""

from __future__ import annotations

import numpy as np

from experts.continual.strategy import Replay

GROWTH = 1024


class Buffer:
    """Keeps encoded inputs, labels, task numbers and, if asked for, logits, in arrays that do not grow beyond `size`.

    `rows [n, ...]` are arrays of any type. Logits of classes that were not known when an input came are NaN.
    """

    ARRAYS = ("rows", "labels", "tasks", "logits")

    def __init__(self, settings: Replay, num_classes: int) -> None:
        self.settings, self.num_classes = settings, num_classes
        self.seen, self.count = 0, 0
        self.rows = np.zeros((0, 0), np.uint8)
        self.labels = np.zeros(0, np.int64 if num_classes > 2**15 else np.int16)
        self.tasks = np.zeros(0, np.int16)
        self.logits = np.zeros((0, num_classes if settings.logits else 0), np.float32)
        self.offered = np.zeros(num_classes, np.int64)  # inputs of each class so far
        self._counts = np.zeros(num_classes, np.int64)

    def __len__(self) -> int:
        return self.count

    @property
    def nbytes(self) -> int:
        """Bytes of all that is kept."""
        return sum(getattr(self, name)[: self.count].nbytes for name in self.ARRAYS)

    def add(
        self, rows: np.ndarray, labels: np.ndarray, task: int, random: np.random.Generator,
        logits: np.ndarray | None = None,
    ) -> None:  # fmt: skip
        """Offer inputs of a task, one after the other."""
        self._reserve(rows)
        places = self._places(labels, random)
        took = [(place, number) for number, place in enumerate(places) if place >= 0]
        last = dict(took)  # of two that took the same place the later one stays
        if not last:
            return
        places_n, numbers_n = (np.fromiter(each, np.int64) for each in (last.keys(), last.values()))
        self.rows[places_n], self.labels[places_n], self.tasks[places_n] = rows[numbers_n], labels[numbers_n], task
        if self.settings.logits:
            assert logits is not None
            self.logits[places_n] = np.nan
            self.logits[places_n, : logits.shape[1]] = logits[numbers_n]

    def draw(self, count: int, random: np.random.Generator, even: bool = False) -> np.ndarray:
        """Places of `count` inputs drawn with replacement, uniformly or evenly from the classes."""
        if not even:
            return random.integers(self.count, size=count)
        labels = self.labels[: self.count]
        weight = 1.0 / np.bincount(labels)[labels]
        return random.choice(self.count, size=count, p=weight / weight.sum())

    def state(self) -> dict[str, np.ndarray]:
        """Copies of all that is kept."""
        kept = {name: getattr(self, name)[: self.count].copy() for name in self.ARRAYS}
        return kept | {"offered": self.offered.copy(), "seen": np.array(self.seen)}

    def restore(self, state: dict[str, np.ndarray]) -> None:
        """Take over a `state()`; raises `ValueError` where it does not fit."""
        sizes = {len(state[name]) for name in self.ARRAYS}
        if len(sizes) != 1 or (self.settings.size is not None and max(sizes) > self.settings.size):
            raise ValueError(f"a buffer of {sizes} inputs does not fit a size of {self.settings.size}")
        labels, logits = state["labels"], state["logits"]
        if len(labels) and not 0 <= labels.min() <= labels.max() < self.num_classes:
            raise ValueError(f"the buffer has labels beyond {self.num_classes} classes")
        if logits.shape[1] != self.logits.shape[1] or state["offered"].shape != self.offered.shape:
            raise ValueError("the buffer is of another number of classes")
        self.count, self.seen, self.offered = 0, int(state["seen"]), state["offered"].copy()
        for name in self.ARRAYS:
            setattr(self, name, state[name].copy())
        self.count = len(labels)
        self._counts = np.bincount(labels, minlength=self.num_classes).astype(np.int64)

    def _places(self, labels: np.ndarray, random: np.random.Generator) -> list[int]:
        """The place that each input takes, -1 for none."""
        size, count = self.settings.size, len(labels)
        if size is None:  # all
            places = list(range(self.count, self.count + count))
            self.seen, self.count = self.seen + count, self.count + count
            return places
        if self.settings.kind == "balanced":
            return [self._balanced(int(label), size, random) for label in labels]
        order = self.seen + np.arange(count)
        if self.settings.kind == "fifo":
            places = (order % size).tolist()
        else:
            drawn = random.integers(order + 1)
            places = np.where(order < size, order, np.where(drawn < size, drawn, -1)).tolist()
        self.seen += count
        self.count = min(size, self.seen)
        return places

    def _balanced(self, label: int, size: int, random: np.random.Generator) -> int:
        """A free place, or that of a random input of the largest class, if the own one is smaller; a uniform sample
        within the class otherwise."""
        counts = self._counts
        self.offered[label] += 1
        if self.count < size:
            place = self.count
            self.count += 1
        else:
            largest = int(counts.argmax())
            if counts[label] < counts[largest]:
                victims = np.flatnonzero(self.labels[:size] == largest)
            elif random.integers(self.offered[label]) < counts[label]:
                victims = np.flatnonzero(self.labels[:size] == label)
            else:
                return -1
            place = int(victims[random.integers(len(victims))])
            counts[self.labels[place]] -= 1
        counts[label] += 1
        self.labels[place] = label
        self.seen += 1
        return place

    def _reserve(self, rows: np.ndarray) -> None:
        """Arrays with places for these inputs."""
        if self.rows.shape[1:] != rows.shape[1:] or self.rows.dtype != rows.dtype:
            self.rows = np.zeros((0, *rows.shape[1:]), rows.dtype)
        size, needed = self.settings.size, self.count + len(rows)
        if len(self.rows) >= (needed if size is None else size):
            return
        wanted = needed + GROWTH if size is None else size
        for name in self.ARRAYS:
            old = getattr(self, name)
            new = np.zeros((wanted, *old.shape[1:]), old.dtype)
            new[: len(old)] = old
            setattr(self, name, new)
