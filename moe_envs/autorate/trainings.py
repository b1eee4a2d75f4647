"""The trainings that MoEAutoRate-v0 runs: what a context draws, and its steps on real data."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from experts.tasks import Task

SPLITS = ("train", "validation", "test")
CONTEXTS = {"train": 384, "validation": 128, "test": 128}
NUM_EXPERTS, TOP_K = 4, 2
WIDTHS, SCALES, SUBSET, NOISE, DECISIONS = (6, 24), (0.1, 10.0), 250, 0.4, (15, 44)
HELD_OUT = 200  # inputs to validate on, and as many others that judge


class Context(NamedTuple):
    """What a training is: `experts` of `width` hidden units, inputs times `scale`, a share of wrong labels."""

    sgd: bool
    experts: int
    width: int
    scale: float
    subset: int
    noise: float
    decisions: int


def draw(split: str, number: int, count: int) -> tuple[Context, np.random.Generator]:
    """A context by number, of a task with `count` inputs, and the generator of its weights and data."""
    generator = np.random.default_rng([17, SPLITS.index(split), number])
    shares = generator.uniform(size=6)
    low, high = np.log(WIDTHS)
    least = min(SUBSET, count)
    context = Context(
        sgd=number % 2 == 1,
        experts=int((1, 2, 4)[int(shares[0] * 3)]),
        width=round(float(np.exp(low + shares[1] * (high - low)))),
        scale=float(np.exp(np.log(SCALES[0]) + shares[2] * np.log(SCALES[1] / SCALES[0]))),
        subset=round(float(least * (count / least) ** shares[3])),
        noise=max(0.0, NOISE * (2 * shares[4] - 1)),
        decisions=DECISIONS[0] + int(shares[5] * (DECISIONS[1] - DECISIONS[0] + 1)),
    )
    return context, generator


class Trainings:
    """Real trainings of n contexts of one task, as one batch. The first half of the inputs that are held out validates,
    the second half judges."""

    STATE = ("_subset", "_size", "_labels", "_scale", "_place")

    def __init__(self, count: int, task: Task, batch_size: int) -> None:
        from experts.batched_training import BatchedTraining  # imports torch

        self.task, self.batch_size = task, batch_size
        self.training = BatchedTraining(
            count, task.inputs.shape[1], task.num_classes, num_experts=NUM_EXPERTS, width=WIDTHS[1], top_k=TOP_K
        )
        inputs = len(task.labels)
        self._subset = np.zeros((count, inputs), dtype=np.int32)
        self._labels = np.zeros((count, inputs), dtype=np.int16)
        self._size, self._place = np.ones((2, count), dtype=np.int64)
        self._scale = np.ones((count, 1, 1), dtype=np.float32)
        self._rows = np.arange(count)[:, None]
        held_out = min(HELD_OUT, len(task.validation_labels) // 2)
        self._held_out = task.validation_inputs[: 2 * held_out], task.validation_labels[: 2 * held_out]

    def begin(self, rows: np.ndarray, split: str, numbers: np.ndarray) -> list[Context]:
        """Start the trainings of these contexts."""
        drawn = [draw(split, number, len(self.task.labels)) for number in numbers.tolist()]
        for row, (context, generator) in zip(rows.tolist(), drawn, strict=True):
            self._subset[row, : context.subset] = generator.permutation(len(self.task.labels))[: context.subset]
            wrong = generator.random(len(self.task.labels)) < context.noise
            others = generator.integers(self.task.num_classes, size=len(self.task.labels))
            self._labels[row] = np.where(wrong, others, self.task.labels)
            self._size[row], self._scale[row] = context.subset, context.scale
        contexts = [context for context, _ in drawn]
        self._place[rows] = 0
        widths, experts, sgd = (
            np.array([getattr(each, name) for each in contexts]) for name in ("width", "experts", "sgd")
        )
        self.training.begin(rows, [generator for _, generator in drawn], widths, experts, sgd)
        return contexts

    def set(self, rates: np.ndarray) -> None:
        """Set the learning rates, `[n]`."""
        self.training.set(np.repeat(rates[:, None], 2, axis=1), np.zeros((len(rates), 2)))

    def step(self) -> np.ndarray:
        """One optimiser step in every training; returns losses `[n]`. Inputs come in the same order in each epoch."""
        places = (self._place[:, None] + np.arange(self.batch_size)) % self._size[:, None]
        self._place += self.batch_size
        chosen = self._subset[self._rows, places]
        inputs = self.task.inputs[chosen]
        inputs *= self._scale
        return self.training.step(inputs, self._labels[self._rows, chosen].astype(np.int64)).loss

    def validate(self) -> np.ndarray:
        """Losses on the inputs that validate and on those that judge, `[2, n]`."""
        inputs, labels = self._held_out
        half = len(labels) // 2
        scaled = inputs * self._scale
        return np.stack([
            self.training.evaluate(scaled[:, part], labels[part]).loss for part in (slice(half), slice(half, None))
        ])  # fmt: skip

    def state(self) -> dict[str, Any]:
        """Copy of the full state."""
        return {name: getattr(self, name).copy() for name in self.STATE} | {"training": self.training.state()}

    def restore(self, state: dict[str, Any]) -> None:
        """Restore a `state()`."""
        for name in self.STATE:
            getattr(self, name)[:] = state[name]
        self.training.restore(state["training"])

    def fits(self, state: Any) -> bool:
        """Whether this is a `state()` of as many trainings of the same task."""
        if not isinstance(state, dict) or set(state) != {*self.STATE, "training"}:
            return False
        return self.training.fits(state["training"]) and all(
            np.shape(state[name]) == getattr(self, name).shape for name in self.STATE
        )
