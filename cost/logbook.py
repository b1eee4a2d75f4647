"""The files of a monitor, written by a background thread that reads the whole process, too."""

from __future__ import annotations

import csv
import io
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import psutil

from cost.energy import Counter
from cost.files import write_text

COLUMNS = (
    *("batch", "epoch", "at", "forward", "backward", "optimizer", "total"),
    *("energy", "loss", "accuracy", "rss", "device_memory"),
)
JSON_LINE = "{{" + ", ".join(f'"{name}": {{}}' for name in COLUMNS) + "}}\n"
READINGS = ("at", "rss", "cpu", "energy")

Row = dict[str, Any]
Finish = Callable[[Any], Row | None]  # the row of a record, or None while a GPU has not come so far


class Logbook:
    """Appends rows to `batches.csv` and `batches.jsonl` and readings to `process.csv` every `interval` seconds."""

    def __init__(self, path: Path, interval: float, counter: Counter | None, finish: Finish) -> None:
        self.path, self.interval, self.begun = path, interval, time.perf_counter()
        self._counter, self._process = counter, psutil.Process()
        self._finish = finish
        self._records: deque[Any] = deque()
        self.add = self._records.append  # of what `finish` will make a row
        self._rows: list[Row] = []
        self._lock, self._stop = threading.Lock(), threading.Event()
        for name, columns in (("batches.csv", COLUMNS), ("process.csv", READINGS)):
            write_text(path / name, table_line(columns))
        write_text(path / "batches.jsonl", "")
        self._files: dict[str, str] = {}
        self.watts, self._last = 0.0, (0.0, 0.0)
        self._zero = self._joules()
        self._process.cpu_percent()
        self._read()
        self._thread = threading.Thread(target=self._run, name="moe-envs monitor", daemon=True)
        self._thread.start()

    def flush(self) -> list[Row]:
        """Write the rows that can be had; returns those that came since the last call of this method."""
        with self._lock:
            self._write()
            rows, self._rows = self._rows, []
        return rows

    def replace(self, name: str, text: str) -> None:
        """Write a file anew, within `interval` seconds."""
        self._files[name] = text

    def energy(self) -> float:
        """The counter's joules since the logbook was opened; 0 where there is no counter."""
        with self._lock:
            return self._joules() - self._zero

    def close(self) -> None:
        """Stop the thread and write what is left."""
        self._stop.set()
        self._thread.join()
        with self._lock:
            self._write()
            self._read()

    def _run(self) -> None:
        while not self._stop.wait(self.interval):
            with self._lock:
                self._write()
                self._read()

    def _joules(self) -> float:
        return self._counter.joules() if self._counter else 0.0

    def _read(self) -> None:
        at, joules = time.perf_counter() - self.begun, self._joules() - self._zero
        self.rss = int(self._process.memory_info().rss)
        reading = [at, self.rss, self._process.cpu_percent() / 100, joules if self._counter else None]
        self._append("process.csv", [table_line(reading)])
        self.watts = (joules - self._last[1]) / max(at - self._last[0], 1e-9)
        self._last = at, joules

    def _write(self) -> None:
        rows: list[Row] = []
        while self._records and (row := self._finish(self._records[0])) is not None:
            self._records.popleft()
            row["rss"] = self.rss
            rows.append(row)
        self._rows += rows
        # Numbers only, whose repr is CSV and JSON alike; a library's writer would cost the training five times as much.
        texts = [["null" if (value := row.get(name)) is None else repr(value) for name in COLUMNS] for row in rows]
        while self._files:
            name, text = self._files.popitem()
            write_text(self.path / name, text)
        self._append("batches.csv", (",".join(text).replace("null", "") + "\n" for text in texts))
        self._append("batches.jsonl", (JSON_LINE.format(*text) for text in texts))

    def _append(self, name: str, lines: Iterable[str]) -> None:
        with (self.path / name).open("a") as file:
            file.writelines(lines)


def table_line(values: Iterable[Any]) -> str:
    """One line of CSV; None is empty."""
    buffer = io.StringIO()
    csv.writer(buffer, lineterminator="\n").writerow(values)
    return buffer.getvalue()
