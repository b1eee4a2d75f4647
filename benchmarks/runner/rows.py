"""Rows of finished runs, one JSON line each, appended atomically under a lock."""

from __future__ import annotations

import json
import os
from collections import Counter
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from benchmarks.runner.experiments import RunnerError
from benchmarks.runner.matrix import Job, said
from cost.files import locked, write_text

RAW = "raw.jsonl"
ABOUT = "setup", "seed", "split"


class Row(BaseModel):
    """Finished run: one line of `raw.jsonl`."""

    model_config = ConfigDict(extra="forbid")

    format: Literal[1]
    config_hash: str
    experiment: str
    setup: str
    arguments: dict[str, Any]
    seed: int
    split: str
    metrics: dict[str, Any]
    measured: dict[str, Any]
    attempts: int
    commit: str | None
    fingerprint: dict[str, str]
    versions: dict[str, str]

    @property
    def job(self) -> Job:
        return Job(self.experiment, self.setup, self.arguments, self.seed, self.split)


def read(path: Path) -> list[Row]:
    """Read all complete rows of a file; raises `RunnerError` naming the first invalid row. Text after the last line
    feed is a row cut off by a kill and is ignored."""
    try:
        lines = path.read_bytes().split(b"\n")[:-1]
    except FileNotFoundError:
        return []
    rows = []
    for number, line in enumerate(lines):
        try:
            row = Row.model_validate_json(line)
        except ValidationError as error:
            raise RunnerError(f"{path}, line {number + 1}, is not a row: {said(error)}") from error
        if row.config_hash != row.job.key:
            raise RunnerError(f"{path}, line {number + 1}: its config_hash is not that of its arguments")
        rows.append(row)
    return rows


def append(path: Path, row: Row) -> None:
    """Add a row under a lock unless its hash exists; raises `ValueError` for an invalid result or a name that is
    already in use."""
    names = Counter([*ABOUT, *row.arguments, *row.metrics, *row.measured])
    if twice := [name for name, times in names.items() if times > 1]:
        raise ValueError(f"{', '.join(twice)}: of arguments, metrics and what is measured each needs a name of its own")
    for name, value in [*row.metrics.items(), *row.measured.items()]:
        try:
            json.dumps(value, allow_nan=False)
        except (ValueError, TypeError) as error:
            raise ValueError(f"{name} is {value!r}: no JSON; numbers must be finite") from error
    line = json.dumps(row.model_dump()).encode() + b"\n"
    with locked(path):
        if row.config_hash in {each.config_hash for each in read(path)}:
            return
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        with open(descriptor, "r+b") as file:
            file.truncate(file.read().rfind(b"\n") + 1)
            file.seek(0, os.SEEK_END)
            file.write(line)
            file.flush()
            os.fsync(descriptor)


def sort(path: Path, every: list[Job]) -> None:
    """Sort rows in matrix order, rows of other matrices last."""
    with locked(path):
        raw = path.read_bytes() if path.exists() else b""
        lines = raw[: raw.rfind(b"\n") + 1].splitlines(keepends=True)
        place = {job.key: number for number, job in enumerate(every)}
        order = sorted(lines, key=lambda line: place.get(json.loads(line)["config_hash"], len(place)))
        if order != lines:
            write_text(path, b"".join(order).decode())
