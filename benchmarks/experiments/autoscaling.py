"""Does the autoscaler of deploy/kubernetes keep up? A simulation, second by second, beside fixed numbers of replicas.

Simulated: requests of a trace, as many times as give the mean load asked for, are shared by replicas that each answer
a measured number a second. The autoscaler works as Kubernetes' does: every 15 s it wants replicas * use / target,
changes nothing within a tenth, goes up at once (a replica is ready after `start` seconds) and down to the most that it
wanted in the last 300 s. A request that waits longer than the deadline is lost.
"""

from __future__ import annotations

import math
from collections import deque
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd

from benchmarks.runner.setup import Arguments
from experts.serving.arrivals import synthetic, trace_times

SEEDS = (0,)
EVERY, TOLERANCE, WINDOW = 15, 0.1, 300  # seconds, share, seconds
SETTINGS: dict[str, dict[str, Any]] = {
    "target 60 %": {}, "target 60 %, slow start": {"start": 120}, "target 80 %": {"target": 0.8},
}  # fmt: skip
QUICK: dict[str, Any] = {"seeds": [0], "setups": {"short": {"seconds": 600}}}


class AutoscalingSetup(Arguments):
    """A `trace`: "waves" (bursts whose rate goes up and down by 60 % in 20 minutes) for `seconds`, or a file, whole.
    `load` are the replicas that would be busy in the mean; a replica answers `capacity` requests a second."""

    trace: Literal["waves"] | str = "waves"
    seconds: int = 3600
    load: float = 3.0
    capacity: float = 100.0
    target: float = 0.6
    least: int = 2
    most: int = 8
    start: int = 30
    deadline: float = 1.0


Setup = AutoscalingSetup


def measure(setup: AutoscalingSetup, seed: int, split: str, folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Share of the requests in time and replica hours of the autoscaler and of fixed numbers."""
    arrived = _arrived(setup, np.random.default_rng(seed))
    policies = {"autoscaler": None} | {f"{count} replicas": count for count in range(setup.least, setup.most + 1)}
    found = {name: simulated(setup, arrived, count) for name, count in policies.items()}
    return {"found": {name: {"in time": share, "hours": hours} for name, (share, hours, _) in found.items()},
            "arrived": _minutes(arrived), "replicas": _minutes(found["autoscaler"][2])}, {}  # fmt: skip


def _arrived(setup: AutoscalingSetup, random: np.random.Generator) -> np.ndarray:
    """Requests in each second."""
    if setup.trace == "waves":
        times = synthetic("bursts", 20.0, float(setup.seconds), random)
        wave = 1 + 0.6 * np.sin(2 * np.pi * times / 1200)
        times = times[random.random(len(times)) < wave / 1.6]
    else:
        times = trace_times(setup.trace)
    counts = np.bincount(times.astype(int)).astype(float)
    return counts * (setup.load * setup.capacity / counts.mean())


def simulated(setup: AutoscalingSetup, arrived: np.ndarray, fixed: int | None) -> tuple[float, float, np.ndarray]:
    """Share of the requests answered in time, replica hours, and the replicas of each second."""
    ready, starting = fixed or setup.least, deque[int]()  # seconds at which they are ready
    wanted, waiting, lost, used = deque[tuple[int, int]](), 0.0, 0.0, np.zeros(EVERY)
    replicas = np.zeros(len(arrived))
    for second, count in enumerate(arrived):
        while starting and starting[0] <= second:
            starting.popleft()
            ready += 1
        able = ready * setup.capacity
        work = waiting + count
        used[second % EVERY] = min(work / able, 1.0)
        waiting = max(0.0, work - able)
        late = max(0.0, waiting - able * setup.deadline)
        lost, waiting = lost + late, waiting - late
        replicas[second] = ready + len(starting)
        if fixed is None and second % EVERY == EVERY - 1:
            number = ready + len(starting)
            use = float(used.mean()) * ready / number
            desired = number if abs(use / setup.target - 1) <= TOLERANCE else math.ceil(number * use / setup.target)
            wanted.append((second, min(max(desired, setup.least), setup.most)))
            while wanted[0][0] < second - WINDOW:
                wanted.popleft()
            goal = max(each for _, each in wanted)
            starting.extend([second + setup.start] * max(0, goal - number))
            for _ in range(max(0, number - goal)):  # those that start are the first to go
                if starting:
                    starting.pop()
                else:
                    ready -= 1
    return 1 - lost / arrived.sum(), replicas.sum() / 3600, replicas


def _minutes(values: np.ndarray) -> list[float]:
    return [float(each.mean()) for each in np.array_split(values, max(1, len(values) // 60))]


def score(frame: pd.DataFrame) -> dict[str, Any]:
    """A table for each setting."""
    tables = {
        str(setup): [
            {"replicas": name, "in time": float(np.mean([row[name]["in time"] for row in rows["found"]])),
             "replica hours": float(np.mean([row[name]["hours"] for row in rows["found"]]))}
            for name in rows["found"].iloc[0]
        ]
        for setup, rows in frame.groupby("setup", sort=False)
    }  # fmt: skip
    return {"tables": tables, "notes": ["Simulated, second by second; nothing of this ran on a cluster."]}


def plot(frame: pd.DataFrame, result: dict[str, Any], out: Path) -> list[str]:
    """Requests and replicas by minute."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(len(frame), 1, figsize=(8, 2.5 * len(frame)), layout="constrained", squeeze=False)
    for axis, row in zip(axes[:, 0], frame.to_dict("records"), strict=True):
        axis.plot(np.array(row["arrived"]) / row["capacity"], label="requests, in replicas")
        axis.step(range(len(row["replicas"])), row["replicas"], where="post", label="replicas")
        axis.set(title=f"{row['setup']} (simulated)", xlabel="minute", ylabel="replicas")
        axis.grid(alpha=0.3)
        axis.legend()
    figure.savefig(out / "replicas.png", dpi=110)
    plt.close(figure)
    return ["replicas.png"]
