"""Work in several processes."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from typing import Any


def pool(jobs: int) -> ProcessPoolExecutor:
    """Processes that start afresh and inherit no threads."""
    return ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn"))


def gather(futures: Iterable[Future[Any]], report: Callable[[float], object]) -> list[Any]:
    """The results in order; `report` gets the share that is there. The first error ends what has not begun yet."""
    waiting = list(futures)
    for number, future in enumerate(as_completed(waiting)):
        if future.exception():
            for each in waiting:
                each.cancel()
            future.result()
        report((number + 1) / len(waiting))
    return [future.result() for future in waiting]
