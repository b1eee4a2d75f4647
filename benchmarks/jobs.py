"""Work in several processes."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ProcessPoolExecutor
from typing import Any


def pool(jobs: int) -> ProcessPoolExecutor:
    """Processes that start afresh and inherit no threads."""
    return ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn"))


def gather(futures: Iterable[Future[Any]], report: Callable[[float], object]) -> list[Any]:
    """The results in order; `report` gets the share that is there."""
    waiting, found = list(futures), []
    for future in waiting:
        found.append(future.result())
        report(len(found) / len(waiting))
    return found
