"""Ctrl-C that waits for a good moment, and a progress bar."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from agents.learner import Learner


@contextmanager
def interruptible() -> Iterator[threading.Event]:
    """An event that the first Ctrl-C sets; the second raises `KeyboardInterrupt` at once. Main thread only."""
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
def progress(learner: Learner, shown: bool) -> Iterator[Callable[[], None]]:
    """What brings a bar of the training's steps up to date; nothing where none is to be shown."""
    if not shown:
        yield lambda: None
        return
    from rich.progress import Progress

    with Progress() as bar:
        task = bar.add_task(learner.name, total=learner.goal, completed=learner.num_timesteps)
        yield lambda: bar.update(task, completed=learner.num_timesteps)
