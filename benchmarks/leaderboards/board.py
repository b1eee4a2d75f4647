"""What the leaderboards of all environments share: how learners are trained and watched, and how all are scored.

A split is what one training learns: data, a model, a cost weight. It has one task or several, each with a score on
validation and on test, more being better. Tasks of one unit are scored by their mean, and have one best baseline: that
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
from benchmarks import backends
from benchmarks.leaderboards import report
from benchmarks.results.scores import BASELINES, BOUND, Row, Verdict, score

SEEDS = (17, 42, 1337, 7, 11, 23, 101, 271, 977, 3001)
LOOKS = 20  # at a training, unless the problem says otherwise


class Problem(Protocol):
    """What a leaderboard asks of an environment's module."""

    ID: str
    SPLITS: dict[str, dict[str, Any]]  # arguments of the environment that each training has
    LEARNERS: dict[str, tuple[str, str]]  # name -> algorithm and backend
    BOUND_IS: str  # what stands in its place

    def watched(self, policy: Any, split: str, episodes: int | None, folder: Path) -> float:
        """The mean score over the split's tasks on validation."""

    def judged(self, policy: Any, split: str, episodes: int | None, folder: Path) -> dict[str, Verdict]:
        """What a learner is worth in each task of the split."""

    def baselines(self, split: str, episodes: int | None, folder: Path) -> dict[str, dict[str, Verdict]]:
        """What each rule that does not learn is worth in each task."""

    def bound(self, split: str, episodes: int | None, folder: Path) -> dict[str, Verdict]:
        """What nothing can beat, for the tasks that have a bound."""

    def unit(self, task: str) -> str:
        """The tasks that are scored by their mean."""

    def group(self, task: str) -> str:
        """The tasks whose points of cost and quality belong to one plane."""


class BoardSetup(BaseModel):
    """`policy` is a learner of the board, `baselines` or `bound`; `timesteps`, `episodes` replace the usual."""

    model_config = ConfigDict(extra="forbid")

    policy: str
    timesteps: int | None = Field(default=None, ge=1)
    episodes: int | None = Field(default=None, ge=2)

    @model_validator(mode="after")
    def _without_effect(self) -> BoardSetup:
        """What has no effect on a row must not make it another one."""
        if self.policy in (BASELINES, BOUND):
            self.timesteps = None
        return self


class Leaderboard:
    """An experiment of `benchmarks.runner.runner`."""

    Setup = BoardSetup
    SEEDS = SEEDS
    ONCE = (BASELINES, BOUND)

    def __init__(
        self, problem: Problem, about: str, quick: tuple[str, ...], quick_without: tuple[str, ...] = ()
    ) -> None:
        """`quick` are the splits of a quick board, `quick_without` the learners that it does not have."""
        self.problem, self.about, self.quick = problem, about, quick
        self.SPLITS = tuple(problem.SPLITS)
        self.SETTINGS = {name: {"policy": name} for name in (BASELINES, BOUND, *problem.LEARNERS)}  # the longest first
        self.quick_setups = {name: each for name, each in self.SETTINGS.items() if name not in quick_without}

    def once(self, setup: BoardSetup) -> bool:
        """Whether it is the same for all seeds."""
        return setup.policy in self.ONCE

    def measure(self, setup: BoardSetup, seed: int, split: str, folder: Path) -> tuple[Row, Row]:
        """A learner trained, watched and judged; or all baselines; or the bound."""
        if setup.policy == BASELINES:
            found = self.problem.baselines(split, setup.episodes, folder)
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
        """For each task all verdicts, for each learner what it is worth over all of them."""
        found = score(frame, self.problem.ID, self.problem.unit, self.problem.group)
        return found | {"bound_is": self.problem.BOUND_IS}

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


def _plain(found: dict[str, dict[str, Verdict]]) -> Row:
    return {name: {task: verdict._asdict() for task, verdict in tasks.items()} for name, tasks in found.items()}
