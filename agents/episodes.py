"""Episode statistics of many rows: returns and logged values."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pandas as pd

from cost.files import naming


class Episodes:
    """Accumulates sums and means per episode from the steps of all rows, and stores finished episodes."""

    SUMMED = ("return", "length", "reward/", "cost/")

    def __init__(self, rows: int) -> None:
        self.carry: dict[str, np.ndarray] = {"length": np.zeros(rows)}
        self.frames: list[pd.DataFrame] = []
        self._written = 0

    def add(self, steps: dict[str, np.ndarray], done: np.ndarray, timesteps: np.ndarray) -> pd.DataFrame:
        """Add steps `[time, rows]` by name; returns one row per finished episode in order of time.

        `timesteps [time]` are the training timesteps after each step.
        Names of `SUMMED` are summed over an episode, those that start with `last:` are taken from its end, others are
        averaged.
        """
        times, rows = done.nonzero()
        order = np.lexsort((times, rows))
        times, rows = times[order], rows[order]
        first = np.ones(len(rows), dtype=np.bool_)
        first[1:] = rows[1:] != rows[:-1]
        columns: dict[str, np.ndarray] = {"timesteps": timesteps[times]}
        for name, values in sorted(steps.items(), key=lambda item: item[0] != "length"):
            if name.startswith("last:"):
                columns[name.removeprefix("last:")] = values[times, rows]
                continue
            sums = values.cumsum(0, dtype=np.float64)
            sums += self.carry.get(name, 0.0)
            ends = sums[times, rows]
            found = ends.copy()
            found[1:] -= np.where(first[1:], 0.0, ends[:-1])
            before = np.zeros(done.shape[1])
            before[rows] = ends  # keeps the last one per row, since rows are in order of time
            self.carry[name] = sums[-1] - before
            columns[name] = found if name.startswith(self.SUMMED) else found / columns["length"]
        frame = pd.DataFrame(columns).sort_values("timesteps", kind="stable", ignore_index=True)
        self.frames.append(frame)
        return frame

    def forget(self) -> None:
        """Discard unfinished episodes of all rows."""
        self.carry = {"length": np.zeros_like(self.carry["length"])}

    def restore(self, carry: dict[str, np.ndarray]) -> None:
        """Continue unfinished episodes from a saved `carry`; raises `ValueError` for other shapes or names."""
        if "length" not in carry or any(np.shape(each) != self.carry["length"].shape for each in carry.values()):
            raise ValueError(f"these are not the sums of {len(self.carry['length'])} episodes")
        self.carry = dict(carry)

    def rewind(self) -> None:
        """Write all episodes from the first one to the next file."""
        self._written = 0

    def append_to(self, path: Path, size: int) -> int:
        """Write the episodes since the last call after the first `size` bytes of a CSV file, with the columns of its
        first episodes; returns the new size."""
        new, self._written = self.frames[self._written :], len(self.frames)
        there = [frame for frame in new if len(frame)]
        path.parent.mkdir(parents=True, exist_ok=True)
        with naming(path), path.open("r+b" if size else "w+b") as file:
            columns = file.readline().decode().strip().split(",") if size else []
            file.truncate(size)
            file.seek(size)
            if there:
                frame = pd.concat(there)
                frame = frame.reindex(columns=columns) if columns else frame
                file.write(frame.to_csv(index=False, header=not columns).encode())
            file.flush()
            os.fsync(file.fileno())
            return file.tell()

    def frame(self) -> pd.DataFrame:
        """All finished episodes."""
        there = [frame for frame in self.frames if len(frame)]
        return pd.concat(there, ignore_index=True) if there else pd.DataFrame()
