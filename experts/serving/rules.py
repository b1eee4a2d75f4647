"""The known rules that decide when to send a batch, how large, at which quality level.

The same rules run in the server, for one queue, and in MoEServing-v0, for n queues at once.

Shape legend: n queues, C request classes, L quality levels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from inspect import signature
from math import isfinite
from typing import Any

import numpy as np

from cost.arguments import choose
from cost.machine import fingerprint
from experts.serving.control import (
    CAPS,
    SCALES,
    WAIT,
    WAITS,
    Choices,
    Controller,
    MakeController,
    RequestClass,
    Seen,
    Service,
)


@dataclass
class Fixed:
    """Batches of up to `cap` rows at one level, sent when they are full or the oldest request waits `timeout` s."""

    choices: Choices
    cap: int = CAPS[-1]
    timeout: float = 0.0
    level: int = 0
    order: int = 0

    def decide(self, seen: Seen, starts: np.ndarray) -> np.ndarray:
        """Choices `[n]`."""
        send = (seen.queue.sum(1) >= self.cap) | (seen.age.max(1) >= self.timeout)
        return np.where(send, self.choices.number(self.cap, self.level, self.order), WAITS)


@dataclass
class Regression:
    """BentoML's adaptive batching (`CorkDispatcher`): a batch of n rows takes a n + b seconds; wait while
    n (w + dt + a) is at most 0.95 of the mean wait, where w is how long the newest request waits."""

    choices: Choices
    service: Service
    level: int = 0
    cap: int = CAPS[-1]
    order: int = 0
    decay: float = 0.95

    def decide(self, seen: Seen, starts: np.ndarray) -> np.ndarray:
        """Choices `[n]`."""
        _, a = self.service.line(self.level)
        queue = seen.queue.sum(1)
        wait = (queue < self.cap) & (queue * (seen.since + WAIT + a * seen.slow) <= self.decay * seen.waited)
        return np.where(wait, WAITS, self.choices.number(self.cap, self.level, self.order))


class Adaptive:
    """Clipper's additive increase, multiplicative decrease (Crankshaw et al. 2017) of the cap: one row more after a
    batch within `target` seconds, `decrease` times after a slower one."""

    def __init__(
        self, choices: Choices, target: float, level: int = 0, timeout: float = 0.0, order: int = 0,
        decrease: float = 0.9,
    ) -> None:  # fmt: skip
        if not 0 < decrease < 1:
            raise ValueError(f"decrease={decrease:g}: must be between 0 and 1")
        self.choices, self.target, self.level, self.timeout = choices, target, level, timeout
        self.order, self.decrease = order, decrease
        self._cap = np.zeros(0)
        self._seen = np.zeros((0, 2))
        self._sent = np.zeros(0, dtype=np.bool_)  # the last choice; one that waited may have been overruled

    def decide(self, seen: Seen, starts: np.ndarray) -> np.ndarray:
        """Choices `[n]`."""
        if len(self._cap) != len(starts):
            self._cap, self._seen = np.ones(len(starts)), np.zeros((len(starts), 2))
            self._sent = np.zeros(len(starts), dtype=np.bool_)
        self._cap[starts], self._seen[starts], self._sent[starts] = 1.0, 0.0, False
        new = (self._sent | (seen.last != self._seen).any(1)) & (seen.last[:, 0] > 0)
        slow = seen.last[:, 1] > self.target
        self._cap = np.where(new, np.where(slow, self.decrease * self._cap, self._cap + 1), self._cap)
        self._cap = self._cap.clip(1, self.choices.caps[-1])
        self._seen = seen.last.copy()
        send = self._sent = (seen.queue.sum(1) >= self._cap.astype(int)) | (seen.age.max(1) >= self.timeout)
        return np.where(send, self.choices.number(self._cap.astype(int), self.level, self.order), WAITS)


@dataclass
class SlackFit:
    """SuperServe's SlackFit (Khare et al. 2025): of the pairs of cap and level whose time fits into the slack of the
    most urgent request, those in the slowest of `buckets` equal spans of time; of them the largest cap, then the best
    level."""

    choices: Choices
    service: Service
    buckets: int = 32
    margin: float = 0.0
    order: int = 0

    def __post_init__(self) -> None:
        caps = np.array(self.choices.caps)
        seconds = self.service.table(int(caps[-1]))[:, caps]  # [L, caps]
        self._span = float(seconds.max()) / self.buckets
        levels, places = np.indices(seconds.shape)
        bucket = np.minimum((seconds / self._span).astype(int), self.buckets - 1)
        rank = np.lexsort((levels.ravel(), -places.ravel(), -bucket.ravel()))  # what is taken first
        self._seconds = seconds.ravel()[rank]
        self._numbers = self.choices.number(caps[places.ravel()[rank]], levels.ravel()[rank], self.order)
        self._fastest = int(self._seconds.argmin())

    def decide(self, seen: Seen, starts: np.ndarray) -> np.ndarray:
        """Choices `[n]`."""
        fits = self._seconds * seen.slow[:, None] <= (seen.slack.min(1) - self.margin)[:, None]
        found = np.where(fits.any(1), fits.argmax(1), self._fastest)
        return np.asarray(self._numbers[found])


@dataclass
class Thresholds:
    """Thresholds on queue and arrival rate: the best level at which neither the queue is above `queues[level]` rows nor
    the rate above `rates[level]` rows a second (the last level has none); batches of up to `cap` rows are sent when
    `fill` rows wait, or the first deadline is as near as the batch takes and `margin` seconds more."""

    choices: Choices
    service: Service
    queues: Sequence[float] = ()
    rates: Sequence[float] = ()
    cap: int = CAPS[-1]
    fill: int = 1
    margin: float = 0.02
    scale: int = 1
    order: int = 0

    def __post_init__(self) -> None:
        self._table = self.service.table(self.choices.caps[-1])

    def decide(self, seen: Seen, starts: np.ndarray) -> np.ndarray:
        """Choices `[n]`."""
        queue, rate = seen.queue.sum(1), seen.rate[:, self.scale]
        above = (queue[:, None] > np.asarray(self.queues)) | (rate[:, None] > np.asarray(self.rates))
        level = np.where(above.any(1), above.shape[1] - above[:, ::-1].argmax(1), 0)
        rows = np.minimum(queue, self.cap).astype(int)
        near = seen.slack.min(1) <= self._table[level, rows] * seen.slow + self.margin
        send = (queue >= self.fill) | near
        return np.where(send, self.choices.number(self.cap, level, self.order), WAITS)


@dataclass
class ServingPlan:
    """Of all caps and levels, the one that pays best at the present arrival rate: whose batches fill and are answered
    within the deadline, keep up with the arrivals, and leave most of the value after the price of the time. A batch is
    sent when it is full, or when the first deadline leaves just the time for it.

    A second of the model costs `price` times the value that arrives in a second. `ahead` multiplies the measured
    arrival rate over `SCALES[scale]`; `margin` are seconds.
    """

    choices: Choices
    service: Service
    classes: Sequence[RequestClass] = (RequestClass(),)
    price: float = 0.1
    ahead: float = 1.1
    margin: float = 0.02
    scale: int = 2
    order: int = 0

    def __post_init__(self) -> None:
        caps, table = np.array(self.choices.caps), self.service.table(self.choices.caps[-1])
        self._table, self._caps, self._seconds = table, caps, table[:, caps]  # [L, caps]
        value, care, size = (
            np.array([getattr(each, name) for each in self.classes]) for name in ("value", "care", "size")
        )
        self._values = (value / size)[:, None] * (1 - care[:, None] * (1 - self.service.quality)).clip(0)  # [C, L]
        self._deadline = min(each.deadline for each in self.classes)

    def decide(self, seen: Seen, starts: np.ndarray | None = None) -> np.ndarray:
        """Choices `[n]`."""
        queue, rows, caps = seen.queue.sum(1), np.arange(len(seen.queue)), self._caps
        every = self._seconds * seen.slow[:, None, None]  # [n, L, caps]
        rate = self.ahead * np.maximum(seen.rate[:, self.scale], 1e-3)
        row_value = (seen.queue @ self._values) / np.maximum(queue, 1)[:, None]  # [n, L]
        cost = self.price * (rate * row_value[:, 0])[:, None, None] * every / caps
        filled = (caps - queue[:, None]).clip(0) / rate[:, None]  # seconds until a batch is full, [n, caps]
        due = np.minimum(seen.slack.min(1), self._deadline)[:, None, None]
        fits = filled[:, None] + every + self.margin <= due
        # what waits beyond the deadline's share of arrivals has to be worked off, too
        needed = np.maximum(rate, queue / self._deadline)[:, None, None]
        net = np.where(fits & (caps / every >= needed), row_value[:, :, None] - cost, -np.inf)
        hurried = np.where(every <= due, caps / every, 1e-9 / every)  # where nothing keeps up
        flat = np.where(np.isfinite(net).any((1, 2)), net.reshape(len(rows), -1).argmax(1),
                        hurried.reshape(len(rows), -1).argmax(1))  # fmt: skip
        level, place = np.divmod(flat, len(caps))
        cap = caps[place]
        seconds = self._table[level, np.minimum(queue, cap).astype(int)] * seen.slow
        send = (queue >= cap) | (seen.slack.min(1) <= seconds + self.margin)
        return np.where(send, self.choices.number(cap, level, self.order), WAITS)


@dataclass
class ByClass:
    """Batches of one class of requests each. A class is ready when `fills[class]` rows of it wait, or its first
    deadline is as near as its batch takes and `leads[class]` seconds more; of those that are ready the one with the
    first deadline less lead is served, up to `caps[class]` rows at `levels[class]`, or at the level below if more than
    `queues[class]` rows wait in all classes."""

    choices: Choices
    service: Service
    levels: Sequence[int] = ()
    caps: Sequence[int] = ()
    fills: Sequence[int] = ()
    leads: Sequence[float] = ()
    queues: Sequence[float] = ()

    def __post_init__(self) -> None:
        count = self.choices.classes
        of_class = {name: getattr(self, name) for name in ("levels", "caps", "fills", "leads", "queues")}
        if count < 2 or any(len(each) != count for each in of_class.values()):
            raise ValueError(f"by-class is for several classes, and needs {', '.join(of_class)} of each of the {count}")
        if not all(0 <= each < self.choices.levels for each in self.levels):
            raise ValueError(f"levels={self.levels}: the model has {self.choices.levels}, from 0, the best")
        self._table = self.service.table(self.choices.caps[-1])
        self._levels, self._caps, self._fills, self._leads, self._queues = map(np.asarray, of_class.values())

    def decide(self, seen: Seen, starts: np.ndarray) -> np.ndarray:
        """Choices `[n]`."""
        crowded = seen.queue.sum(1)[:, None] > self._queues
        level = np.minimum(self._levels + crowded, self.choices.levels - 1)  # [n, C]
        seconds = self._table[level, np.minimum(seen.queue, self._caps).astype(int)] * seen.slow[:, None]
        left = seen.slack - self._leads
        ready = (seen.queue > 0) & ((seen.queue >= self._fills) | (left <= seconds))
        number, rows = np.where(ready, left, np.inf).argmin(1), np.arange(len(left))
        sent = self.choices.number(self._caps[number], level[rows, number], 2 + number)
        return np.where(ready.any(1), sent, WAITS)


RULES: dict[str, tuple[type[Any], bool]] = {  # whether it takes the measured times
    "plan": (ServingPlan, True), "slackfit": (SlackFit, True), "thresholds": (Thresholds, True),
    "fixed": (Fixed, False), "regression": (Regression, True), "adaptive": (Adaptive, False),
    "by-class": (ByClass, True),
}  # fmt: skip

LEAST = {"cap": 1, "caps": 1, "fill": 1, "fills": 1, "buckets": 1}  # of parameters that must not be 0


def default(choices: Choices, service: Service, classes: Sequence[RequestClass]) -> Controller:
    """What decides where nothing else is asked for: SlackFit by the times measured, which never waits."""
    return SlackFit(choices, service)


def tuned_rule_of(manifest: Mapping[str, Any], classes: Sequence[RequestClass]) -> str | None:
    """The rule that was tuned for a model at its export, if that was on this machine and for these requests."""
    found, deadline = manifest.get("tuned_rule"), classes[0].deadline
    if not isinstance(found, dict) or manifest.get("fingerprint") != fingerprint():
        return None
    fits = list(classes) == [RequestClass(deadline=deadline)] and found.get("deadline") == deadline
    return str(found.get("rule")) if fits else None


def rule_of(text: str) -> MakeController:
    """The rule of "name" or "name:parameter=value,...", as "fixed:cap=16,timeout=0.005"; several values of a parameter
    are separated by "/". Raises `ValueError` with what there is."""
    name, _, rest = text.partition(":")
    choose("controller", name, RULES)
    rule, timed = RULES[name]
    known = [each for each in signature(rule).parameters if each not in ("choices", "service", "classes")]
    given = dict[str, Any]()
    for part in filter(None, rest.split(",")):
        key = part.partition("=")[0]
        choose(f"parameter of {name}", key, known)
        given[key] = _value(part, str(signature(rule).parameters[key].annotation))
    if given.get("scale", 0) >= len(SCALES):
        raise ValueError(f"scale={given['scale']}: there are {len(SCALES)}, from 0")

    def make(choices: Choices, service: Service, classes: Sequence[RequestClass]) -> Controller:
        if not 0 <= given.get("level", 0) < choices.levels:
            raise ValueError(f"level={given['level']}: the model has {choices.levels}, from 0, the best")
        if not 0 <= given.get("order", 0) < choices.orders:
            raise ValueError(
                f"order={given['order']}: with {choices.classes} classes there are {choices.orders}, from 0"
            )
        count = len(given.get("queues", ()))
        if name == "thresholds" and not 0 < count == len(given.get("rates", ())) < choices.levels:
            raise ValueError(f"queues and rates: as many of each, 1 or more, fewer than the {choices.levels} levels")
        own: dict[str, Any] = {"classes": classes} if name == "plan" else {}
        if name == "adaptive":
            own = {"target": min(each.deadline for each in classes) / 2}
        found: Controller = rule(choices, *([service] if timed else []), **(own | given))
        return found

    return make


def _value(part: str, kind: str) -> Any:
    """The value of a "parameter=value" whose annotation is `kind`."""
    key, _, text = part.partition("=")
    several, number = kind.startswith("Sequence"), int if "int" in kind else float
    try:
        found = [number(each) for each in text.split("/")]
        if not all(map(isfinite, found)) or (len(found) > 1 and not several):
            raise ValueError
    except ValueError:
        said = "WHOLE_NUMBER" if number is int else "NUMBER"
        raise ValueError(f"{part!r} is not {key}={said}{f'/{said}/...' * several}") from None
    if min(found) < (least := LEAST.get(key, 0)):
        raise ValueError(f"{part!r}: must be at least {least}")
    return found if several else found[0]
