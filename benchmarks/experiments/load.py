"""Does the server keep its latency under load, and live through what it is not made for?

A process runs `moe-serve`, this one sends requests to it: at given times, whatever became of those before (latency
counts from the intended time); as fast as they are answered; while the model is loaded again and again, half of the
times from a damaged file; or hostile ones. Both are on this machine and share its processors. Run it on an otherwise
idle machine.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd

from benchmarks.programs.sender import FAILED, HOST, Connections, Sent, request, run_loop, send_all, send_at
from benchmarks.programs.service import Serving, predictions, service
from benchmarks.results.statistics import seeds_interval
from benchmarks.runner.setup import Arguments
from experts.serving.arrivals import arrivals
from experts.serving.export import export
from experts.serving.sources import of_bundle

What = Literal["ceiling", "arrivals", "overload", "reloads", "hostile"]
SEEDS = (0, 1, 2)
SETTINGS: dict[str, dict[str, Any]] = {
    "ceiling": {"what": "ceiling"},
    "one after the other": {"what": "ceiling", "connections": 1},
    "Poisson, 500/s": {"rate": 500},
    "bursts, 400/s": {"rate": 400, "pattern": "bursts"},
    "overload": {"what": "overload", "rate": 3000},
    "reloads": {"what": "reloads", "rate": 200, "reloads": 100, "model": "digits"},
    "hostile": {"what": "hostile", "rate": 100, "hostile": 10_000},
}
QUICK: dict[str, Any] = {"seeds": [0], "setups": {
    "short": {"model": "digits", "rate": 20, "seconds": 1},
    "ceiling, short": {"what": "ceiling", "model": "digits", "seconds": 0.5},
    "overload, short": {"what": "overload", "model": "digits", "rate": 3000, "seconds": 1, "after": 1},
    "reloads, short": {"what": "reloads", "model": "digits", "rate": 20, "reloads": 4},
    "hostile, short": {"what": "hostile", "model": "digits", "rate": 20, "hostile": 200},
}}  # fmt: skip


class LoadSetup(Arguments):
    """`rate` requests a second for `seconds`, in a `pattern`: "poisson", "bursts", or a file of arrivals; over at most
    so many `connections`. After an "overload" half of what was answered is sent for `after` seconds."""

    what: What = "arrivals"
    model: str = "fashion-mnist"
    controller: Literal["default"] | str = "default"
    pattern: Literal["poisson", "bursts"] | str = "poisson"
    rate: float = 100.0
    seconds: float = 20.0
    connections: int = 512
    deadline: float = 0.25
    after: float = 10.0
    reloads: int = 100
    hostile: int = 1000


Setup = LoadSetup


def measure(setup: LoadSetup, seed: int, split: str, folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Rates, latencies, statuses, memory."""
    model = setup.model
    if setup.what == "reloads":
        model = str(folder / "model")
        export(of_bundle(setup.model), model, "onnx", "1.0.0")
    options = ["--deadline", str(setup.deadline)]
    options += [] if setup.controller == "default" else ["--controller", setup.controller]
    asked = predictions(model)
    with service(model, *options) as server:
        warm = run_loop(send_all(asked, 2.0 if setup.seconds > 1 else 0.2, HOST, server.port))
        assert (warm.status == 200).any(), warm.answers[:1]
        times = arrivals(setup.pattern, setup.rate, setup.seconds, np.random.default_rng(seed))
        found = {"ceiling": _ceiling, "arrivals": _arrivals, "overload": _overload, "reloads": _reloads,
                 "hostile": _hostile}[setup.what](setup, server, asked, times, Path(model))  # fmt: skip
    return {"requests": len(times)}, found


def _ceiling(setup: LoadSetup, server: Serving, asked: list[bytes], times: np.ndarray, place: Path) -> dict[str, Any]:
    connections = min(setup.connections, 32)
    return _about(run_loop(send_all(asked, setup.seconds, HOST, server.port, connections=connections)), server, setup)


def _arrivals(setup: LoadSetup, server: Serving, asked: list[bytes], times: np.ndarray, place: Path) -> dict[str, Any]:
    memory = server.memory
    sent = run_loop(send_at(times, asked, HOST, server.port, connections=setup.connections))
    return _about(sent, server, setup) | {"growth": server.memory / memory - 1}


def _overload(setup: LoadSetup, server: Serving, asked: list[bytes], times: np.ndarray, place: Path) -> dict[str, Any]:
    """Too many requests, and at once half of what the server can answer."""
    found = _arrivals(setup, server, asked, times, place)
    rest = np.arange(0, setup.after, 2 / max(found["answered"], 1))
    after = run_loop(send_at(rest, asked, HOST, server.port, connections=setup.connections))
    slow = rest[(after.latency > LATE) | (after.status != 200)].astype(int)
    calm = np.setdiff1d(np.arange(int(setup.after) + 1), slow)  # whole seconds; the last one has no requests: never
    return found | {
        "recovered": float(calm[0]),
        "p95_afterwards": float(np.percentile(after.latency, 95)),
    }


LATE = 0.1  # seconds of an answer after which the server has not recovered


def _reloads(setup: LoadSetup, server: Serving, asked: list[bytes], times: np.ndarray, place: Path) -> dict[str, Any]:
    """Loads the model while requests come, every other time from a damaged file."""
    whole, seconds = (place / "model.onnx").read_bytes(), dict[str, list[float]]()

    async def reload() -> Counter[int]:
        statuses, pool = Counter[int](), Connections(HOST, server.port, 1, 60.0)
        for number in range(setup.reloads):
            damaged = number % 2 == 1
            (place / "model.onnx").write_bytes(whole[:-1] + b"x" if damaged else whole)
            begun = time.perf_counter()
            status, _ = await pool.ask(request("/reload", b""))
            seconds.setdefault("damaged" if damaged else "whole", []).append(time.perf_counter() - begun)
            statuses[status] += 1
        os.kill(server.process.pid, signal.SIGHUP)
        pool.close()
        return statuses

    async def both() -> tuple[Sent, Counter[int]]:
        reloading = asyncio.get_running_loop().create_task(reload())
        sent = await send_all(asked, 3600.0, HOST, server.port, connections=4, going=lambda: not reloading.done())
        return sent, await reloading

    sent, statuses = run_loop(both())
    other = statuses.total() - statuses[200] - statuses[409]
    named = {"loaded": statuses[200], "damaged": statuses[409], "other": other}
    return _about(sent, server, setup) | named | {f"{name}_s": float(np.median(each)) for name, each in seconds.items()}


def _hostile(setup: LoadSetup, server: Serving, asked: list[bytes], times: np.ndarray, place: Path) -> dict[str, Any]:
    """Requests that should be refused, beside honest ones and connections that say nothing or go on for ever."""
    random = np.random.default_rng(0)
    raw, memory = [_mean_request(random) for _ in range(setup.hostile)], server.memory
    silent = [_opened(server.port, b"POST /predict HTTP/1.1\r\nHost: x\r\nX-Slow:") for _ in range(50)]

    async def both() -> tuple[Sent, Sent]:
        going = asyncio.get_running_loop().create_task(send_all(asked, 3600.0, HOST, server.port, connections=2,
                                                                going=lambda: not done.is_set()))  # fmt: skip
        try:
            mean = await send_each(raw, server.port)
        finally:
            done.set()
        return mean, await going

    done = asyncio.Event()
    mean, honest = run_loop(both())
    for each in silent:
        each.close()
    statuses = Counter(mean.status.tolist())
    wrong = sum(count for status, count in statuses.items() if not 400 <= status < 500)
    growth = server.memory / memory - 1
    return _about(honest, server, setup) | {"statuses": {str(key): value for key, value in sorted(statuses.items())},
                                     "not_4xx": wrong, "growth": growth}  # fmt: skip


async def send_each(raw: list[bytes], port: int, connections: int = 16) -> Sent:
    """Each request once, on a connection of its own, which its sender closes; status 0 where none came back."""
    places, status = asyncio.Semaphore(connections), np.zeros(len(raw), dtype=np.int64)

    async def one(number: int) -> None:
        async with places:
            pool = Connections(HOST, port, 1, 30.0)
            status[number], _ = await pool.ask(raw[number])
            pool.close()

    begun = time.perf_counter()
    await asyncio.gather(*(one(number) for number in range(len(raw))))
    return Sent(np.zeros(len(raw)), status, [], time.perf_counter() - begun)


def _mean_request(random: np.random.Generator) -> bytes:
    """A request that is wrong in one of many ways."""
    noise = random.bytes(int(random.integers(1, 2000)))
    bodies: list[Callable[[], bytes]] = [
        lambda: request("/predict", noise),
        lambda: request("/predict", b"[" * int(random.integers(1, 50_000))),
        lambda: request("/predict", b'{"inputs":' + b'{"a":' * int(random.integers(1, 5000))),
        lambda: request("/predict", json.dumps({"inputs": [[0.5] * int(random.integers(0, 60))]}).encode()),
        lambda: request("/predict", b'{"inputs": [[1e999, "x", null]]}'),
        lambda: request("/predict", noise, "image/png"),
        lambda: request("/predict", b"\x93NUMPY\x01\x00" + noise, "application/x-npy"),
        lambda: request("/predict", noise, "text/html"),
        lambda: request("/predict", b"x" * 5_000_000),
        lambda: request("/" + noise[:20].hex(), noise),
        lambda: request("/predict", b"", method="DELETE"),
        lambda: b"POST /predict HTTP/1.1\r\nContent-Length: -5\r\n\r\n",
        lambda: noise.replace(b"\r", b"x") + b"\r\n\r\n",
        lambda: request("/generate", b'{"prompt": "x"}'),
    ]  # fmt: skip
    return bodies[int(random.integers(len(bodies)))]()


def _opened(port: int, begun: bytes) -> socket.socket:
    found = socket.create_connection((HOST, port))
    found.sendall(begun)
    return found


def _about(sent: Sent, server: Serving, setup: LoadSetup) -> dict[str, Any]:
    fine = sent.status == 200
    in_time = fine & (sent.latency <= setup.deadline)
    quantiles = np.percentile(sent.latency[fine], [50, 95, 99]).tolist() if fine.any() else [float("nan")] * 3
    levels = Counter(json.loads(each)["level"] for each, good in zip(sent.answers, fine, strict=True) if good)
    return {
        "sent": len(fine), "answered": float(fine.sum() / sent.seconds),
        "in_time": float(in_time.sum() / sent.seconds), "p50": quantiles[0], "p95": quantiles[1],
        "p99": quantiles[2], "refused": float((sent.status == 429).mean()), "late": float((sent.status == 504).mean()),
        "errors": float(((sent.status >= 500) & (sent.status != 504) | (sent.status == FAILED)).mean()),
        "levels": {name: count / max(1, int(fine.sum())) for name, count in sorted(levels.items())},
        "memory": server.memory, "cpu": server.cpu,
    }  # fmt: skip


def score(frame: pd.DataFrame) -> dict[str, Any]:
    """A row for each setting, and what is particular to some."""
    loads, more = [], []
    for setup, rows in frame.groupby("setup", sort=False):
        rates = rows["answered"].to_numpy(dtype=float)
        loads.append({
            "setting": setup, "answered a second": float(rates.mean()),
            "95 %": list(seeds_interval(rates)) if len(rates) > 1 else None, "in time": float(rows["in_time"].mean()),
            **{f"{name} ms": 1e3 * float(rows[name].mean()) for name in ("p50", "p95", "p99")},
            **{name: float(rows[name].mean()) for name in ("refused", "late", "errors")},
            "levels": pd.DataFrame(rows["levels"].tolist()).fillna(0).mean().to_dict(),
            "MB": float(rows["memory"].mean()) / 1e6,
        })  # fmt: skip
        extra = {name: rows[name].iloc[0] for name in (
            "growth", "recovered", "p95_afterwards", "loaded", "damaged", "other", "whole_s", "damaged_s", "statuses",
            "not_4xx",
        ) if name in rows and rows[name].notna().any()}  # fmt: skip
        if extra:
            more.append({"setting": setup, **extra})
    return {"tables": {"Load": loads} | ({"More": more} if more else {}), "notes": [
        "answered a second: status 200; in time: of these within the deadline; refused: 429; late: 504, the deadline "
        "passed; errors: other 5xx and broken connections. Latencies of what was answered, from the time at which it "
        "should have been sent; levels are shares of the answers.",
        "growth: of the memory in the run. recovered: seconds after an overload until the first second in which "
        f"each answer at half of the answered rate came within {1e3 * LATE:.0f} ms. loaded: reloads of a whole file; "
        "damaged: of one that was refused; other: neither. not_4xx: hostile requests with another status than 4xx.",
    ]}  # fmt: skip


def plot(frame: pd.DataFrame, result: dict[str, Any], out: Path) -> list[str]:
    """Latency of each setting."""
    import matplotlib.pyplot as plt

    table = result["tables"]["Load"]
    figure, axis = plt.subplots(figsize=(7, 0.5 + 0.5 * len(table)), layout="constrained")
    for name, marker in (("p50 ms", "o"), ("p95 ms", "s"), ("p99 ms", "^")):
        axis.plot([row[name] for row in table], range(len(table)), marker, label=name.removesuffix(" ms"))
    axis.set(xscale="log", xlabel="latency, ms", yticks=range(len(table)))
    axis.set_yticklabels([row["setting"] for row in table])
    axis.invert_yaxis()
    axis.grid(alpha=0.3)
    axis.legend()
    figure.savefig(out / "latency.png", dpi=110)
    plt.close(figure)
    return ["latency.png"]
