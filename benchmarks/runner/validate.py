"""Validation of submitted rows by rerunning them."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import ValidationError

from benchmarks.runner.experiments import RunnerError, find, require_trusted
from benchmarks.runner.matrix import said
from benchmarks.runner.processes import pool
from benchmarks.runner.rows import Row, read
from benchmarks.runner.runner import measure
from cost.machine import provenance


def validate(
    file: Path,
    count: int,
    seed: int,
    tolerance: float,
    report: Callable[[float], object] = lambda share: None,
    trust: Collection[str] = (),
) -> list[dict[str, Any]]:
    """Rerun a random sample of rows from scratch and list the metrics of each that differ.

    Raises `RunnerError` for a file without rows, or with rows of experiments that are neither shipped nor in `trust`,
    since running them would import their code.
    """
    rows, found, here = read(file), [], provenance()
    if not rows:
        raise RunnerError(f"{file} holds no rows" if file.exists() else f"{file} is not there")
    for row in rows:
        require_trusted(row.experiment, [], file, trust)
        _check(row, file)
        require_trusted(row.experiment, [row.arguments], file, trust)
    chosen = np.random.default_rng(seed).permutation(len(rows))[:count]
    with tempfile.TemporaryDirectory() as folder, pool() as process:
        for number, row in enumerate(rows[place] for place in sorted(chosen)):
            metrics, _ = process.submit(measure, row.job, Path(folder)).result()
            differing = [
                {"metric": name, "submitted": row.metrics.get(name), "here": metrics.get(name)}
                for name in sorted(row.metrics.keys() | metrics.keys())
                if not _alike(row.metrics.get(name), metrics.get(name), tolerance)
            ]
            unlike = [name for name in ("commit", "fingerprint", "versions") if getattr(row, name) != here[name]]
            found.append({"setup": row.setup, "seed": row.seed, "split": row.split, "metrics": len(metrics),
                          "differing": differing, "made_with_other": unlike})  # fmt: skip
            report((number + 1) / len(chosen))
    return found


def _check(row: Row, file: Path) -> None:
    """Raise `RunnerError` for a row that its experiment cannot have produced."""
    experiment = find(row.experiment)
    try:
        if row.split not in experiment.splits:
            raise ValueError(f"no split {row.split!r}")
        experiment.check({row.setup: experiment.setup(row.arguments)}, list(experiment.splits))
    except ValueError as error:
        why = said(error) if isinstance(error, ValidationError) else error
        raise RunnerError(f"{file}: a row of setup {row.setup!r} is none of {row.experiment}: {why}") from error


def _alike(first: Any, second: Any, tolerance: float) -> bool:
    if isinstance(first, dict) and isinstance(second, dict):
        return first.keys() == second.keys() and all(_alike(first[key], second[key], tolerance) for key in first)
    if isinstance(first, list) and isinstance(second, list):
        return len(first) == len(second) and all(_alike(*pair, tolerance) for pair in zip(first, second, strict=True))
    if isinstance(first, int | float) and isinstance(second, int | float):
        return math.isclose(first, second, rel_tol=tolerance, abs_tol=tolerance)
    return bool(first == second)
