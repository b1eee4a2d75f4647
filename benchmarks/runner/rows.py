"""Rows of finished runs, one JSON line each, appended atomically under a lock.

A row carries the SHA-256 of all of itself; rows of format 1, published before, have none. Reading drops a row that is
there twice and refuses two that contradict each other.
"""

from __future__ import annotations

import json
import math
import os
import warnings
from collections import Counter
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from annotated_types import Ge
from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from benchmarks.runner.experiments import RunnerError
from benchmarks.runner.matrix import Job, said
from cost.files import locked, naming, sha256_of, write_text

RAW = "raw.jsonl"
ABOUT = "setup", "seed", "split"


class Row(BaseModel):
    """Finished run: one line of `raw.jsonl`."""

    model_config = ConfigDict(extra="forbid", strict=True)

    format: Literal[1, 2]
    config_hash: str
    experiment: str
    setup: str
    arguments: dict[str, Any]
    seed: int
    split: str
    metrics: dict[str, Any]
    measured: dict[str, Any]
    attempts: Annotated[int, Ge(1)]
    commit: str | None
    fingerprint: dict[str, str]
    versions: dict[str, str]
    sha256: str | None = None

    @model_validator(mode="after")
    def _whole(self) -> Self:
        """Check both hashes, and that all numbers are finite."""
        if self.config_hash != self.job.key:
            raise ValueError("its config_hash is not that of its arguments")
        if self.sha256 != (None if self.format == 1 else self._hash()):
            raise ValueError("it was altered: its sha256 is not that of its content")
        if not _finite([self.arguments, self.metrics, self.measured]):
            raise ValueError("it holds a number that is not finite")
        return self

    @classmethod
    def made(cls, **content: Any) -> Row:
        """A row of the present format with its hash; raises `ValueError` for a result that is no JSON."""
        for name, value in [*content["metrics"].items(), *content["measured"].items()]:
            try:
                json.dumps(value, allow_nan=False)
            except (ValueError, TypeError) as error:
                raise ValueError(f"{name} is {value!r}: no JSON; numbers must be finite") from error
        row = cls.model_construct(format=2, **json.loads(json.dumps(content)))
        return cls(**row.model_dump(exclude={"sha256"}), sha256=row._hash())

    @property
    def line(self) -> bytes:
        """The row as it stands in a file."""
        return json.dumps(self.model_dump(exclude={"sha256"} if self.format == 1 else None)).encode() + b"\n"

    def _hash(self) -> str:
        return sha256_of(json.dumps(self.model_dump(exclude={"sha256"}), sort_keys=True).encode())

    @property
    def job(self) -> Job:
        return Job(self.experiment, self.setup, self.arguments, self.seed, self.split)


def read(path: Path, cut: bool = False) -> list[Row]:
    """Read all complete rows of a file, each run once; raises `RunnerError` naming the first invalid line and why.

    Text after the last line feed is a row cut off by a kill: it is left out, with a warning unless `cut` is set, as by
    those who make its run again.
    """
    try:
        *lines, last = path.read_bytes().split(b"\n")
    except FileNotFoundError:
        return []
    except OSError as error:
        raise RunnerError(f"{path} cannot be read: {error.strerror}") from error
    if last and not cut:
        warnings.warn(
            f"{path}: its last line is cut off, and left out; the run it is of must be made again", stacklevel=2
        )
    found: dict[str, tuple[int, Row]] = {}
    for number, line in enumerate(lines, 1):
        row = _row(path, number, line)
        first, other = found.setdefault(row.config_hash, (number, row))
        if other.metrics != row.metrics:
            raise RunnerError(f"{path}, lines {first} and {number}, are of the same run with different metrics")
    _check_names(path, found)
    return [row for _, row in found.values()]


def _row(path: Path, number: int, line: bytes) -> Row:
    """One line as a row."""
    causes = {"it begins with a byte order mark": line[:3] == b"\xef\xbb\xbf",
              "it ends with a carriage return: save it with Unix line ends": line[-1:] == b"\r",
              "it is empty": not line}  # fmt: skip
    for cause, there in causes.items():
        if there:
            raise RunnerError(f"{path}, line {number}, is not a row: {cause}")
    try:
        return Row.model_validate_json(line)
    except (ValidationError, RecursionError) as error:
        why = said(error) if isinstance(error, ValidationError) else "it is nested too deeply"
        raise RunnerError(f"{path}, line {number}, is not a row: {why}") from error


def _check_names(path: Path, found: dict[str, tuple[int, Row]]) -> None:
    """Raise `RunnerError` if rows of one setup and split have metrics of different names."""
    names: dict[tuple[str, str, str], tuple[int, set[str]]] = {}
    for number, row in found.values():
        first, other = names.setdefault((row.experiment, row.setup, row.split), (number, {*row.metrics}))
        if differing := other ^ {*row.metrics}:
            raise RunnerError(
                f"{path}: lines {first} and {number}, of setup {row.setup!r}, have different metrics: only one has "
                f"{', '.join(sorted(differing))}"
            )


def _finite(value: Any) -> bool:
    if isinstance(value, dict):
        return all(map(_finite, value.values()))
    if isinstance(value, list | tuple):
        return all(map(_finite, value))
    return not isinstance(value, float) or math.isfinite(value)


def append(path: Path, row: Row) -> None:
    """Add a row under a lock unless its hash exists; raises `ValueError` for a name that is already in use."""
    names = Counter([*ABOUT, *row.arguments, *row.metrics, *row.measured])
    if twice := [name for name, times in names.items() if times > 1]:
        raise ValueError(f"{', '.join(twice)}: of arguments, metrics and what is measured each needs a name of its own")
    with locked(path):
        there = read(path, cut=True)
        if row.config_hash in {each.config_hash for each in there}:
            return
        try:  # what could not be read again would make the whole file unreadable
            every = [*there, _row(path, len(there) + 1, row.line[:-1])]
            _check_names(path, {each.config_hash: (number, each) for number, each in enumerate(every, 1)})
        except RunnerError as error:
            raise ValueError(f"the result cannot be added: {error}") from error
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        with naming(path), open(descriptor, "r+b") as file:
            file.truncate(file.read().rfind(b"\n") + 1)
            file.seek(0, os.SEEK_END)
            file.write(row.line)
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
