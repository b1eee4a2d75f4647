"""Timing in rounds over all operations, with measures of the noise on the host."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import psutil
from pydantic import BaseModel, ConfigDict
from rich.progress import Progress

log = logging.getLogger("cost")
WARM_UP = 10
MIN_SECONDS = 0.4  # minimum block length: the kernel counts CPU time of other processes in ticks of 0.01 s
MAX_BLOCKS = 4
RUN_DELAY = Path("/proc/thread-self/schedstat")


class Noise(BaseModel):
    """Noise of a measurement as fractions; `None` if the system does not report it.

    `spread`: median over operations of (P95 - P5) / median. `drift`: median change from the first half of the rounds to
    the second. `waited`: share of the time the thread was runnable but not running. `others`: share of the machine's
    CPUs used by other processes.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    spread: float
    drift: float
    waited: float | None
    others: float

    def complaints(self) -> list[str]:
        """Describe each noise measure above its bound; empty on a quiet machine."""
        texts = {
            "spread": "the repeats of an operation spread by {:.0%} of their median",
            "drift": "times drifted by {:.1%} from the first half to the second",
            "waited": "the measuring thread waited for a CPU {:.1%} of the time",
            "others": "other processes used {:.0%} of the CPUs",
        }
        found = [(name, getattr(self, name)) for name in texts]
        return [
            f"{texts[name].format(value)} (bound {BOUNDS[name]:.0%})"
            for name, value in found
            if value is not None and value > BOUNDS[name]
        ]


# An idle 2-core machine shows 0.06-0.15, 0.003-0.012, 0-0.001 and 0-0.05; a busy loop on each core 0.14, 0.01-0.02, 0.3
# and 0.65: the medians themselves hold to 3 % even then.
BOUNDS = {"spread": 0.5, "drift": 0.05, "waited": 0.02, "others": 0.2}


class Timed(NamedTuple):
    """Call to be timed, with its number of torch threads and its device."""

    call: Callable[[], object]
    threads: int = 1
    device: str = "cpu"


@contextmanager
def torch_threads(count: int) -> Iterator[None]:
    """Set the number of torch threads and restore it afterwards."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def time_steadily(runs: Sequence[Timed], repeats: int, progress: bool = False) -> tuple[np.ndarray, Noise]:
    """Time all runs in at least `repeats` rounds after warm-up; returns seconds `[runs, rounds]` and noise.

    Noisy blocks of rounds are repeated, up to `MAX_BLOCKS` in all; the first quiet block is used alone. If no block is
    quiet, all blocks are used and a warning with the noise is logged. Torch's thread count is restored. Raises
    `ValueError` for fewer than 50 repeats, since their median is not stable.
    """
    if repeats < 50:
        raise ValueError(f"repeats must be >= 50 for a steady median, got {repeats}")
    blocks, noises = [], []
    with torch_threads(1), Progress(disable=not progress) as bar:
        round_seconds = np.median([_block(runs, 1)[0].sum() for _ in range(WARM_UP)])
        rounds = max(repeats, math.ceil(MIN_SECONDS / round_seconds))
        for _ in range(MAX_BLOCKS):
            task = bar.add_task("measuring", total=rounds)
            block, noise = _block(runs, rounds, partial(bar.advance, task))
            if not noise.complaints():
                return block, noise
            blocks.append(block)
            noises.append(noise)
            bar.update(task, description="disturbed, measuring again")
    noise = _mean(noises)
    log.warning("the host is noisy, %d times over: %s", MAX_BLOCKS, "; ".join(noise.complaints() or ["by turns"]))
    return np.concatenate(blocks, axis=1), noise


def _block(
    runs: Sequence[Timed], rounds: int, advance: Callable[[], object] = lambda: None
) -> tuple[np.ndarray, Noise]:
    import torch

    by_threads = {threads: [i for i, run in enumerate(runs) if run.threads == threads] for _, threads, _ in runs}
    timers = [_timer(run) for run in runs]
    seconds = np.empty((rounds, len(runs)))
    watch = _Watch()
    for row in seconds:
        for threads, members in by_threads.items():
            if torch.get_num_threads() != threads:
                torch.set_num_threads(threads)
                timers[members[0]]()  # the pool of threads wakes up
            for index in members:
                row[index] = timers[index]()
        advance()
    waited, others = watch.stop()
    low, middle, high = np.percentile(seconds, [5, 50, 95], axis=0)
    first, second = (np.median(half, axis=0) for half in np.array_split(seconds, 2)) if rounds > 1 else (middle, middle)
    spread, drift = np.median((high - low) / middle), abs(np.median(second / first) - 1)
    return seconds.T, Noise(spread=float(spread), drift=float(drift), waited=waited, others=others)


def _timer(run: Timed) -> Callable[[], float]:
    if run.device.startswith("cuda"):
        from cost.meters import TimeMeter

        def on_gpu() -> float:
            with TimeMeter(run.device) as reading:
                run.call()
            return reading.value

        return on_gpu
    call, now = run.call, time.perf_counter_ns

    def on_cpu() -> float:
        start = now()
        call()
        return (now() - start) * 1e-9

    return on_cpu


class _Watch:
    """CPU wait of this thread and CPU use of other processes since construction."""

    def __init__(self) -> None:
        self._start = self._read()

    def stop(self) -> tuple[float | None, float]:
        wall, delay, busy, own = (
            None if old is None or new is None else new - old
            for old, new in zip(self._start, self._read(), strict=True)
        )
        assert wall is not None
        assert busy is not None
        assert own is not None
        others = max(0.0, (busy - own) / wall / (psutil.cpu_count() or 1))
        return None if delay is None else delay / wall, others

    @staticmethod
    def _read() -> tuple[float, float | None, float, float]:
        times = psutil.cpu_times()
        idle = times.idle + getattr(times, "iowait", 0.0)
        busy = sum(times) - idle - getattr(times, "guest", 0.0) - getattr(times, "guest_nice", 0.0)
        own = sum(psutil.Process().cpu_times()[:2])
        try:
            delay = int(RUN_DELAY.read_text().split()[1]) * 1e-9
        except OSError:
            delay = None
        return time.perf_counter(), delay, busy, own


def _mean(noises: list[Noise]) -> Noise:
    waited = [noise.waited for noise in noises if noise.waited is not None]
    return Noise(
        spread=float(np.mean([noise.spread for noise in noises])),
        drift=float(np.mean([noise.drift for noise in noises])),
        waited=float(np.mean(waited)) if waited else None,
        others=float(np.mean([noise.others for noise in noises])),
    )
