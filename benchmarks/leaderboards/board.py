"""What the leaderboards of all environments share: how learners are trained and watched, and how all are scored.

A split is what one training learns: data, a model, a cost weight. It has one task or several, each with a score on
validation and on test, more being better. The best yardstick of a task is the one best on validation. Learners train on
the training split, keep the weights that are best on validation, and are judged on test.
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
from pydantic import BaseModel, ConfigDict, Field

from agents import tuned
from benchmarks import backends, pareto
from benchmarks.leaderboards import report
from benchmarks.statistics import bootstrap_interval, iqm, normalized_score, probability_of_improvement

SEEDS = (17, 42, 1337, 7, 11, 23, 101, 271, 977, 3001)
CHECKS = 20
YARDSTICKS, BOUND = "yardsticks", "bound"
Row = dict[str, Any]


class Verdict(NamedTuple):
    """What a policy is worth in a task: its score on validation and on test, more being better, and on test where it
    lies between cost and quality."""

    validation: float
    test: float
    quality: float
    cost: float


class Problem(Protocol):
    """What a leaderboard asks of an environment's module."""

    ID: str
    SPLITS: dict[str, dict[str, Any]]  # arguments of the environment that each training has
    LEARNERS: dict[str, tuple[str, str]]  # name -> algorithm and backend

    def watched(self, policy: Any, split: str, episodes: int | None) -> float:
        """The mean score over the split's tasks on validation."""

    def judged(self, policy: Any, split: str, episodes: int | None, folder: Path) -> dict[str, Verdict]:
        """What a learner is worth in each task of the split."""

    def yardsticks(self, split: str, episodes: int | None, folder: Path) -> dict[str, dict[str, Verdict]]:
        """What each rule that does not learn is worth in each task."""

    def bound(self, split: str, episodes: int | None, folder: Path) -> dict[str, Verdict]:
        """What nothing can beat, for the tasks that have a bound."""


class BoardSetup(BaseModel):
    """`policy` is a learner of the board, `yardsticks` or `bound`; `timesteps`, `episodes` replace the usual."""

    model_config = ConfigDict(extra="forbid")

    policy: str
    timesteps: int | None = Field(default=None, ge=1)
    episodes: int | None = Field(default=None, ge=2)


class Leaderboard:
    """An experiment of `benchmarks.runner`."""

    Setup = BoardSetup
    SEEDS = SEEDS
    ONCE = (YARDSTICKS, BOUND)  # are the same for all seeds

    def __init__(self, problem: Problem, about: str) -> None:
        self.problem, self.about = problem, about
        self.SPLITS = tuple(problem.SPLITS)
        self.SETTINGS = {name: {"policy": name} for name in (*problem.LEARNERS, YARDSTICKS, BOUND)}

    def measure(self, setup: BoardSetup, seed: int, split: str, folder: Path) -> tuple[Row, Row]:
        """A learner trained, watched and judged; or all yardsticks; or the bound."""
        if setup.policy == YARDSTICKS:
            found = self.problem.yardsticks(split, setup.episodes, folder)
            return {"policies": _plain(found)}, {}
        if setup.policy == BOUND:
            return {"policies": _plain({BOUND: self.problem.bound(split, setup.episodes, folder)})}, {}
        if setup.policy not in self.problem.LEARNERS:
            known = ", ".join((*self.problem.LEARNERS, *self.ONCE))
            raise ValueError(f"policy {setup.policy!r} is none of {known}")
        agent, watch = self._trained(setup, seed, split)
        found = {setup.policy: self.problem.judged(agent, split, setup.episodes, folder)}
        curve = [{"steps": steps, "validation": mean} for steps, _, mean in watch.curve]
        return {"policies": _plain(found), "curve": curve}, {"train_s": [seconds for _, seconds, _ in watch.curve]}

    def _trained(self, setup: BoardSetup, seed: int, split: str) -> tuple[Any, _Watch]:
        algo, backend = self.problem.LEARNERS[setup.policy]
        more = {"total_timesteps": setup.timesteps} if setup.timesteps else {}
        settings = tuned.settings(algo, self.problem.ID, backend, **more)
        agent = backends.make(self.problem.ID, algo, backend, self.problem.SPLITS[split], seed, settings)
        total = settings["total_timesteps"]
        watch = _Watch(lambda agent: self.problem.watched(agent, split, setup.episodes), total)
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
        best = {task: _best(tables, task) for task in tables.tasks}
        bounds = {task: tables.verdicts[BOUND][task][0].test for task in tables.verdicts.get(BOUND, {})}
        tasks = [
            {
                "task": task, "best_yardstick": best[task], "bound": bounds.get(task),
                "policies": [_line(name, tables.verdicts[name][task], tables.kinds[name])
                             for name in tables.verdicts if task in tables.verdicts[name]],
            }
            for task in tables.tasks
        ]  # fmt: skip
        learned = [name for name in tables.verdicts if tables.kinds[name] == "learned"]
        rows: list[Row] = []
        for name in learned:
            scored = _normalized(tables, name, best, bounds)
            row: Row = {
                "policy": name,
                "seeds": max(map(len, tables.verdicts[name].values())),
                "tasks": scored.shape[1],
            }
            row |= {"normalized": scored.mean(0).tolist()} if scored.size else {}
            row |= {"iqm": iqm(scored), "iqm_ci95": bootstrap_interval(scored)} if scored.size else {}
            row["over_yardstick"] = _improvement(tables, name, best)
            others: dict[str, dict[str, str | None]] = {
                other: dict.fromkeys(tables.tasks, other) for other in learned if other != name
            }
            row["over"] = {other: _improvement(tables, name, of_task) for other, of_task in others.items()}
            rows.append(row | {"beats": self._beats(frame, name, tables, best)})
        volumes = {
            name: pareto.hypervolume(_points(tables, name), self.problem.ID.split(":")[-1]) for name in tables.verdicts
        }
        return {"env": self.problem.ID, "rows": rows, "tasks": tasks, "hypervolume": volumes}

    def _beats(self, frame: pd.DataFrame, name: str, tables: _Tables, best: dict[str, str | None]) -> list[Row]:
        """For each split: steps and CPU seconds of training until the mean over its tasks on validation was above that
        of the best yardsticks; medians of the seeds that got there, and how many did."""
        rows = []
        for split, part in frame[frame["setup"] == name].groupby("split", sort=False):
            (mine,) = part["policies"].iloc[0].values()
            yardsticks = [(best[task], task) for task in mine]
            if any(each is None for each, _ in yardsticks):
                continue
            target = float(np.mean([tables.verdicts[str(each)][task][0].validation for each, task in yardsticks]))
            found = []
            for curve, seconds in zip(part["curve"], part["train_s"], strict=True):
                above = [place for place, point in enumerate(curve) if point["validation"] > target]
                found += [(curve[above[0]]["steps"], seconds[above[0]])] if above else []
            steps, seconds = np.median(found, axis=0).tolist() if found else (None, None)
            whole = float(np.median([each[-1] for each in part["train_s"]]))
            rows.append({"split": str(split), "target": target, "steps": steps, "cpu_s": seconds, "seeds": len(found),
                         "of": len(part), "whole_cpu_s": whole})  # fmt: skip
        return rows

    def plot(self, frame: pd.DataFrame, result: Row, out: Path) -> list[str]:
        """The leaderboard's pictures."""
        return report.plot(frame, result, out)

    def text(self, result: Row) -> str:
        """The leaderboard as Markdown."""
        return report.text(result, self.about)


class _Watch:
    """Looks at a training some twenty times: its curve on validation, and the weights that were best."""

    def __init__(self, judge: Callable[[Any], float], total: int) -> None:
        self.judge, self.every = judge, max(1, total // CHECKS)
        self.curve: list[tuple[int, float, float]] = []
        self._begun, self._checked, self._best = time.process_time(), 0, -np.inf
        self._kept: Any = None
        self._folder = tempfile.TemporaryDirectory()

    def __call__(self, agent: Any) -> None:
        """After an update."""
        if agent.num_timesteps >= self._checked + self.every:
            self._check(agent)

    def _check(self, agent: Any) -> None:
        paused = time.process_time()
        self._checked, mean = agent.num_timesteps, self.judge(agent)
        self.curve.append((agent.num_timesteps, paused - self._begun, mean))
        if mean > self._best:
            self._best = mean
            if hasattr(agent, "policy"):
                self._kept = copy.deepcopy(agent.policy.state_dict())
            else:
                agent.save(Path(self._folder.name) / "best")
        self._begun += time.process_time() - paused

    def end(self, agent: Any) -> Any:
        """The agent with the best weights; the last ones have been looked at as well."""
        if not self.curve or self.curve[-1][0] != agent.num_timesteps:
            self._check(agent)
        if self._kept is not None:
            agent.policy.load_state_dict(self._kept)
        else:
            agent = type(agent).load(Path(self._folder.name) / "best")
        self._folder.cleanup()
        return agent


class _Tables(NamedTuple):
    """Verdicts by policy and task, one for each seed; kinds of the policies; all tasks in order."""

    verdicts: dict[str, dict[str, list[Verdict]]]
    kinds: dict[str, str]
    tasks: list[str]


def _tables(frame: pd.DataFrame) -> _Tables:
    verdicts: dict[str, dict[str, list[Verdict]]] = {}
    kinds: dict[str, str] = {}
    for _, row in frame.iterrows():
        kind = {YARDSTICKS: "yardstick", BOUND: "bound"}.get(str(row["policy"]), "learned")
        for name, tasks in row["policies"].items():
            key = str(row["setup"]) if kind == "learned" else name
            kinds[key] = kind
            for task, found in tasks.items():
                verdicts.setdefault(key, {}).setdefault(task, []).append(Verdict(**found))
    return _Tables(verdicts, kinds, list(dict.fromkeys(task for tasks in verdicts.values() for task in tasks)))


def _best(tables: _Tables, task: str) -> str | None:
    """The yardstick that is best on validation."""
    known = {
        name: tasks[task][0].validation
        for name, tasks in tables.verdicts.items()
        if tables.kinds[name] == "yardstick" and task in tasks
    }
    return max(known, key=known.__getitem__) if known else None


def _normalized(tables: _Tables, name: str, best: dict[str, str | None], bounds: dict[str, float]) -> np.ndarray:
    """Scores `[seeds, tasks]`, of the tasks that have a yardstick and a bound above it, and the seeds that all have."""
    found = []
    for task, verdicts in tables.verdicts[name].items():
        yardstick = best[task]
        if yardstick is not None and task in bounds:
            base = tables.verdicts[yardstick][task][0].test
            found.append(normalized_score(np.array([each.test for each in verdicts]), base, bounds[task]))
    found = [scored for scored in found if np.isfinite(scored).all()]
    return np.stack([scored[: min(map(len, found))] for scored in found], axis=1) if found else np.zeros((1, 0))


def _improvement(tables: _Tables, name: str, others: dict[str, str | None]) -> float | None:
    """How likely a training scores more on test than another policy, one for each task; None where no task has both."""
    shares = []
    for task, verdicts in tables.verdicts[name].items():
        other = others[task]
        if other is not None and task in tables.verdicts[other]:
            both = (np.array([[each.test] for each in part]) for part in (verdicts, tables.verdicts[other][task]))
            shares.append(probability_of_improvement(*both))
    return float(np.mean(shares)) if shares else None


def _line(name: str, verdicts: list[Verdict], kind: str) -> Row:
    tests = np.array([each.test for each in verdicts])
    low, high = bootstrap_interval(tests[:, None], lambda scores: float(scores.mean()))
    means = {key: float(np.mean([getattr(each, key) for each in verdicts])) for key in Verdict._fields}
    return {"policy": name, "kind": kind, "seeds": len(tests), **means, "test_ci95": (low, high)}


def _points(tables: _Tables, name: str) -> np.ndarray:
    """Cost and quality in each task, means over seeds."""
    return np.array([
        [np.mean([each.cost for each in found]), np.mean([each.quality for each in found])]
        for found in tables.verdicts[name].values()
    ])  # fmt: skip


def _plain(found: dict[str, dict[str, Verdict]]) -> Row:
    return {name: {task: verdict._asdict() for task, verdict in tasks.items()} for name, tasks in found.items()}
