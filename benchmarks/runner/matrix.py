"""Matrix of runs: setups x seeds x splits of an experiment, from a file or the defaults of the experiment."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from benchmarks.runner.experiments import RunnerError, Trust, find, require_trusted
from cost.arguments import one_line

SHOWN = 5  # errors of a file in one line


class Matrix(BaseModel):
    """Setups, seeds and splits of an experiment, by default all of them; `settings` are defaults for all setups."""

    model_config = ConfigDict(extra="forbid")

    experiment: str
    seeds: list[Annotated[int, Field(ge=0)]] | None = Field(default=None, min_length=1)
    splits: list[str] = Field(default=[])
    setups: dict[str, dict[str, Any]] = Field(default={})
    settings: dict[str, Any] = Field(default={})


class Job(NamedTuple):
    """One run and the hash of its arguments."""

    experiment: str
    setup: str
    arguments: dict[str, Any]
    seed: int
    split: str

    @property
    def key(self) -> str:
        return hashlib.sha256(json.dumps(self, sort_keys=True).encode()).hexdigest()[:16]


def load_matrix(path: Path) -> Matrix:
    """Load a matrix from a YAML or JSON file; raises `RunnerError` naming the invalid field."""
    try:
        text = path.read_text(encoding="utf-8")
        content = (
            json.loads(text, object_pairs_hook=_unique) if path.suffix == ".json" else yaml.load(text, _UniqueKeys)
        )
    except OSError as error:
        raise RunnerError(f"{path} cannot be read: {error.strerror}") from error
    except RecursionError as error:
        raise RunnerError(f"{path} is nested too deeply") from error
    except (yaml.YAMLError, UnicodeDecodeError, ValueError, TypeError) as error:
        raise RunnerError(f"{path} is neither YAML nor JSON: {one_line(error)}") from error
    try:
        return Matrix.model_validate(content)
    except ValidationError as error:
        raise RunnerError(f"{path}: {said(error)}") from error


def trusted_matrix(path: Path, trust: Trust = ()) -> Matrix:
    """Load a matrix whose runs import nothing but ours, what is imported already, and what is in `trust`."""
    matrix = load_matrix(path)
    require_trusted_runs(matrix, path, trust)
    return matrix


def require_trusted_runs(matrix: Matrix, path: Path, trust: Trust) -> None:
    """Raise `RunnerError` if a run of a matrix from a file would import what is neither ours nor in `trust`."""

    def arguments() -> Iterator[dict[str, Any]]:  # once the experiment is trusted: this imports it
        for job in jobs_of(matrix):
            yield job.arguments

    require_trusted(matrix.experiment, arguments(), path, trust)


def is_file(name: str) -> bool:
    """Whether this names a file of a matrix, and no experiment."""
    return Path(name).suffix in (".yaml", ".yml", ".json")


def named(name: str, quick: bool = False) -> Matrix:
    """Matrix from a file, or of all runs of an experiment, or of its `QUICK` version."""
    if is_file(name):
        return load_matrix(Path(name))
    return Matrix(experiment=name, **(find(name).quick if quick else {}))


def jobs_of(matrix: Matrix) -> list[Job]:
    """All runs of a matrix by split, seed and setup; raises `RunnerError` for invalid arguments."""
    experiment = find(matrix.experiment)
    setups = matrix.setups or experiment.settings
    seeds, splits = matrix.seeds or list(experiment.seeds), matrix.splits or list(experiment.splits)
    if unknown := [split for split in splits if split not in experiment.splits]:
        raise RunnerError(f"no split {unknown[0]!r} in {matrix.experiment}; there are {', '.join(experiment.splits)}")
    if twice := [value for value, times in Counter([*seeds, *splits]).items() if times > 1]:
        raise RunnerError(f"{twice[0]} is named twice")
    validated = {}
    for name, setup in setups.items():
        try:
            validated[name] = experiment.setup({**matrix.settings, **setup})
        except ValidationError as error:
            raise RunnerError(f"setup {name!r}: {said(error)}") from error
    try:
        experiment.check(validated, splits)
    except ValueError as error:
        raise RunnerError(f"{matrix.experiment}: {error}") from error
    return [
        Job(matrix.experiment, name, setup.model_dump(mode="json"), seed, split)
        for split in splits
        for seed in seeds
        for name, setup in validated.items()
        if seed == seeds[0] or not experiment.once(setup)
    ]


def said(error: ValidationError) -> str:
    """The first errors, each with its place, in one line."""
    errors = error.errors()
    shown = [
        f"{'.'.join(map(str, each['loc']))[:80]}: {each['msg'].removeprefix('Value error, ')}".removeprefix(": ")
        for each in errors[:SHOWN]
    ]
    return "; ".join([*shown, f"and {len(errors) - SHOWN} more"] if len(errors) > SHOWN else shown)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object, unless it has a key twice."""
    if twice := [key for key, times in Counter(key for key, _ in pairs).items() if times > 1]:
        raise ValueError(f"{twice[0]!r} is named twice")
    return dict(pairs)


class _UniqueKeys(yaml.SafeLoader):
    """YAML loader that rejects duplicate keys."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        self.flatten_mapping(node)  # merge keys: <<
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        if not all(isinstance(key, str) for key in keys):
            raise yaml.constructor.ConstructorError(None, None, "a name is not text", node.start_mark)
        if twice := [key for key, times in Counter(keys).items() if times > 1]:
            raise yaml.constructor.ConstructorError(None, None, f"{twice[0]!r} is named twice", node.start_mark)
        return super().construct_mapping(node, deep)
