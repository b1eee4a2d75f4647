"""Processes that tests start and stop: none outlives its test, and no wait for one lasts for ever."""

import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

SECONDS = 300.0  # many times what any of these processes takes


@contextmanager
def running(command: list[str], **options: Any) -> Iterator[subprocess.Popen[str]]:
    """A process that is killed at the end of the block, and after `SECONDS`, so that reads of its output end."""
    with subprocess.Popen(command, text=True, **options) as process:
        timer = threading.Timer(SECONDS, process.kill)
        timer.start()
        try:
            yield process
        finally:
            timer.cancel()
            process.kill()


def wait_until(condition: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    """Wait for what a process does; fails where it ends without having done it."""
    ended = False
    while not condition():
        assert not ended, f"the process ended with {process.returncode} too early"
        ended = process.poll() is not None  # and look once more at what it did last
        time.sleep(0.01)


def free_port() -> int:
    """A port of this machine on which nothing listens."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


class Here:
    """An executor of `benchmarks.runner` that makes each run in this process."""

    slots = 1

    def __init__(self, count: int) -> None:
        self.ended: Any = None

    def submit(self, call: Callable[..., object], *arguments: Any) -> int:
        self.ended = call(*arguments)
        return 0

    def wait(self, begun: Iterable[Any]) -> list[tuple[Any, Any, BaseException | None]]:
        return [(0, self.ended, None)]

    def close(self) -> None: ...
