"""Log files of a monitor, written by a background thread that also samples the process."""

from __future__ import annotations

import csv
import io
import json
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from math import isfinite
from pathlib import Path
from typing import Any

import psutil

from cost.energy import Counter
from cost.files import write_text

log = logging.getLogger("cost")
COLUMNS = (
    *("batch", "epoch", "at", "forward", "backward", "optimizer", "total"),
    *("energy", "loss", "accuracy", "rss", "device_memory"),
)
JSON_LINE = "{{" + ", ".join(f'"{name}": {{}}' for name in COLUMNS) + "}}\n"
READINGS = ("at", "rss", "cpu", "energy")

Row = dict[str, Any]
Finish = Callable[[Any], Row | None]  # row of a record, or None while the GPU is still busy


class Logbook:
    """Appends rows to `batches.csv` and `batches.jsonl`, and process readings to `process.csv`, every `interval` s."""

    def __init__(self, path: Path, interval: float, counter: Counter | None, finish: Finish) -> None:
        self.path, self.interval, self.begun = path, interval, time.perf_counter()
        self._counter, self._process = counter, psutil.Process()
        self._finish = finish
        self._records: deque[Any] = deque()
        self.add = self._records.append  # records that `finish` converts to rows
        self._rows: list[Row] = []  # since the last call of `take`
        self._unwritten: list[Row] = []
        self._epochs: list[Row] = []
        self._epochs_written = 0
        self._lock, self._stop = threading.Lock(), threading.Event()
        for name in ("epochs.csv", "epochs.jsonl"):
            (path / name).unlink(missing_ok=True)
        for name, columns in (("batches.csv", COLUMNS), ("process.csv", READINGS)):
            write_text(path / name, table_line(columns))
        write_text(path / "batches.jsonl", "")
        self.watts, self._last = 0.0, (0.0, 0.0)
        self._zero = self._joules()
        self._process.cpu_percent()
        self._read()
        self._thread = threading.Thread(target=self._run, name="moe-envs monitor", daemon=True)
        self._thread.start()

    def take(self) -> list[Row]:
        """Rows completed since the last call; they are written to the files later."""
        with self._lock:
            if self._counter:
                self._read()
            self._read_records()
            rows, self._rows = self._rows, []
        return rows

    def end_epoch(self, row: Row) -> None:
        """Write an epoch's row within `interval` seconds."""
        self._epochs.append(row)

    def energy(self) -> float:
        """Joules by the counter since the logbook was opened; 0 without a counter."""
        with self._lock:
            return self._joules() - self._zero

    def close(self) -> None:
        """Stop the thread and write the remaining rows; raises `OSError` if writing still fails."""
        self._stop.set()
        self._thread.join()
        with self._lock:
            self._update()

    def _run(self) -> None:
        while not self._stop.wait(self.interval):
            with self._lock:
                try:
                    self._update()
                except OSError as error:  # remaining rows are retried later, and `close` raises
                    log.warning("the monitor cannot write to %s: %s", self.path, error)

    def _update(self) -> None:
        self._read()
        self._write()
        if (count := len(self._epochs)) > self._epochs_written:
            epochs = self._epochs[:count]
            columns = list(dict.fromkeys(name for row in epochs for name in row))
            lines = [table_line(columns), *(table_line(row.get(name) for name in columns) for row in epochs)]
            write_text(self.path / "epochs.csv", "".join(lines))
            write_text(self.path / "epochs.jsonl", "".join(json.dumps(_finite(row)) + "\n" for row in epochs))
            self._epochs_written = count

    def _joules(self) -> float:
        return self._counter.joules() if self._counter else 0.0

    def _read(self) -> None:
        at, joules = time.perf_counter() - self.begun, self._joules() - self._zero
        self.rss = int(self._process.memory_info().rss)
        if self._counter is None or at - self._last[0] >= self._counter.window or not self.watts:
            self.watts = (joules - self._last[1]) / max(at - self._last[0], 1e-9)
            self._last = at, joules
        reading = [at, self.rss, self._process.cpu_percent() / 100, joules if self._counter else None]
        self._append("process.csv", [table_line(reading)])

    def _read_records(self) -> None:
        while self._records and (row := self._finish(self._records[0])) is not None:
            row["rss"] = self.rss
            self._rows.append(row)
            self._unwritten.append(row)
            self._records.popleft()

    def _write(self) -> None:
        self._read_records()
        # Numbers have the same repr in CSV and JSON, except NaN; a library would slow the training five times more.
        texts = [[_number(row.get(name)) for name in COLUMNS] for row in self._unwritten]
        self._append("batches.csv", (",".join(text).replace("null", "") + "\n" for text in texts))
        self._append("batches.jsonl", (JSON_LINE.format(*text) for text in texts))
        self._unwritten = []

    def _append(self, name: str, lines: Iterable[str]) -> None:
        with (self.path / name).open("a") as file:
            file.writelines(lines)


def _finite(row: Row) -> Row:
    return {name: None if isinstance(value, float) and not isfinite(value) else value for name, value in row.items()}


def _number(value: float | None) -> str:
    return "null" if value is None or not isfinite(value) else repr(value)


def table_line(values: Iterable[Any]) -> str:
    """Format one CSV line; None becomes an empty field."""
    buffer = io.StringIO()
    csv.writer(buffer, lineterminator="\n").writerow(values)
    return buffer.getvalue()
