"""Leaderboard of any registered environment: training, evaluation and scoring.

A split defines one training: data set, model and cost weight. It has one or more tasks, each with a score on validation
and on test (higher is better). Tasks of one unit are scored by their mean and share one best baseline, the one with the
best mean on validation. Learners train on the training split, keep the weights that score best on validation, and are
evaluated on test.
"""

from __future__ import annotations

import copy
import importlib
import json
from collections.abc import Callable, Mapping
from inspect import signature
from itertools import combinations
from pathlib import Path
from typing import Any

import gymnasium
import pandas as pd
from pydantic import BaseModel, ConfigDict, Field, SerializerFunctionWrapHandler, model_serializer, model_validator

import moe_envs
from agents import baselines as rules
from agents import training, tuned
from agents.evaluate import evaluate
from benchmarks.leaderboards import report
from benchmarks.results.scores import BASELINES, BOUND, Row, Verdict, score

SEEDS = (17, 42, 1337, 7, 11, 23, 101, 271, 977, 3001)
LEARNERS = {"PPO": ("ppo", "own"), "REINFORCE": ("reinforce", "own"), "SB3 PPO": ("ppo", "sb3")}


class Problem:
    """Leaderboard hooks of an environment; subclasses override what is specific to a problem.

    Each split in the spec's `boards` is one task, scored by mean return.
    """

    learners: Mapping[str, tuple[str, str]] = LEARNERS  # algorithm and backend
    extras: Mapping[str, tuple[str, str]] = {}  # run only if a matrix names them
    own: Mapping[str, str] = {}  # more learners of the package, as "module:attribute", see `own_policy`
    looks = 20  # evaluations per training
    episodes: Mapping[str, int] = {"validation": 1000, "test": 2000}
    first_seed = 10_000
    episodic = True  # whether policies are evaluated by episodes
    settable = True  # whether it can be run with other arguments of the environment
    bound_is = "exact bound"
    about = (
        "Scores are mean returns of {test:,} test episodes, the same for all policies; everything is chosen on "
        "{validation:,} of validation. A policy's own cost is not counted. The bound looks at the answers."
    )

    def __init__(self, env_id: str) -> None:
        self.env_id = moe_envs.full_id(env_id)
        self.splits = {name: dict(kwargs) for name, kwargs in moe_envs.find(env_id).boards.items()}

    def within(self, env: Mapping[str, Any]) -> Problem:
        """The same problem with these arguments of the environment in all splits; raises `ValueError` for others."""
        if env and not self.settable:
            raise ValueError(f"the leaderboard of {self.env_id} has a setting of its own, without env")
        known = self._arguments() if env else set()
        if unknown := sorted(set(env) - known):
            raise ValueError(f"env: {unknown[0]!r} is none of {', '.join(sorted(known))}")
        found = copy.copy(self)
        found.splits = {name: kwargs | dict(env) for name, kwargs in self.splits.items()}
        return found

    def prepared(self, policy: str, agent: Any, total: int) -> Callable[[Any], object]:
        """Return the callback after each update of a learner; may modify the agent before training."""
        return lambda agent: None

    def watched(self, policy: Any, split: str, episodes: int | None, folder: Path) -> float:
        """Mean validation score over the tasks of the split."""
        return float(self._played(policy, split, "validation", episodes)["return"].mean())

    def judged(self, policy: Any, split: str, episodes: int | None, folder: Path) -> dict[str, Verdict]:
        """Evaluate a policy on each task of the split."""
        test = self._played(policy, split, "test", episodes)
        quality, cost = (float(test[name].mean()) if name in test else 0.0 for name in ("quality", "cost"))
        score = float(test["return"].mean())
        return {split: Verdict(self.watched(policy, split, episodes, folder), score, quality, cost)}

    def baselines(self, split: str, episodes: int | None, folder: Path) -> dict[str, dict[str, Verdict]]:
        """Evaluate each baseline on each task."""
        found = rules.find(self.env_id).baselines(self.env_id, report=lambda share: None, **self.splits[split])
        return {name: self.judged(policy, split, episodes, folder) for name, policy in found.items()}

    def bound(self, split: str, episodes: int | None, folder: Path) -> dict[str, Verdict]:
        """Upper bound for the tasks that have one."""
        policy = rules.find(self.env_id).bound(self.env_id, **self.splits[split])
        return {} if policy is None else self.judged(policy, split, episodes, folder)

    def unit(self, task: str) -> str:
        """Unit of a task: its tasks are scored by their mean."""
        return task

    def group(self, task: str) -> str:
        """Group of tasks that share a cost-quality plane: "DATA, ..."."""
        return task.partition(",")[0]

    def _arguments(self) -> set[str]:
        """Arguments of the environment but the split and those of all environments."""
        made: Any = gymnasium.make(self.env_id, disable_env_checker=True, **moe_envs.find(self.env_id).small).unwrapped
        every = signature(type(getattr(made, "vector", made)).__init__).parameters.values()
        return {each.name for each in every if each.kind is each.KEYWORD_ONLY} - {"split"}

    def _played(self, policy: Any, split: str, on: str, episodes: int | None) -> pd.DataFrame:
        arguments = rules.on_split(self.env_id, self.splits[split], on)
        count = episodes or self.episodes[on]
        first = self.first_seed if arguments != self.splits[split] else self.first_seed + (on == "test") * 10**6
        return evaluate(policy, self.env_id, count, first, **arguments)


class BoardSetup(BaseModel):
    """`policy` is a learner of the board, `baselines`, `bound`, or your own as "module:attribute"; `timesteps`,
    `episodes` and arguments of the environment (`env`) override the defaults."""

    model_config = ConfigDict(extra="forbid")

    policy: str
    timesteps: int | None = Field(default=None, ge=1)
    episodes: int | None = Field(default=None, ge=2)
    env: dict[str, Any] = Field(default={})

    @model_serializer(mode="wrap")
    def _dumped(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Without an empty `env`, as in the rows of boards that were published before there was one."""
        found: dict[str, Any] = dump(self)
        return {name: value for name, value in found.items() if name != "env" or value}

    @property
    def imports(self) -> tuple[str, ...]:
        """What a run of this setup would import and call."""
        return (self.policy,) if ":" in self.policy else ()

    @model_validator(mode="after")
    def _without_effect(self) -> BoardSetup:
        """Reset fields that have no effect, so that equal rows compare equal."""
        if self.policy in (BASELINES, BOUND) or ":" in self.policy:
            self.timesteps = None
        return self


class Leaderboard:
    """Leaderboard as an experiment of `benchmarks.runner`."""

    Setup = BoardSetup
    SEEDS: tuple[int, ...] = SEEDS
    ONCE = (BASELINES, BOUND)

    def __init__(self, problem: Problem) -> None:
        self.problem, self.SPLITS = problem, tuple(problem.splits)
        self.SETTINGS = {
            name: {"policy": problem.own.get(name, name)}
            for name in (BASELINES, BOUND, *problem.learners, *problem.own)
        }  # the longest runs first
        self.QUICK: dict[str, Any] = {"seeds": list(SEEDS[:3]), "splits": [self.SPLITS[0]]}
        self.__doc__ = f"The leaderboard of {problem.env_id}."

    def once(self, setup: BoardSetup) -> bool:
        """Whether the result is the same for all seeds."""
        return setup.policy in self.ONCE

    def measure(self, setup: BoardSetup, seed: int, split: str, folder: Path) -> tuple[Row, Row]:
        """Train and evaluate a learner, or evaluate a user policy, all baselines or the bound."""
        problem, episodes = self.problem.within(setup.env), setup.episodes
        if setup.policy == BASELINES:
            return {"policies": _plain(problem.baselines(split, episodes, folder))}, {}
        if setup.policy == BOUND:
            return {"policies": _plain({BOUND: problem.bound(split, episodes, folder)})}, {}
        if ":" in setup.policy:
            policy = own_policy(setup.policy, problem.env_id, seed, problem.splits[split])
            return {"policies": _plain({setup.policy: problem.judged(policy, split, episodes, folder)})}, {}
        trained = self._trained(problem, setup, seed, split, folder)
        found = {setup.policy: problem.judged(trained.agent, split, episodes, folder)}
        curve = [{"steps": look.steps, "validation": look.score} for look in trained.curve]
        seconds = {
            "train_s": [look.cpu_s for look in trained.curve],
            "train_wall_s": [look.wall_s for look in trained.curve],
        }
        return {"policies": _plain(found), "curve": curve}, seconds

    def check(self, setups: dict[str, BoardSetup], splits: list[str]) -> None:
        """Raise `ValueError` for an unknown policy, for settings that a board does not have, and where policies would
        not be compared in the same environment, or two splits be the same."""
        known = *self.problem.learners, *self.problem.extras, *self.ONCE
        for name, setup in setups.items():
            if setup.policy not in known and ":" not in setup.policy:
                raise ValueError(
                    f"policy {setup.policy!r} of the setup {name!r} is none of {', '.join(known)}, nor your own as "
                    "module:attribute"
                )
            if setup.episodes is not None and not self.problem.episodic:
                raise ValueError(f"episodes={setup.episodes}: nothing is judged by episodes here")
        if len({json.dumps(setup.model_dump(mode="json").get("env"), sort_keys=True) for setup in setups.values()}) > 1:
            raise ValueError("setups with different arguments of the environment (env) cannot be compared")
        env = next(iter(setups.values())).env
        changed = self.problem.within(env).splits
        for split in splits if env else ():
            try:
                gymnasium.make(self.problem.env_id, disable_env_checker=True, **changed[split]).close()
            except (ValueError, RuntimeError) as error:
                raise ValueError(f"env, in the split {split!r}: {error}") from error
        for one, other in combinations(splits, 2):
            if env and changed[one] == changed[other]:
                raise ValueError(
                    f"with these arguments (env) {one!r} and {other!r} are the same: choose one by --split"
                )

    def _trained(self, problem: Problem, setup: BoardSetup, seed: int, split: str, folder: Path) -> training.Trained:
        algo, backend = {**problem.learners, **problem.extras}[setup.policy]
        more = {"total_timesteps": setup.timesteps} if setup.timesteps else {}
        return training.train(
            problem.env_id, algo, backend,
            seed=seed,
            env_kwargs=problem.splits[split],
            settings=tuned.settings(algo, problem.env_id, backend, **more),
            judge=lambda agent: problem.watched(agent, split, setup.episodes, folder),
            looks=problem.looks,
            prepare=lambda agent, total: problem.prepared(setup.policy, agent, total),
        )  # fmt: skip

    def headline(self, setup: BoardSetup, metrics: Row) -> str:
        """Result of a finished run in one line."""
        found = [
            f"{task} {verdict['test']:.4f}" for tasks in metrics["policies"].values() for task, verdict in tasks.items()
        ]
        return "" if setup.policy == BASELINES else f"{setup.policy} on test: {', '.join(found)}"

    def score(self, frame: pd.DataFrame) -> Row:
        """Verdicts per task, and scores per learner over all tasks."""
        problem = self.problem.within(frame["env"].iloc[0] if "env" in frame else {})
        found = score(frame, problem.env_id, moe_envs.find(problem.env_id).reference_point, problem.unit, problem.group)
        return found | {"bound_is": problem.bound_is, "tables": report.tables(found, problem.bound_is)}

    def plot(self, frame: pd.DataFrame, result: Row, out: Path) -> list[str]:
        """Plot the leaderboard."""
        return report.plot(frame, result, out)

    def text(self, result: Row) -> str:
        """The leaderboard as Markdown."""
        return report.text(result, self.problem.about.format(**self.problem.episodes))


def own_policy(reference: str, env_id: str, seed: int, env_kwargs: dict[str, Any]) -> Any:
    """Load a policy by "module:attribute": an object with `predict`, or a function of `(env_id, seed, **env_kwargs)`
    that creates (and may train) one."""
    module, _, name = reference.partition(":")
    try:
        found = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"policy {reference!r} cannot be found: {error}") from error
    policy = found if hasattr(found, "predict") and not isinstance(found, type) else found(env_id, seed, **env_kwargs)
    if not hasattr(policy, "predict"):
        raise ValueError(f"policy {reference!r} gives {policy!r}, which has no predict(observation, ...)")
    return policy


def _plain(found: dict[str, dict[str, Verdict]]) -> Row:
    return {name: {task: verdict._asdict() for task, verdict in tasks.items()} for name, tasks in found.items()}
