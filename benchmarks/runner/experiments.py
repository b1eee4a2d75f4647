"""Experiments by name: modules of `benchmarks.experiments` and `benchmarks.speed`, leaderboards, and your own.

An experiment is a module, or an object in one, that offers

* `Setup`, the pydantic model of a setup; `SETTINGS`, setups by name;
* `measure(setup, seed, split, folder)`: one run; returns metrics, which are deterministic, and measurements such as
  times, which are not; `folder` holds results shared by runs;
* `score(frame)`: the result as JSON: `tables` (rows by title) and optional `notes`;

and may offer `SPLITS`, `SEEDS`, `QUICK` (matrix fields of the short version), `once(setup)` (whether a setup runs with
the first seed only), `check(setups, splits)` (raises `ValueError` for incompatible arguments),
`plot(frame, result, out)` (saves plots to a folder; returns their names), `text(result)` (the report as Markdown) and
`headline(setup, metrics)` (the result of a finished run in one line).
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from pkgutil import iter_modules
from typing import Any, Literal

import pandas as pd
from pydantic import BaseModel

import benchmarks.experiments
import benchmarks.speed
import moe_envs
from benchmarks.results import tables
from cost.arguments import one_line
from cost.trust import require_import

NEEDED = "Setup", "SETTINGS", "measure", "score"
SEEDS = (17, 42, 1337)
ALL = "all"  # split name of experiments without splits
Metrics = dict[str, Any]
Trust = Collection[str] | Literal[True]  # what a file may have imported: modules and references, or all


class RunnerError(RuntimeError):
    """A matrix, a file of rows or a folder is invalid, or too many runs failed."""


class Experiment:
    """Wrapper of an experiment module with defaults for optional members."""

    def __init__(self, name: str, offered: Any) -> None:
        if missing := [each for each in NEEDED if not hasattr(offered, each)]:
            raise RunnerError(f"{name!r} is no experiment: it has no {', '.join(missing)}")
        self.name, self._offered = name, offered
        self.setup_class: type[BaseModel] = offered.Setup
        self.settings: Mapping[str, Mapping[str, Any]] = offered.SETTINGS
        self.splits: Sequence[str] = getattr(offered, "SPLITS", (ALL,))
        self.seeds: Sequence[int] = getattr(offered, "SEEDS", SEEDS)
        self.quick: Mapping[str, Any] = getattr(offered, "QUICK", {})

    @property
    def question(self) -> str:
        """Question of the experiment in one line."""
        return (inspect.getdoc(self._offered) or "").partition("\n")[0]

    def setup(self, arguments: Mapping[str, Any]) -> Any:
        """Create a setup; raises pydantic's `ValidationError`."""
        return self.setup_class.model_validate(arguments)

    def once(self, setup: Any) -> bool:
        """Whether a setup is run with the first seed only."""
        return bool(getattr(self._offered, "once", lambda setup: False)(setup))

    def check(self, setups: Mapping[str, Any], splits: Sequence[str]) -> None:
        """Raise `ValueError` for incompatible setups and splits."""
        getattr(self._offered, "check", lambda setups, splits: None)(setups, splits)

    def measure(self, setup: Any, seed: int, split: str, folder: Path) -> tuple[Metrics, Metrics]:
        """Execute one run."""
        metrics, measured = self._offered.measure(setup, seed, split, folder)
        return metrics, measured

    def headline(self, setup: Any, metrics: Metrics) -> str:
        """Result of a finished run in one line, empty if the experiment has no `headline`."""
        return str(getattr(self._offered, "headline", lambda setup, metrics: "")(setup, metrics))

    def score(self, frame: pd.DataFrame) -> Metrics:
        """Compute the result from the rows."""
        result: Metrics = self._offered.score(frame)
        return result

    def plot(self, frame: pd.DataFrame, result: Metrics, out: Path) -> list[str]:
        """Save plots; returns their names."""
        return list(getattr(self._offered, "plot", lambda frame, result, out: [])(frame, result, out))

    def text(self, result: Metrics) -> str:
        """The report as Markdown."""
        if hasattr(self._offered, "text"):
            return str(self._offered.text(result))
        return tables.text(self.name, inspect.getdoc(self._offered) or "", result)


def shipped() -> dict[str, str]:
    """Modules of the shipped experiments by name."""
    packages = benchmarks.experiments, benchmarks.speed
    return {
        module.name.replace("_", "-"): f"{package.__name__}.{module.name}"
        for package in packages
        for module in iter_modules(package.__path__)
    }


def listed() -> Iterator[tuple[Experiment, Literal["experiment", "leaderboard"]]]:
    """All shipped experiments and leaderboards."""
    for name in shipped():
        yield find(name), "experiment"
    for name in moe_envs.SPECS:
        yield find(name), "leaderboard"


def is_known(name: str) -> bool:
    """Whether an experiment is shipped or the leaderboard of a registered environment, so nothing is imported."""
    return name in shipped() or name in moe_envs.SPECS


def require_trusted(name: str, setups: Iterable[Mapping[str, Any]], where: Path, trust: Trust) -> None:
    """Raise `RunnerError` if running what a file names would import code that is neither ours nor in `trust`.

    A setup says by `imports` what it would import or execute; `setups` is read once the experiment itself is trusted.
    """
    try:
        if not is_known(name):
            require_import(name, where, trust)
        experiment = find(name)

        def imports(arguments: Mapping[str, Any]) -> Iterable[str]:
            return getattr(experiment.setup(arguments), "imports", ())

        offered = {each for arguments in experiment.settings.values() for each in imports(arguments)}
        ours = offered if is_known(name) else set()
        for arguments in setups:
            for reference in imports(arguments):
                if trust is not True and reference not in trust and reference not in ours:
                    raise ValueError(
                        f"{where} names {reference!r}, whose code would be run. If it is yours: --trust {reference}"
                    )
    except ValueError as error:
        raise RunnerError(one_line(error)) from error


def find(name: str) -> Experiment:
    """Find a shipped experiment, the leaderboard of an environment id, or your own "package.module[:object]"."""
    module, _, member = name.partition(":")
    if name in shipped():
        return Experiment(name, importlib.import_module(shipped()[name]))
    if name in moe_envs.SPECS or name.rpartition("-v")[2].isdigit():
        from benchmarks.leaderboards import board_of

        try:
            return Experiment(name, board_of(name))
        except ValueError as error:
            raise RunnerError(str(error)) from error
    if "." not in name and not member:
        known = ", ".join([*shipped(), *moe_envs.SPECS])
        raise RunnerError(f"no experiment {name!r}; there are {known}, or your own as package.module[:object]")
    try:
        found: Any = importlib.import_module(module)
        found = getattr(found, member) if member else found
    except (ImportError, SyntaxError, AttributeError) as error:
        raise RunnerError(f"experiment {name!r}: {error}") from error
    return Experiment(name, found)
