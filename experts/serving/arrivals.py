"""When requests arrive: Poisson, bursts, or a trace of a real service.

A trace is a CSV file whose first column, TIMESTAMP, holds dates or seconds, as the Azure LLM inference traces of 2023
(Patel et al., Splitwise, ISCA 2024; CC-BY 4.0, github.com/Azure/AzurePublicDataset), which are not shipped.
"""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

import numpy as np

from cost.arguments import one_line
from experts.data import DataError

SYNTHETIC = "poisson", "bursts"
PARTS = {"train": (0.0, 0.6), "validation": (0.6, 0.8), "test": (0.8, 1.0)}  # of a trace, by time
BURST, QUIET, FACTOR = 0.5, 2.0, 4.0  # mean seconds of a burst and between two; rate of a burst over that between
LEAST = 100  # arrivals of a part of a trace


def synthetic(kind: str, rate: float, seconds: float, generator: np.random.Generator) -> np.ndarray:
    """Arrival times in `seconds` at a mean `rate`: "poisson", or "bursts", a Markov-modulated Poisson process whose
    rate is 4 times as high in bursts of half a second."""
    if kind == "poisson":
        return _poisson(rate, 0.0, seconds, generator)
    low = rate * (BURST + QUIET) / (BURST * FACTOR + QUIET)
    parts, start = list[np.ndarray](), 0.0
    bursting = bool(generator.random() < BURST / (BURST + QUIET))
    while start < seconds:
        end = min(seconds, start + generator.exponential(BURST if bursting else QUIET))
        parts.append(_poisson(low * (FACTOR if bursting else 1.0), start, end, generator))
        start, bursting = end, not bursting
    return np.concatenate(parts)


def _poisson(rate: float, start: float, end: float, generator: np.random.Generator) -> np.ndarray:
    count = generator.poisson(rate * (end - start))
    return np.sort(generator.uniform(start, end, count))


def trace(path: Path | str, split: str = "test") -> np.ndarray:
    """Arrival times in seconds of a part of a trace, from 0. Raises `DataError` for a file that is no trace."""
    low, high = PARTS[split]
    times = trace_times(path)
    length = times[-1]
    part = times[(times >= low * length) & (times < high * length)]
    if len(part) < LEAST:
        raise DataError(f"{path}: {len(part)} arrivals in the part for {split}, needs {LEAST}")
    return part - low * length


def trace_times(path: Path | str) -> np.ndarray:
    """All arrival times of a trace in seconds, from 0; raises `DataError` for a file that is no trace."""
    return _read(str(path), Path(path).stat().st_mtime_ns if Path(path).exists() else 0)


@lru_cache(maxsize=8)
def _read(path: str, stamp: int) -> np.ndarray:
    import pandas as pd

    try:
        column = pd.read_csv(path, usecols=[0]).iloc[:, 0]
        if pd.api.types.is_numeric_dtype(column):
            times = column.to_numpy(dtype=np.float64)
        else:
            times = pd.to_datetime(column, format="ISO8601").to_numpy().astype("datetime64[ns]").astype(np.int64) / 1e9
    except (OSError, ValueError, IndexError, KeyError, pd.errors.ParserError) as error:
        raise DataError(f"{path} is no trace with times in its first column: {one_line(error)}") from error
    times = np.sort(times) - times.min(initial=np.inf)
    if len(times) < LEAST or not np.isfinite(times).all() or times[-1] <= 0:
        raise DataError(f"{path} is no trace: it needs {LEAST} arrivals at finite times that differ")
    return times


def at_rate(times: np.ndarray, rate: float) -> np.ndarray:
    """A trace with its time scaled so that it has this mean rate."""
    return times * (len(times) / times[-1] / rate)


def arrivals(kind: str, rate: float, seconds: float, generator: np.random.Generator, split: str = "test") -> np.ndarray:
    """Arrival times in `seconds` at a mean `rate`, of `synthetic` or of a trace's part, from a random place of it on
    and round its end."""
    if kind in SYNTHETIC:
        return synthetic(kind, rate, seconds, generator)
    times = at_rate(trace(kind, split), rate)
    length = times[-1] + 1 / rate
    start = generator.uniform(0, length)
    turns = int(np.ceil((start + seconds) / length))
    every = (np.arange(turns)[:, None] * length + times).ravel() - start
    return every[(every >= 0) & (every < seconds)]
