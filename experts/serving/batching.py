"""Requests that wait are put together into batches, when and as a controller says; one thread runs the model."""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from experts.serving.control import (
    NEVER,
    SCALES,
    WAIT,
    WAITS,
    Choices,
    Controller,
    RequestClass,
    Seen,
    Service,
    must_send,
    slower,
)

log = logging.getLogger("moe_envs.serve")
MEMORY = 0.9  # of the mean wait that remains after a batch


class QueueFullError(Exception):
    """More rows wait than may; `retry_after` seconds are a guess at when there is room."""

    def __init__(self, retry_after: float) -> None:
        super().__init__("the queue is full")
        self.retry_after = retry_after


class DeadlineError(Exception):
    """The deadline of a request passed before its batch was sent."""


@dataclass(eq=False)
class Waiting:
    """A request in the queue, `arrived` and due at times of `time.monotonic`; it waits for the answers to its inputs,
    which take as long as so many `rows` of the size that was timed."""

    inputs: Sequence[Any]
    rows: int
    number: int
    arrived: float
    due: float
    answers: asyncio.Future[tuple[list[Any], int]] = field(repr=False)


# Rows of several requests and a level: an answer for each row. Called in the batcher's thread.
Run = Callable[[list[Any], int], list[Any]]
# Rows, level and seconds of a batch that was run.
Watch = Callable[[int, int, float], object]


class Batcher:
    """One queue for each request class, one controller, one thread that runs batches.

    `controller` decides whenever the thread is free and something waits; `failed` is called where it raises an error.
    Requests whose deadline passed are not run.
    """

    def __init__(
        self, run: Run, controller: Controller, choices: Choices, service: Service,
        classes: Sequence[RequestClass] = (RequestClass(),), queue_size: int = 1024, watch: Watch = lambda *_: None,
        failed: Callable[[], object] = lambda: None,
    ) -> None:  # fmt: skip
        if choices.classes != len(classes):
            raise ValueError(f"{len(classes)} request classes, but the choices are for {choices.classes}")
        self.run, self.controller, self.choices, self.classes = run, controller, choices, tuple(classes)
        self.service, self.queue_size, self.watch, self.failed = service, queue_size, watch, failed
        self._fastest = float(service.seconds[:, 0].min())
        self._table, self._slow = service.table(choices.caps[-1]), 1.0
        self._queues: list[deque[Waiting]] = [deque() for _ in classes]
        self._arrived = asyncio.Event()
        self._rates, self._then = np.zeros(len(SCALES)), time.monotonic()
        self._last, self._waited = np.zeros(2), 0.0
        self._rows = np.zeros(len(classes), dtype=np.int64)
        self._thread = ThreadPoolExecutor(1, "model")
        self._task: asyncio.Task[None] | None = None
        self._starts, self._running = True, False

    @property
    def waiting(self) -> int:
        """Rows that wait."""
        return int(self._rows.sum())

    @property
    def alive(self) -> bool:
        """Whether batches are sent."""
        return self._task is not None and not self._task.done()

    def start(self) -> None:
        """Begin to send batches, in the running event loop."""
        self._task = asyncio.get_running_loop().create_task(self._send())

    async def stop(self) -> None:
        """Run what waits, then end."""
        while self.alive and (self.waiting or self._running):
            await asyncio.sleep(0.01)
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        self._thread.shutdown()

    async def submit(
        self, inputs: Sequence[Any], deadline: float | None = None, number: int = 0, rows: int | None = None
    ) -> Any:
        """Answers to the inputs of a request of class `number`, and the level; `deadline` in seconds from now. The
        inputs take as long as so many `rows` (default: as many as there are).

        Raises `QueueFullError` at once, or `DeadlineError` when the deadline has passed before they were begun.
        """
        rows = len(inputs) if rows is None else rows
        if self.waiting + rows > self.queue_size:
            raise QueueFullError(self._clearing())
        now = time.monotonic()
        due = now + min(deadline or self.classes[number].deadline, NEVER)
        asked = Waiting(inputs, rows, number, now, due, asyncio.get_running_loop().create_future())
        self._count(now, rows)
        self._queues[number].append(asked)
        self._rows[number] += rows
        self._arrived.set()
        return await asked.answers

    def _clearing(self) -> float:
        """Seconds in which the queue would be empty."""
        cap = self.choices.caps[-1]
        return math.ceil(self.waiting / cap) * float(self._table[0, cap])

    def _count(self, now: float, rows: int) -> None:
        """Exponential averages of the arrival rates."""
        self._rates *= np.exp((self._then - now) / np.array(SCALES))
        self._rates += rows / np.array(SCALES)
        self._then = now

    def seen(self) -> Seen:
        """What the controller sees."""
        now = time.monotonic()
        age = [now - queue[0].arrived if queue else 0.0 for queue in self._queues]
        slack = [min(each.due for each in queue) - now if queue else NEVER for queue in self._queues]
        return Seen(
            self._rows[None].copy(), np.array([age]), np.array([slack]).clip(0, NEVER), np.array([now - self._then]),
            (self._rates * np.exp((self._then - now) / np.array(SCALES)))[None], self._last[None].copy(),
            np.array([self._waited]), np.array([self._slow]),
        )  # fmt: skip

    async def _send(self) -> None:
        while True:
            try:
                await self._step()
            except Exception as error:  # those that wait are told, and the next are served
                log.exception("sending a batch failed")
                for queue in self._queues:
                    for asked in queue:
                        if not asked.answers.done():
                            asked.answers.set_exception(error)
                    queue.clear()
                self._rows[:] = 0
                await asyncio.sleep(WAIT)  # what fails again and again must not take the event loop

    async def _step(self) -> None:
        """Wait for a request, or as the controller says, or run a batch."""
        self._expire()
        if not self.waiting:
            self._arrived.clear()
            await self._arrived.wait()
            return
        choice = self._choice()
        if choice == WAITS:
            self._arrived.clear()
            with suppress(TimeoutError):
                await asyncio.wait_for(self._arrived.wait(), WAIT)
            return
        cap, level, order = (int(each) for each in self.choices.parts(choice))
        self._running = True
        try:
            await self._run(self._taken(cap, order), level)
        finally:
            self._running = False

    def _choice(self) -> int:
        """The controller's choice; a controller that fails, or waits although a deadline is near, sends all it can."""
        seen, at_once = self.seen(), int(self.choices.number(self.choices.caps[-1], 0))
        try:
            choice = int(self.controller.decide(seen, np.array([self._starts]))[0])
            if not 0 <= choice < len(self.choices):
                raise ValueError(f"choice {choice}: there are {len(self.choices)}")
        except Exception:
            log.exception("the controller failed; a batch is sent as it would be without one")
            self.failed()
            return at_once
        self._starts = False
        near = seen.slack.min() < must_send(self._fastest)
        return at_once if choice == WAITS and near else choice

    def _expire(self) -> None:
        """Give up requests that can no longer be answered in time."""
        hopeless = time.monotonic() + self._fastest
        for number, queue in enumerate(self._queues):
            late = [each for each in queue if each.due < hopeless or each.answers.done()]
            self._remove(number, late)
            for asked in late:
                if not asked.answers.done():
                    asked.answers.set_exception(DeadlineError("the deadline passed before an answer could be computed"))

    def _taken(self, cap: int, order: int) -> list[Waiting]:
        """Requests of the next batch, at least one, taken out of the queue."""
        numbers = [order - 2] if order >= 2 and self._queues[order - 2] else range(len(self.classes))
        asked = [each for number in numbers for each in self._queues[number]]
        worth = [each.value / each.size for each in self.classes]
        asked.sort(key=(lambda each: (-worth[each.number], each.due)) if order == 1 else (lambda each: each.due))
        taken, rows = list[Waiting](), 0
        for each in asked:
            if taken and rows + each.rows > cap:
                break
            taken.append(each)
            rows += each.rows
        for number in numbers:
            self._remove(number, [each for each in taken if each.number == number])
        return taken

    def _remove(self, number: int, asked: list[Waiting]) -> None:
        """Take requests of a class out of its queue."""
        if asked:
            gone = set(map(id, asked))
            self._queues[number] = deque(each for each in self._queues[number] if id(each) not in gone)
            self._rows[number] -= sum(each.rows for each in asked)

    async def _run(self, batch: list[Waiting], level: int) -> None:
        inputs, begun = [row for each in batch for row in each.inputs], time.monotonic()
        try:
            answers = await asyncio.get_running_loop().run_in_executor(self._thread, self.run, inputs, level)
        except Exception as error:  # of one batch: those after it are run
            for each in batch:
                if not each.answers.done():
                    each.answers.set_exception(error)
            return
        ended = time.monotonic()
        rows = sum(each.rows for each in batch)
        self._last = np.array([rows, ended - begun])
        known = self._table[level, min(rows, self.choices.caps[-1])]
        self._slow = float(slower(self._slow, (ended - begun) / known))
        wait = float(np.mean([begun - each.arrived for each in batch]))
        self._waited = MEMORY * self._waited + (1 - MEMORY) * wait
        self.watch(rows, level, ended - begun)
        for each in batch:
            mine, answers = answers[: len(each.inputs)], answers[len(each.inputs) :]
            if not each.answers.done():
                each.answers.set_result((mine, level))
