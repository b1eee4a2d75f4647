"""Executors of runs: local processes or Ray workers."""

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

Ended = tuple[Any, Any, BaseException | None]  # handle from `submit`, returned value, error


class Executor(Protocol):
    """Interface of executors, which run up to `slots` calls in parallel."""

    slots: int

    def submit(self, call: Callable[..., object], *arguments: Any) -> Any:
        """Start a call; its exceptions are reported by `wait`."""

    def wait(self, begun: Iterable[Any]) -> list[Ended]:
        """Wait for at least one call; a died process is an error of its own call only."""

    def close(self) -> None:
        """Stop running calls."""


class Local:
    """Local processes, each in its own pool, so that a dying process affects only its own call."""

    def __init__(self, processes: int) -> None:
        self.slots = processes
        self._free = [pool() for _ in range(processes)]
        self._busy: dict[Future[object], ProcessPoolExecutor] = {}

    def submit(self, call: Callable[..., object], *arguments: Any) -> Any:
        """Start a call in a free process; a process that died while idle is replaced."""
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
        """Wait for ended calls."""
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
        """Stop all processes."""
        for each in self._free:
            each.shutdown()
        for each in self._busy.values():
            for process in list((each._processes or {}).values()):
                process.terminate()
            each.shutdown(cancel_futures=True)


class Ray:
    """Workers of a Ray cluster, started locally if `address` is empty; all must share the folder of the rows."""

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
        """Start a call as a Ray task without retries."""
        return self._call.remote(call, *arguments)

    def wait(self, begun: Iterable[Any]) -> list[Ended]:
        """Wait for ended calls."""
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
        """Disconnect from the cluster; stop it if it was started here."""
        self._ray.shutdown()


def _call(call: Callable[..., object], *arguments: Any) -> object:
    return call(*arguments)


def pool(processes: int = 1) -> ProcessPoolExecutor:
    """Pool of spawned single-threaded processes that end with their parent, even if it is killed."""
    return ProcessPoolExecutor(processes, multiprocessing.get_context("spawn"), initializer=_begin)


def _begin() -> None:
    os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        wait_for([parent.sentinel])
        os._exit(1)

    Thread(target=watch, daemon=True).start()
