"""When to send a batch, how large, at which quality level: what a controller sees, and its choices.

Shape legend: n queues, C request classes, L quality levels, R time scales.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

CAPS = (1, 2, 4, 8, 16, 32, 64)  # largest numbers of rows of a batch
SCALES = (0.02, 0.1, 0.5, 2.5)  # seconds over which arrival rates are averaged
WAIT = 0.005  # seconds that a controller waits at most before it is asked again
NEVER = 10.0  # seconds of slack of an empty queue
DEADLINE = 1.0  # seconds until an answer of `moe-serve` is worth nothing
WAITS = 0  # the choice to wait
LEARNED, STALLED = 0.3, 4.0  # what a batch counts in `slower`, and the most that it counts as


def slower(slow: Any, ratio: Any) -> Any:
    """The mean of seconds over known seconds after one more batch."""
    return slow + LEARNED * (np.clip(ratio, 1 / STALLED, STALLED) - slow)


def must_send(fastest: float) -> float:
    """Seconds of slack below which a controller may not wait: the fastest batch and two waits."""
    return fastest + 2 * WAIT


@dataclass(frozen=True)
class RequestClass:
    """Requests that are alike: seconds until an answer is worth nothing, value of an answer in time, rows of a request,
    and how much of the value the loss of quality takes, as a factor on that loss."""

    name: str = "default"
    deadline: float = 0.1
    value: float = 1.0
    size: int = 1
    care: float = 1.0

    def __post_init__(self) -> None:
        if not (0 < self.deadline <= NEVER and self.value >= 0 and self.care >= 0 and 1 <= self.size <= CAPS[-1]):
            raise ValueError(f"{self}: needs 0 < deadline <= {NEVER}, value, care >= 0, 1 <= size <= {CAPS[-1]}")


@dataclass(frozen=True)
class Service:
    """Measured seconds and, if known, joules `[L, S]` of batches of `sizes` rows at each quality level, best level
    first, and the `quality` `[L]` of the levels, 1 for the best."""

    levels: tuple[str, ...]
    sizes: tuple[int, ...]
    seconds: np.ndarray
    quality: np.ndarray
    joules: np.ndarray | None = None

    def table(self, most: int) -> np.ndarray:
        """Seconds `[L, most + 1]` of batches of 0 to `most` rows."""
        return self._interpolated(self.seconds, most)

    def energy(self, most: int) -> np.ndarray:
        """Joules `[L, most + 1]` of batches of 0 to `most` rows; raises `ValueError` where they were not measured."""
        if self.joules is None:
            raise ValueError("the energy of batches was not measured")
        return self._interpolated(self.joules, most)

    def _interpolated(self, values: np.ndarray, most: int) -> np.ndarray:
        """Values at 0 to `most` rows, linear between the sizes and beyond them."""
        rows, known = np.arange(most + 1), np.array((0, *self.sizes))
        found = np.array([np.interp(rows, known, (0.0, *each)) for each in values])
        if most > known[-1] and len(known) > 2:
            slope = (values[:, -1] - values[:, -2]) / (known[-1] - known[-2])
            found += slope[:, None] * np.maximum(rows - known[-1], 0)
        return found

    def line(self, level: int) -> tuple[float, float]:
        """Seconds of a batch as a + b * rows: (a, b), by least squares."""
        b, a = np.polyfit(self.sizes, self.seconds[level], 1) if len(self.sizes) > 1 else (0.0, self.seconds[level, 0])
        return max(float(a), 0.0), max(float(b), 0.0)


@dataclass
class Seen:
    """What a controller sees of n queues: rows that wait `[n, C]`, seconds that the oldest request waits `[n, C]`,
    seconds until the first deadline `[n, C]`, seconds since the last arrival `[n]`, arriving rows per second over
    `SCALES` `[n, R]`, rows and seconds of the last batch `[n, 2]`, mean seconds that served requests waited `[n]`, and
    how many times the known seconds the last batches took `[n]` (`slower`)."""

    queue: np.ndarray
    age: np.ndarray
    slack: np.ndarray
    since: np.ndarray
    rate: np.ndarray
    last: np.ndarray
    waited: np.ndarray
    slow: np.ndarray = field(default_factory=lambda: np.ones(1))


@dataclass(frozen=True)
class Choices:
    """Numbers of a controller's choices: 0 waits; the others are a cap, a level and an order in which requests are
    taken: the first deadline first, the highest value per row first, or one class only."""

    levels: int
    classes: int = 1
    caps: tuple[int, ...] = CAPS

    @property
    def orders(self) -> int:
        """Ways to choose among the classes."""
        return 1 if self.classes == 1 else 2 + self.classes

    def __len__(self) -> int:
        return 1 + len(self.caps) * self.levels * self.orders

    def number(self, cap: Any, level: Any, order: Any = 0) -> np.ndarray:
        """The choice of the largest cap that is not above this one."""
        place = np.searchsorted(self.caps, np.maximum(cap, 1), side="right") - 1
        return np.asarray(1 + (place * self.levels + level) * self.orders + order)

    def parts(self, choice: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Caps, levels and orders of choices that do not wait."""
        rest, order = np.divmod(np.asarray(choice) - 1, self.orders)
        place, level = np.divmod(rest, self.levels)
        return np.asarray(self.caps)[place], level, order


class Controller(Protocol):
    """Decides for queues in which something waits."""

    def decide(self, seen: Seen, starts: np.ndarray) -> np.ndarray:
        """Choices `[n]`; `starts` marks queues that have just begun."""
        ...


MakeController = Callable[[Choices, Service, Sequence[RequestClass]], Controller]
