"""An open-loop sender of HTTP requests: each is sent at its time, whatever became of those before it.

Latency counts from the time at which a request should have been sent, so that a server that stalls does not hide it.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import numpy as np

HOST = "127.0.0.1"
FAILED = 0  # status of a request whose connection broke or timed out


@dataclass
class Sent:
    """For each request: seconds from the intended time to the answer, status, answer; and seconds from the first
    intended time to the last answer."""

    latency: np.ndarray
    status: np.ndarray
    answers: list[bytes]
    seconds: float


def run_loop(work: Coroutine[Any, Any, Any]) -> Any:
    """Run a coroutine, by uvloop where it is installed."""
    return import_module("uvloop" if find_spec("uvloop") else "asyncio").run(work)


def request(path: str, body: bytes, media_type: str = "application/json", method: str = "POST") -> bytes:
    """An HTTP request."""
    head = f"{method} {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: {media_type}\r\nContent-Length: {len(body)}"
    return f"{head}\r\n\r\n".encode() + body


class Connections:
    """Connections that are kept open, at most so many; the last one used is the next."""

    def __init__(self, host: str, port: int, most: int, timeout: float) -> None:
        self.host, self.port, self.timeout = host, port, timeout
        self._free: list[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = []
        self._places = asyncio.Semaphore(most)

    async def ask(self, raw: bytes) -> tuple[int, bytes]:
        """Status and body of the answer; status 0 where the connection broke or the answer did not come."""
        async with self._places:
            while True:  # a connection that was closed while it was idle is replaced
                idle = bool(self._free)
                try:
                    reader, writer = self._free.pop() if idle else await asyncio.open_connection(self.host, self.port)
                    writer.write(raw)
                    status, body, kept = await asyncio.wait_for(_answer(reader), self.timeout)
                except TimeoutError:
                    return FAILED, b"timeout"
                except (OSError, asyncio.IncompleteReadError, ValueError, IndexError) as error:
                    if idle:
                        continue
                    return FAILED, str(error).encode()
                if kept:
                    self._free.append((reader, writer))
                else:
                    writer.close()
                return status, body

    def close(self) -> None:
        """Close all connections."""
        for _, writer in self._free:
            writer.close()
        self._free.clear()


async def _answer(reader: asyncio.StreamReader) -> tuple[int, bytes, bool]:
    head = (await reader.readuntil(b"\r\n\r\n")).lower()
    status = int(head[9:12])
    size = int(head.split(b"content-length:")[1].split(b"\r\n")[0])
    return status, await reader.readexactly(size), b"connection: close" not in head


async def send_at(
    times: np.ndarray, requests: Sequence[bytes], host: str, port: int, *, connections: int = 2000,
    timeout: float = 30.0,
) -> Sent:  # fmt: skip
    """Send request i of the list, which is gone through again and again, at `times[i]` seconds from now."""
    pool = Connections(host, port, connections, timeout)
    latency, status, answers = np.zeros(len(times)), np.zeros(len(times), dtype=np.int64), [b""] * len(times)
    begun, tasks = time.perf_counter() + 0.1, set[asyncio.Task[None]]()

    async def one(number: int, due: float) -> None:
        status[number], answers[number] = await pool.ask(requests[number % len(requests)])
        latency[number] = time.perf_counter() - due

    for number, moment in enumerate(times.tolist()):
        due = begun + moment
        if (wait := due - time.perf_counter()) > 0:
            await asyncio.sleep(wait)
        task = asyncio.get_running_loop().create_task(one(number, due))
        tasks.add(task)
        task.add_done_callback(tasks.discard)
    if tasks:
        await asyncio.wait(set(tasks))
    pool.close()
    return Sent(latency, status, answers, time.perf_counter() - begun)


async def send_all(
    requests: Sequence[bytes], seconds: float, host: str, port: int, *, connections: int = 32, timeout: float = 30.0,
    going: Callable[[], bool] = lambda: True,
) -> Sent:  # fmt: skip
    """As many requests as the server answers in these seconds, one after the other on each connection."""
    pool, latency, status, answers = Connections(host, port, connections, timeout), [], [], []
    begun = time.perf_counter()

    async def stream(place: int) -> None:
        while time.perf_counter() - begun < seconds and going():
            start = time.perf_counter()
            code, body = await pool.ask(requests[place % len(requests)])
            latency.append(time.perf_counter() - start)
            status.append(code)
            answers.append(body)
            place += connections

    await asyncio.gather(*(stream(place) for place in range(connections)))
    pool.close()
    return Sent(np.array(latency), np.array(status, dtype=np.int64), answers, time.perf_counter() - begun)
