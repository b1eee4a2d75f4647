"""Work in several processes."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from multiprocessing.connection import wait
from pathlib import Path
from threading import Thread
from typing import Any

from filelock import FileLock


def pool(jobs: int) -> ProcessPoolExecutor:
    """Processes that start afresh, inherit no threads, compute in one, and end with the process that asked for them,
    killed or not."""
    return ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn"), initializer=_begin)


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


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """A lock beside a file or a folder, which other processes wait for."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(path.with_name(f".{path.name}.lock")):
        yield


def _begin() -> None:
    os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        wait([parent.sentinel])
        os._exit(1)

    Thread(target=watch, daemon=True).start()
