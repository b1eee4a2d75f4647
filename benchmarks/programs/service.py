"""`moe-serve` in a process of its own, for measurements."""

from __future__ import annotations

import asyncio
import json
import os
import re
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache

import numpy as np
import psutil

from benchmarks.cli.serve import KEYS
from benchmarks.programs.sender import HOST, request
from experts.data import DataError

READY = re.compile(r"http://127\.0\.0\.1:(\d+)")
SECONDS, PATIENCE = 120.0, 60.0  # to load and time the model, and to end
BUSY = "moe_batch_seconds_sum"  # seconds that the model has run
CODE = "from benchmarks.cli.main import serve; serve()"


@dataclass
class Serving:
    """A server that runs: where it listens, its process, and the last lines that it wrote to stderr."""

    port: int
    process: psutil.Process
    said: deque[str]

    @property
    def memory(self) -> int:
        """Bytes in memory."""
        return int(self.process.memory_info().rss)

    @property
    def cpu(self) -> float:
        """Seconds of processor time so far."""
        times = self.process.cpu_times()
        return float(times.user + times.system)


def predictions(model: str, rows: int = 1, request_class: str | None = None) -> list[bytes]:
    """64 requests for predictions, of so many of the model's examples each, of a class of requests (default: the
    server's first)."""
    every = _examples(model)
    several = [[every[(number + more) % len(every)] for more in range(rows)] for number in range(len(every))]
    more = {} if request_class is None else {"request_class": request_class}
    return [request("/predict", json.dumps({"inputs": each} | more).encode()) for each in several]


@cache
def _examples(model: str) -> list[list[float]]:
    from agents.deploy.serving import load

    return [np.round(row, 4).tolist() for row in load(model).examples(64)]


async def counted(port: int, counter: str = BUSY) -> float:
    """A counter of a server, summed over its labels."""
    reader, writer = await asyncio.open_connection(HOST, port)
    writer.write(b"GET /metrics HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
    text = (await reader.read()).decode()
    writer.close()
    return sum(float(line.split()[1]) for line in text.splitlines() if line.startswith(counter))


@contextmanager
def service(model: str, *options: str) -> Iterator[Serving]:
    """A server on a free port of this machine, stopped at the end; raises `DataError` with what it says if it does not
    start."""
    command = [sys.executable, "-c", CODE, model, "--port", "0", "--quiet", *options]
    env = {name: value for name, value in os.environ.items() if name != KEYS} | {"OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command, text=True, env=env, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL) as process:
        timer = threading.Timer(SECONDS, process.kill)
        timer.start()
        try:
            port, said = _port(process)
            timer.cancel()
            if port is None:
                raise DataError(f"the server of {model} did not start: {said.strip()}")
            said_last = deque[str](maxlen=20)
            threading.Thread(target=said_last.extend, args=(process.stderr,), daemon=True).start()
            yield Serving(port, psutil.Process(process.pid), said_last)
        finally:
            timer.cancel()
            process.terminate()
            try:
                process.wait(PATIENCE)
            except subprocess.TimeoutExpired:
                process.kill()


def _port(process: subprocess.Popen[str]) -> tuple[int | None, str]:
    said = ""
    assert process.stderr is not None
    for line in process.stderr:
        if found := READY.search(line):
            return int(found[1]), said
        said += line
    return None, said
