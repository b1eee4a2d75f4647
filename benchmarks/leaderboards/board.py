"""What the leaderboards of all environments share: how learners are trained and watched, and how all are scored.

A split is what one training learns: data, a model, a cost weight. It has one task or several, each with a score on
validation and on test, more being better. Tasks of one unit are scored by their mean, and have one best yardstick: that
of the best mean on validation. Learners train on the training split, keep the weights that are best on validation, and
are judged on test.
"""

from __future__ import annotations

import copy
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import pandas as pd
from pydantic import BaseModel, ConfigDict, Field, model_validator

from agents import tuned
from benchmarks import backends, pareto
from benchmarks.leaderboards import report
from benchmarks.statistics import (
    bootstrap_interval,
    iqm,
    normalized_score,
    probability_of_improvement,
    seeds_interval,
)

SEEDS = (17, 42, 1337, 7, 11, 23, 101, 271, 977, 3001)
LOOKS = 20  # at a training, unless the problem says otherwise
YARDSTICKS, BOUND = "yardsticks", "bound"
Row = dict[str, Any]


class Verdict(NamedTuple):
    """What a policy is worth in a task: its score on validation and on test, more being better, and on test where it
    lies between cost and quality. `beside_bound` is the score on those test episodes that the bound is of, where these
    are not all."""

    validation: float | None
    test: float
    quality: float
    cost: float
    beside_bound: float | None = None

    @property
    def scored(self) -> float:
        """What is compared with the bound."""
        return self.test if self.beside_bound is None else self.beside_bound


class Problem(Protocol):
    """What a leaderboard asks of an environment's module."""

    ID: str
    SPLITS: dict[str, dict[str, Any]]  # arguments of the environment that each training has
    LEARNERS: dict[str, tuple[str, str]]  # name -> algorithm and backend

    def watched(self, policy: Any, split: str, episodes: int | None, folder: Path) -> float:
        """The mean score over the split's tasks on validation."""

    def judged(self, policy: Any, split: str, episodes: int | None, folder: Path) -> dict[str, Verdict]:
        """What a learner is worth in each task of the split."""

    def yardsticks(self, split: str, episodes: int | None, folder: Path) -> dict[str, dict[str, Verdict]]:
        """What each rule that does not learn is worth in each task."""

    def bound(self, split: str, episodes: int | None, folder: Path) -> dict[str, Verdict]:
        """What nothing can beat, for the tasks that have a bound."""

    def unit(self, task: str) -> str:
        """The tasks that are scored by their mean."""

    def group(self, task: str) -> str:
        """The tasks whose points of cost and quality belong to one plane."""


class BoardSetup(BaseModel):
    """`policy` is a learner of the board, `yardsticks` or `bound`; `timesteps`, `episodes` replace the usual."""

    model_config = ConfigDict(extra="forbid")

    policy: str
    timesteps: int | None = Field(default=None, ge=1)
    episodes: int | None = Field(default=None, ge=2)

    @model_validator(mode="after")
    def _without_effect(self) -> BoardSetup:
        """What has no effect on a row must not make it another one."""
        if self.policy in (YARDSTICKS, BOUND):
            self.timesteps = None
        return self


class Leaderboard:
    """An experiment of `benchmarks.runner`."""

    Setup = BoardSetup
    SEEDS = SEEDS
    ONCE = (YARDSTICKS, BOUND)

    def __init__(
        self, problem: Problem, about: str, quick: tuple[str, ...], quick_without: tuple[str, ...] = ()
    ) -> None:
        """`quick` are the splits of a quick board, `quick_without` the learners that it does not have."""
        self.problem, self.about, self.quick = problem, about, quick
        self.SPLITS = tuple(problem.SPLITS)
        self.SETTINGS = {name: {"policy": name} for name in (*problem.LEARNERS, YARDSTICKS, BOUND)}
        self.quick_setups = {name: each for name, each in self.SETTINGS.items() if name not in quick_without}

    def once(self, setup: BoardSetup) -> bool:
        """Whether it is the same for all seeds."""
        return setup.policy in self.ONCE

    def measure(self, setup: BoardSetup, seed: int, split: str, folder: Path) -> tuple[Row, Row]:
        """A learner trained, watched and judged; or all yardsticks; or the bound."""
        if setup.policy == YARDSTICKS:
            found = self.problem.yardsticks(split, setup.episodes, folder)
            return {"policies": _plain(found)}, {}
        if setup.policy == BOUND:
            return {"policies": _plain({BOUND: self.problem.bound(split, setup.episodes, folder)})}, {}
        agent, watch = self._trained(setup, seed, split, folder)
        found = {setup.policy: self.problem.judged(agent, split, setup.episodes, folder)}
        curve = [{"steps": look.steps, "validation": look.mean} for look in watch.curve]
        seconds = {"train_s": [look.cpu for look in watch.curve], "train_wall_s": [look.wall for look in watch.curve]}
        return {"policies": _plain(found), "curve": curve}, seconds

    def check(self, setups: dict[str, BoardSetup], splits: list[str]) -> None:
        """Raise `ValueError` for a policy that the board does not have."""
        known = *self.problem.LEARNERS, *self.ONCE
        for name, setup in setups.items():
            if setup.policy not in known:
                raise ValueError(f"policy {setup.policy!r} of the setup {name!r} is none of {', '.join(known)}")
            if setup.episodes is not None and not getattr(self.problem, "EPISODIC", True):
                raise ValueError(f"episodes={setup.episodes}: nothing is judged by episodes here")

    def _trained(self, setup: BoardSetup, seed: int, split: str, folder: Path) -> tuple[Any, _Watch]:
        algo, backend = self.problem.LEARNERS[setup.policy]
        more = {"total_timesteps": setup.timesteps} if setup.timesteps else {}
        settings = tuned.settings(algo, self.problem.ID, backend, **more)
        agent = backends.make(self.problem.ID, algo, backend, self.problem.SPLITS[split], seed, settings)
        total = settings["total_timesteps"]
        every = max(1, total // getattr(self.problem, "LOOKS", LOOKS))
        watch = _Watch(lambda agent: self.problem.watched(agent, split, setup.episodes, folder), every)
        prepared = getattr(self.problem, "prepared", lambda agent, total: lambda agent: None)(agent, total)

        def after_update(agent: Any) -> None:
            prepared(agent)
            watch(agent)

        backends.learn(agent, total, after_update)
        return watch.end(agent), watch

    def score(self, frame: pd.DataFrame) -> Row:
        """For each task all verdicts, for each learner the normalised score over all tasks, how likely it improves on
        the best yardstick and on the other learners, and what it took to beat that yardstick on validation."""
        tables = _tables(frame)
        units: dict[str, list[str]] = {}
        for task in tables.tasks:
            units.setdefault(self.problem.unit(task), []).append(task)
        best = {task: _best(tables, several) for several in units.values() for task in several}
        bounds = {task: found[0].scored for task, (_, found) in tables.of(BOUND).items()}
        tasks = [
            {
                "task": task, "best_yardstick": best[task], "bound": bounds.get(task),
                "policies": [_line(name, found[task][1], tables.kinds[name])
                             for name, found in tables.verdicts.items() if task in found],
            }
            for task in tables.tasks
        ]  # fmt: skip
        learned = [name for name in tables.verdicts if tables.kinds[name] == "learned"]
        rows: list[Row] = []
        for name in learned:
            mine = [unit for unit, several in units.items() if _means(tables, name, several)]
            scored, names = _normalized(tables, name, units, best)
            trained = {seed for seeds, _ in tables.of(name).values() for seed in seeds}
            row: Row = {"policy": name, "seeds": len(scored) or len(trained), "scored": names, "of": len(mine)}
            if scored.size:
                trainings = [tables.tasks[units[unit][0]] for unit in names]
                row |= {"normalized": scored.mean(0).tolist(), "iqm": iqm(scored)}
                row["iqm_ci95"] = bootstrap_interval(scored, trainings=trainings)
            row["over_yardstick"] = _improvement(tables, name, units, best)
            others: dict[str, dict[str, str | None]] = {
                other: dict.fromkeys(tables.tasks, other) for other in learned if other != name
            }
            row["over"] = {other: _improvement(tables, name, units, of_task) for other, of_task in others.items()}
            rows.append(row | {"beats": self._beats(frame, name, tables, best)})
        usual = {"timesteps", "episodes"} & set(frame)
        settings = {key: sorted(set(frame[key].dropna().astype(int).tolist())) for key in sorted(usual)}
        return {"env": self.problem.ID, "settings": settings, "rows": rows, "tasks": tasks,
                "hypervolume": self._volumes(tables)}  # fmt: skip

    def _volumes(self, tables: _Tables) -> Row:
        """Hypervolumes of (cost, quality) by group of tasks, of the policies that have all of its tasks."""
        groups: dict[str, list[str]] = {}
        for task in tables.tasks:
            groups.setdefault(self.problem.group(task), []).append(task)
        return {
            group: {
                name: pareto.hypervolume(_points([found[task][1] for task in tasks]), self.problem.ID.split(":")[-1])
                for name, found in tables.verdicts.items()
                if all(task in found for task in tasks)
            }
            for group, tasks in groups.items()
        }

    def _beats(self, frame: pd.DataFrame, name: str, tables: _Tables, best: dict[str, str | None]) -> list[Row]:
        """For each split: steps and CPU seconds of training until the mean over its tasks on validation was above that
        of the best yardsticks; medians of the seeds that got there, and how many did."""
        rows = []
        for split, part in frame[frame["setup"] == name].groupby("split", sort=False):
            (mine,) = part["policies"].iloc[0].values()
            yardsticks = [(best[task], task) for task in mine]
            if any(each is None for each, _ in yardsticks):
                continue
            target = float(np.mean([tables.of(str(each))[task][1][0].validation for each, task in yardsticks]))
            found = []
            for curve, cpu, wall in zip(part["curve"], part["train_s"], part["train_wall_s"], strict=True):
                above = [place for place, point in enumerate(curve) if point["validation"] > target]
                found += [(curve[above[0]]["steps"], cpu[above[0]], wall[above[0]])] if above else []
            steps, seconds, wall_s = np.median(found, axis=0).tolist() if found else (None, None, None)
            whole = float(np.median([each[-1] for each in part["train_s"]]))
            rows.append({"split": str(split), "target": target, "steps": steps, "cpu_s": seconds, "wall_s": wall_s,
                         "seeds": len(found), "of": len(part), "whole_cpu_s": whole})  # fmt: skip
        return rows

    def plot(self, frame: pd.DataFrame, result: Row, out: Path) -> list[str]:
        """The leaderboard's pictures."""
        return report.plot(frame, result, out)

    def text(self, result: Row) -> str:
        """The leaderboard as Markdown."""
        return report.text(result, self.about)


class _Look(NamedTuple):
    """A look at a training: steps, CPU and wall seconds of training so far, the mean score on validation."""

    steps: int
    cpu: float
    wall: float
    mean: float


class _Watch:
    """Looks at a training after every so many steps, and keeps the weights that were best on validation."""

    def __init__(self, judge: Callable[[Any], float], every: int) -> None:
        self.judge, self.every = judge, every
        self.curve: list[_Look] = []
        self._begun = time.process_time(), time.perf_counter()
        self._checked, self._best = 0, -np.inf
        self._kept: Any = None
        self._folder = tempfile.TemporaryDirectory()

    def __call__(self, agent: Any) -> None:
        """After an update."""
        if agent.num_timesteps >= self._checked + self.every:
            self._check(agent)

    def _check(self, agent: Any) -> None:
        cpu, wall = time.process_time(), time.perf_counter()
        self._checked, mean = agent.num_timesteps, self.judge(agent)
        self.curve.append(_Look(agent.num_timesteps, cpu - self._begun[0], wall - self._begun[1], mean))
        if mean > self._best:
            self._best = mean
            if hasattr(agent, "policy"):
                self._kept = copy.deepcopy(agent.policy.state_dict())
            else:
                agent.save(Path(self._folder.name) / "best")
        self._begun = self._begun[0] + time.process_time() - cpu, self._begun[1] + time.perf_counter() - wall

    def end(self, agent: Any) -> Any:
        """The agent with the best weights; the last ones have been looked at as well."""
        if not self.curve or self.curve[-1].steps != agent.num_timesteps:
            self._check(agent)
        if self._kept is not None:
            agent.policy.load_state_dict(self._kept)
        else:
            agent = type(agent).load(Path(self._folder.name) / "best")
        self._folder.cleanup()
        return agent


class _Tables(NamedTuple):
    """By policy and task the seeds and their verdicts; kinds of the policies; all tasks in order, and their splits."""

    verdicts: dict[str, dict[str, tuple[list[int], list[Verdict]]]]
    kinds: dict[str, str]
    tasks: dict[str, str]

    def of(self, name: str) -> dict[str, tuple[list[int], list[Verdict]]]:
        """A policy's, by task."""
        return self.verdicts.get(name, {})


def _tables(frame: pd.DataFrame) -> _Tables:
    verdicts: dict[str, dict[str, tuple[list[int], list[Verdict]]]] = {}
    kinds: dict[str, str] = {}
    splits: dict[str, str] = {}
    for _, row in frame.iterrows():
        kind = {YARDSTICKS: "yardstick", BOUND: "bound"}.get(str(row["policy"]), "learned")
        for name, tasks in row["policies"].items():
            key = str(row["setup"]) if kind == "learned" else name
            if kinds.setdefault(key, kind) != kind:
                raise ValueError(f"a setup is named like the rule {key!r}")
            for task, found in tasks.items():
                splits.setdefault(task, str(row["split"]))
                seeds, several = verdicts.setdefault(key, {}).setdefault(task, ([], []))
                seeds.append(int(row["seed"]))
                several.append(Verdict(**found))
    return _Tables(verdicts, kinds, splits)


def _means(
    tables: _Tables, name: str, tasks: list[str], value: Callable[[Verdict], float] = lambda verdict: verdict.scored
) -> dict[int, float]:
    """By seed the mean over tasks of what `value` says of a policy's verdicts, for the seeds that have all of them."""
    values = [
        dict(zip(seeds, map(value, verdicts), strict=True))
        for seeds, verdicts in (tables.of(name).get(task, ([], [])) for task in tasks)
    ]
    common = [seed for seed in values[0] if all(seed in of_task for of_task in values)]
    return {seed: float(np.mean([of_task[seed] for of_task in values])) for seed in common}


def _best(tables: _Tables, tasks: list[str]) -> str | None:
    """The yardstick that is best on validation, in the mean over tasks; of equal ones the last, as the boards name the
    stronger rules later."""
    known = {
        name: (*means.values(), place)
        for place, name in enumerate(tables.verdicts)
        if tables.kinds[name] == "yardstick"
        and (means := _means(tables, name, tasks, lambda verdict: _known(verdict.validation)))
    }
    return max(known, key=known.__getitem__) if known else None


def _known(validation: float | None) -> float:
    assert validation is not None, "a yardstick is chosen by its score on validation"
    return validation


def _line(name: str, verdicts: list[Verdict], kind: str) -> Row:
    tests = np.array([each.test for each in verdicts])
    means = {key: float(np.mean([getattr(each, key) for each in verdicts])) for key in ("test", "quality", "cost")}
    known = [each.validation for each in verdicts if each.validation is not None]
    return {"policy": name, "kind": kind, "seeds": len(tests), **means, "test_ci95": seeds_interval(tests),
            "validation": float(np.mean(known)) if known else None}  # fmt: skip


def _normalized(
    tables: _Tables, name: str, units: dict[str, list[str]], best: dict[str, str | None]
) -> tuple[np.ndarray, list[str]]:
    """Scores `[seeds, units]` of the units that have a yardstick and a bound above it, and of the seeds that all of
    them have; with the units."""
    found: dict[str, dict[int, float]] = {}
    for unit, tasks in units.items():
        yardstick = best[tasks[0]]
        mine, bound = _means(tables, name, tasks), _means(tables, BOUND, tasks)
        if mine and bound and yardstick is not None:
            (base,), (top,) = _means(tables, yardstick, tasks).values(), bound.values()
            scored = normalized_score(np.array([*mine.values()]), base, top)
            if np.isfinite(scored).all():
                found[unit] = dict(zip(mine, scored.tolist(), strict=True))
    common = sorted(set.intersection(*map(set, found.values()))) if found else []
    return np.array([[of_unit[seed] for of_unit in found.values()] for seed in common]), list(found)


def _improvement(
    tables: _Tables, name: str, units: dict[str, list[str]], others: dict[str, str | None]
) -> float | None:
    """How likely a training scores more on test than another policy, one for each task; None where no unit has both."""
    shares = []
    for tasks in units.values():
        other = others[tasks[0]]
        both = [_means(tables, each, tasks, lambda verdict: verdict.test) for each in (name, other) if each is not None]
        if len(both) == 2 and all(both):
            shares.append(
                probability_of_improvement(*(np.array([[value] for value in each.values()]) for each in both))
            )
    return float(np.mean(shares)) if shares else None


def _points(tasks: list[list[Verdict]]) -> np.ndarray:
    """Cost and quality in each task, means over seeds."""
    return np.array([[np.mean([each.cost for each in of]), np.mean([each.quality for each in of])] for of in tasks])


def _plain(found: dict[str, dict[str, Verdict]]) -> Row:
    return {name: {task: verdict._asdict() for task, verdict in tasks.items()} for name, tasks in found.items()}
