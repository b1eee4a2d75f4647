"""Deferred Ctrl-C, progress bar, and SB3's table of values."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any


@contextmanager
def interruptible() -> Iterator[threading.Event]:
    """Event set by the first Ctrl-C; the second raises `KeyboardInterrupt` immediately. Main thread only."""
    wanted = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield wanted
        return

    def ask(*_: Any) -> None:
        wanted.set()
        signal.signal(signal.SIGINT, before)

    before = signal.signal(signal.SIGINT, ask)
    try:
        yield wanted
    finally:
        signal.signal(signal.SIGINT, before)


@contextmanager
def progress(name: str, done: int, total: int, shown: bool) -> Iterator[Callable[[int], None]]:
    """Return a function that updates the progress bar of the training steps, if one is shown."""
    if not shown:
        yield lambda done: None
        return
    from rich.progress import Progress

    with Progress() as bar:
        task = bar.add_task(name, total=total, completed=done)
        yield lambda done: bar.update(task, completed=done)


def show(values: Mapping[str, float]) -> None:
    """Print values by name, grouped by the prefix before the slash."""
    from rich.console import Console
    from rich.table import Table

    table, group = Table(show_header=False), ""
    for key in sorted(values):
        before, _, name = key.rpartition("/")
        if before != group:
            table.add_row(f"{before}/", "")
            group = before
        table.add_row(f"   {name}", f"{values[key]:.4g}")
    Console().print(table)
