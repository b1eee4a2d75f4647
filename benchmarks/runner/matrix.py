"""What a matrix of runs is: setups x seeds x splits of an experiment, from a file or all of the experiment's own.

An experiment is a module, or an object in one, with `Setup` (a pydantic model of what a setup may say), `SETTINGS`
(setups by name) and `SPLITS`, which a matrix takes where it names none, and the functions of `Experiment`. It may have
`SEEDS`, its own default, `once(setup)`, whether a setup is run with the first seed only, and `check(setups, splits)`,
which raises `ValueError` for what does not go together.
"""

from __future__ import annotations

import hashlib
import importlib
import json
from collections import Counter
from pathlib import Path
from typing import Annotated, Any, NamedTuple, Protocol

import pandas as pd
import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

EXPERIMENTS = {
    "models": "benchmarks.evaluation.experiment",
    "MoERouting-v0": "benchmarks.leaderboards.routing:BOARD",
    "MoEMetaOpt-v0": "benchmarks.leaderboards.metaopt:BOARD",
    "MoECompression-v0": "benchmarks.leaderboards.compression:BOARD",
}
NEEDED = "Setup", "SETTINGS", "SPLITS", "measure", "score", "plot", "text"
SEEDS = (17, 42, 1337)


class RunnerError(RuntimeError):
    """A matrix, a file of rows or a folder is not what it should be, or too many runs failed; the message says why."""


class FailedRuns(RunnerError):
    """Runs that failed each time; what is finished stays."""


class Experiment(Protocol):
    """What a module of an experiment offers beside its constants."""

    def measure(self, setup: Any, seed: int, split: str, folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
        """One run: metrics, the same for the same arguments, and what was measured, times say, which differs. `folder`
        keeps what several runs need."""

    def score(self, frame: pd.DataFrame) -> dict[str, Any]:
        """What the rows say, as JSON."""

    def plot(self, frame: pd.DataFrame, result: dict[str, Any], out: Path) -> list[str]:
        """Draw pictures into `out`; their names."""

    def text(self, result: dict[str, Any]) -> str:
        """The report, as Markdown."""


class Matrix(BaseModel):
    """What is run: an experiment's setups, by default all of its own, with each seed on each split. `settings` hold for
    all setups that do not say otherwise."""

    model_config = ConfigDict(extra="forbid")

    experiment: str
    seeds: list[Annotated[int, Field(ge=0)]] | None = Field(default=None, min_length=1)
    splits: list[str] = Field(default=[])
    setups: dict[str, dict[str, Any]] = Field(default={})
    settings: dict[str, Any] = Field(default={})


class Job(NamedTuple):
    """One run, and the hash of what it is of."""

    experiment: str
    setup: str
    arguments: dict[str, Any]
    seed: int
    split: str

    @property
    def key(self) -> str:
        return hashlib.sha256(json.dumps(self, sort_keys=True).encode()).hexdigest()[:16]


def experiment_of(name: str) -> Any:
    """An experiment of `EXPERIMENTS`, or your own, `package.module` or `package.module:object`."""
    if name not in EXPERIMENTS and "." not in name:
        raise RunnerError(f"no experiment {name!r}; there are {', '.join(EXPERIMENTS)}, or your own as package.module")
    try:
        module, _, member = EXPERIMENTS.get(name, name).partition(":")
        found: Any = importlib.import_module(module)
        found = getattr(found, member) if member else found
    except (ImportError, SyntaxError, AttributeError) as error:
        raise RunnerError(f"experiment {name!r}: {error}") from error
    if missing := [each for each in NEEDED if not hasattr(found, each)]:
        raise RunnerError(f"{name!r} is no experiment: it has no {', '.join(missing)}")
    return found


def load_matrix(path: Path) -> Matrix:
    """A matrix of a YAML or JSON file; raises `RunnerError` that says what is wrong where."""
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), _UniqueKeys)
    except OSError as error:
        raise RunnerError(f"{path} cannot be read: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise RunnerError(f"{path} is neither YAML nor JSON: {error}") from error
    try:
        return Matrix.model_validate(content)
    except ValidationError as error:
        raise RunnerError(f"{path}: {said(error)}") from error


def named(name: str) -> Matrix:
    """The matrix in a file, or all of an experiment."""
    return Matrix(experiment=name) if name in EXPERIMENTS else load_matrix(Path(name))


def jobs_of(matrix: Matrix) -> list[Job]:
    """All runs of a matrix: for each split and seed every setup; raises `RunnerError` for arguments it cannot have."""
    experiment = experiment_of(matrix.experiment)
    setups = matrix.setups or experiment.SETTINGS
    seeds = matrix.seeds or list(getattr(experiment, "SEEDS", SEEDS))
    splits = matrix.splits or list(experiment.SPLITS)
    if unknown := [split for split in splits if split not in experiment.SPLITS]:
        raise RunnerError(f"no split {unknown[0]!r} in {matrix.experiment}; there are {', '.join(experiment.SPLITS)}")
    if twice := [value for value, times in Counter([*seeds, *splits]).items() if times > 1]:
        raise RunnerError(f"{twice[0]} is named twice")
    validated = {}
    for name, setup in setups.items():
        try:
            validated[name] = experiment.Setup.model_validate(matrix.settings | setup)
        except ValidationError as error:
            raise RunnerError(f"setup {name!r}: {said(error)}") from error
    try:
        getattr(experiment, "check", lambda setups, splits: None)(validated, splits)
    except ValueError as error:
        raise RunnerError(f"{matrix.experiment}: {error}") from error
    once = getattr(experiment, "once", lambda setup: False)
    return [
        Job(matrix.experiment, name, setup.model_dump(mode="json"), seed, split)
        for split in splits
        for seed in seeds
        for name, setup in validated.items()
        if seed == seeds[0] or not once(setup)
    ]


def said(error: ValidationError) -> str:
    return "; ".join(f"{'.'.join(map(str, each['loc'])) or 'the whole'}: {each['msg']}" for each in error.errors())


class _UniqueKeys(yaml.SafeLoader):
    """YAML in which no key is named twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        if twice := [key for number, key in enumerate(keys) if key in keys[:number]]:
            raise yaml.constructor.ConstructorError(None, None, f"{twice[0]!r} is named twice", node.start_mark)
        return super().construct_mapping(node, deep)
