"""Where runs are made: in processes of this machine, or by Ray's workers, through one interface."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Iterable
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from importlib.util import find_spec
from multiprocessing.connection import wait as wait_for
from threading import Thread
from typing import Any, Protocol

Ended = tuple[Any, Any, BaseException | None]  # what `submit` gave, what the call returned, the error it ended with


class Executor(Protocol):
    """Calls functions elsewhere, `slots` at a time."""

    slots: int

    def submit(self, call: Callable[..., object], *arguments: Any) -> Any:
        """Begin a call; raises nothing that the call raises."""

    def wait(self, begun: Iterable[Any]) -> list[Ended]:
        """Those that have ended, at least one; a process that died is an error of its call alone."""

    def close(self) -> None:
        """End what still runs."""


class Local:
    """Processes of this machine; each is a pool of its own, so that one that dies takes no other call with it."""

    def __init__(self, processes: int) -> None:
        self.slots = processes
        self._free = [pool() for _ in range(processes)]
        self._busy: dict[Future[object], ProcessPoolExecutor] = {}

    def submit(self, call: Callable[..., object], *arguments: Any) -> Any:
        """In a free process; one that died idle is replaced."""
        while True:
            mine = self._free.pop()
            try:
                future = mine.submit(call, *arguments)
            except BrokenProcessPool:
                mine.shutdown()
                self._free.append(pool())
                continue
            self._busy[future] = mine
            return future

    def wait(self, begun: Iterable[Any]) -> list[Ended]:
        """Those that have ended."""
        found: list[Ended] = []
        for future in wait(list(begun), return_when=FIRST_COMPLETED).done:
            mine, error = self._busy.pop(future), future.exception()
            if isinstance(error, BrokenProcessPool):
                mine.shutdown()
                mine = pool()
            self._free.append(mine)
            found.append((future, None if error else future.result(), error))
        return found

    def close(self) -> None:
        """End all processes."""
        for each in self._free:
            each.shutdown()
        for each in self._busy.values():
            for process in list((each._processes or {}).values()):
                process.terminate()
            each.shutdown(cancel_futures=True)


class Ray:
    """Workers of a Ray cluster, or of one that is started here where `address` is empty; the folder of the rows must be
    one that all of them share."""

    def __init__(self, address: str, processes: int) -> None:
        if find_spec("ray") is None:
            raise ValueError("ray is not installed: pip install 'moe-envs[ray]'")
        import ray

        self._ray, environment = ray, {"env_vars": {"OMP_NUM_THREADS": "1"}}
        if address:
            ray.init(address=address, runtime_env=environment, log_to_driver=False)
        else:
            local: dict[str, Any] = {"num_cpus": processes, "include_dashboard": False, "_node_ip_address": "127.0.0.1"}
            ray.init(**local, runtime_env=environment, log_to_driver=False)
        self.slots = processes
        self._call = ray.remote(num_cpus=1, max_retries=0)(_call)

    def submit(self, call: Callable[..., object], *arguments: Any) -> Any:
        """As a task that Ray does not try again."""
        return self._call.remote(call, *arguments)

    def wait(self, begun: Iterable[Any]) -> list[Ended]:
        """Those that have ended."""
        done, _ = self._ray.wait(list(begun), num_returns=1)
        return [self._ended(each) for each in done]

    def _ended(self, reference: Any) -> Ended:
        try:
            return reference, self._ray.get(reference), None
        except self._ray.exceptions.RayTaskError as error:
            return reference, None, error.cause if isinstance(error.cause, BaseException) else error
        except self._ray.exceptions.RayError as error:
            return reference, None, RuntimeError(f"a worker died: {str(error).splitlines()[0]}")

    def close(self) -> None:
        """Leave the cluster; one that was started here ends."""
        self._ray.shutdown()


def _call(call: Callable[..., object], *arguments: Any) -> object:
    return call(*arguments)


def pool(processes: int = 1) -> ProcessPoolExecutor:
    """Processes that start afresh, inherit no threads, compute in one, and end with the process that asked for them,
    killed or not."""
    return ProcessPoolExecutor(processes, multiprocessing.get_context("spawn"), initializer=_begin)


def _begin() -> None:
    os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        wait_for([parent.sentinel])
        os._exit(1)

    Thread(target=watch, daemon=True).start()
