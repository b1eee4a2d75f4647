"""Requests of n episodes and the queues in which they wait, without a loop over rows or requests.

Shape legend: n rows, C request classes, M most requests of a class in an episode, R time scales.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from experts.serving.arrivals import SYNTHETIC, arrivals, at_rate, trace
from experts.serving.control import SCALES, RequestClass

APART = 1e3  # seconds between the times of two rows, so that one sorted array holds them all
FINE = 2.0**30  # times are multiples of its inverse, so that sums with multiples of APART are exact
MOST_SECONDS = 10.0  # of an episode; sums of exp(t / 0.02 s) stay finite
NUMBERS = {"train": 1, "validation": 2, "test": 3}


class Traffic:
    """Arrivals of each row and class in order of time, and how many have left the queue."""

    ARRAYS = ("times", "every", "sums", "totals", "heads")

    def __init__(
        self, rows: int, kind: str, split: str, seconds: float, classes: Sequence[RequestClass],
        shares: Sequence[float], highest: float,
    ) -> None:  # fmt: skip
        self.kind, self.split, self.seconds, self.classes = kind, split, seconds, tuple(classes)
        self.shares = np.cumsum(shares)
        self.size = np.array([each.size for each in classes])
        self.deadline = np.array([each.deadline for each in classes])
        self._of_row = APART * np.arange(rows)
        most = _most(kind, split, seconds, highest)
        count = len(classes)
        self._first = np.arange(rows)[:, None] * count * most + np.arange(count) * most  # in the flat array
        self.apart = APART * (np.arange(rows)[:, None] * count + np.arange(count))  # [n, C]
        self.times = np.zeros((rows, count, most)) + self.apart[..., None] + APART / 2  # where there is none
        self.every = np.zeros((rows, most)) + self._of_row[:, None] + APART / 2
        self.sums = np.zeros((rows, len(SCALES), most + 1))  # of rows * exp(t / scale) over arrivals before
        self.totals = np.zeros((rows, count, most + 1))  # of arrival times before
        self.heads = np.zeros((rows, count), dtype=np.int64)

    def begin(self, row: int, number: int, rate: float) -> np.ndarray:
        """The arrivals of episode `number` of the split, at a mean `rate` of rows; returns the requests by class."""
        generator = np.random.default_rng([NUMBERS[self.split], number])
        each = rate / float(self.size @ np.diff(self.shares, prepend=0.0))
        found = arrivals(self.kind, each, self.seconds, generator, self.split)[: self.every.shape[1]]
        found = np.floor(found * FINE) / FINE
        of_class = np.searchsorted(self.shares, generator.random(len(found)), side="right").clip(0, len(self.size) - 1)
        self.every[row] = self._of_row[row] + APART / 2
        self.every[row, : len(found)] = found + self._of_row[row]
        grown = self.size[of_class] * np.exp(found / np.array(SCALES)[:, None])
        self.sums[row] = 0
        self.sums[row, :, 1 : len(found) + 1] = grown.cumsum(1)
        self.sums[row, :, len(found) + 1 :] = self.sums[row, :, len(found)][:, None]
        for number_of_class in range(len(self.size)):
            mine = found[of_class == number_of_class]
            start = self.apart[row, number_of_class]
            self.times[row, number_of_class] = start + APART / 2
            self.times[row, number_of_class, : len(mine)] = mine + start
            self.totals[row, number_of_class] = 0
            self.totals[row, number_of_class, 1 : len(mine) + 1] = mine.cumsum()
        self.heads[row] = 0
        return np.bincount(of_class, minlength=len(self.size))

    def state(self) -> dict[str, np.ndarray]:
        """Copies of the arrays."""
        return {name: getattr(self, name).copy() for name in self.ARRAYS}

    def fits(self, state: Any) -> bool:
        """Whether this is a `state()` of the same arguments."""
        if not isinstance(state, dict) or set(state) != set(self.ARRAYS):
            return False
        mine = [getattr(self, name) for name in self.ARRAYS]
        return all(
            isinstance(given, np.ndarray) and given.shape == own.shape and given.dtype == own.dtype
            for given, own in zip((state[name] for name in self.ARRAYS), mine, strict=True)
        )

    def restore(self, state: dict[str, np.ndarray]) -> None:
        """Restore a `state()`."""
        for name, value in state.items():
            setattr(self, name, value.copy())

    def arrived(self, now: np.ndarray) -> np.ndarray:
        """Requests `[n, C]` that came until times `[n]` or `[n, C]`."""
        asked = (now if now.ndim == 2 else now[:, None]) + self.apart
        return np.asarray(np.searchsorted(self.times.ravel(), asked, side="right") - self._first)

    def queue(self, now: np.ndarray) -> np.ndarray:
        """Requests `[n, C]` that wait."""
        return self.arrived(now) - self.heads

    def expire(self, now: np.ndarray, fastest: float) -> np.ndarray:
        """Give up those that could not be answered in time any more; returns how many, `[n, C]`."""
        latest = now[:, None] + fastest - self.deadline
        hopeless = np.searchsorted(self.times.ravel(), latest + self.apart, side="left") - self._first
        gone = np.maximum(hopeless - self.heads, 0)
        self.heads += gone
        return np.asarray(gone)

    def next(self, now: np.ndarray) -> np.ndarray:
        """Times `[n]` of the next arrivals; far away where none comes."""
        place = self._came(now)
        return np.asarray(np.take_along_axis(self.every, np.minimum(place, self.every.shape[1] - 1)[:, None], 1)[:, 0]
                          - self._of_row)  # fmt: skip

    def recent(self, now: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Times `[n]` of the last arrivals, and rows a second, exponentially averaged over `SCALES`, `[n, R]`."""
        came = self._came(now)
        last = np.take_along_axis(self.every, np.maximum(came - 1, 0)[:, None], 1)[:, 0] - self._of_row
        sums = np.take_along_axis(self.sums, came[:, None, None], 2)[..., 0]
        return last, np.asarray(sums * np.exp(-now[:, None] / np.array(SCALES)) / np.array(SCALES))

    def _came(self, now: np.ndarray) -> np.ndarray:
        rows, most = self.every.shape
        return np.searchsorted(self.every.ravel(), now + self._of_row, side="right") - most * np.arange(rows)

    def oldest(self) -> np.ndarray:
        """Arrival times `[n, C]` of the first that wait."""
        place = np.minimum(self.heads, self.times.shape[2] - 1)[..., None]
        return np.asarray(np.take_along_axis(self.times, place, 2)[..., 0] - self.apart)

    def taken(
        self, rows: np.ndarray, queue: np.ndarray, cap: np.ndarray, order: np.ndarray, worth: np.ndarray
    ) -> np.ndarray:
        """Requests `[m, C]` of a batch of at most `cap` rows `[m]` in each of these m rows, at least one request: by
        their deadlines (order 0), by `worth` `[C]` (1), or of class order - 2, all if none of that class waits."""
        classes = np.arange(len(self.size))
        if len(classes) == 1:
            return np.minimum(queue, np.maximum(cap // self.size[0], 1)[:, None])
        window = np.arange(cap.max(initial=1))
        place = np.minimum(self.heads[rows][..., None] + window, self.times.shape[2] - 1)
        times = self.times[rows[:, None, None], classes[:, None], place]
        due = times - self.apart[rows][..., None] + self.deadline[:, None]
        there = window < queue[..., None]
        alone = (order >= 2) & np.take_along_axis(queue, np.maximum(order - 2, 0)[:, None], 1)[:, 0].astype(bool)
        there &= ~alone[:, None, None] | (classes == (order - 2)[:, None])[..., None]
        key = np.where((order == 1)[:, None, None], due - APART * worth[:, None], due)
        key = np.where(there, key, np.inf).reshape(len(rows), len(classes) * len(window))
        first = key.argsort(1, kind="stable")
        sizes = np.where(there, self.size[:, None], 0).reshape(key.shape)
        sizes = np.take_along_axis(sizes, first, 1)
        goes = (sizes.cumsum(1) <= cap[:, None]) & (sizes > 0)
        goes[:, :1] = True
        chosen = np.zeros_like(goes)
        np.put_along_axis(chosen, first, goes, 1)
        return np.asarray(chosen.reshape(there.shape).sum(2))

    def late(self, taken: np.ndarray, end: np.ndarray) -> np.ndarray:
        """Of the requests taken from the front, those `[n, C]` whose deadline is before `end` `[n]`."""
        limit = end[:, None] - self.deadline + self.apart
        place = np.searchsorted(self.times.ravel(), limit, side="left") - self._first
        return np.asarray((place - self.heads).clip(0, taken))

    def arrival_sums(self, taken: np.ndarray) -> np.ndarray:
        """Sums `[n, C]` of the arrival times of the requests taken from the front."""
        ends = np.take_along_axis(self.totals, (self.heads + taken)[..., None], 2)
        return np.asarray((ends - np.take_along_axis(self.totals, self.heads[..., None], 2))[..., 0])


def _most(kind: str, split: str, seconds: float, rate: float) -> int:
    """More requests than an episode has."""
    if kind in SYNTHETIC:
        highest = rate * (4.0 if kind == "bursts" else 1.0) * seconds  # as if all were one burst
        return int(highest + 8 * highest**0.5 + 16)
    times = at_rate(trace(kind, split), rate)
    turns = 1 + int(np.ceil(seconds / times[-1]))
    several = (np.arange(turns)[:, None] * (times[-1] + 1 / rate) + times).ravel()
    return int((np.searchsorted(several, times + seconds) - np.arange(len(times))).max() + 2)
