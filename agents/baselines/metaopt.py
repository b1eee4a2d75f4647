"""Baselines for MoEMetaOpt-v0: common schedules and a search for their settings.

They set the rates of the watched trainings directly, so the action space does not limit them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import gymnasium
import numpy as np
import pandas as pd
from gymnasium.vector import AutoresetMode

from agents.deploy.metaopt import Rules
from agents.evaluate import play
from moe_envs.metaopt.env import INITIAL_RATES, MoEMetaOptVectorEnv
from moe_envs.metaopt.signals import DECAYS, RATES

ID = "moe_envs:MoEMetaOpt-v0"
KEEP = np.array([1, 1, 1, 1])
WARM_UP, START_SHARE, END_SHARE = 0.3, 1 / 25, 1e-4  # of one-cycle (Smith & Topin 2018), as torch's OneCycleLR
PATIENCE = 3
ROWS = 256  # parallel trainings of a search


class Rates(NamedTuple):
    """Learning rates `[n, 2]` and weight-decay indices `[n, 2]` for gate and experts."""

    rates: np.ndarray
    ladder: np.ndarray


def constant(progress: np.ndarray) -> np.ndarray:
    return np.ones_like(progress)


def linear(progress: np.ndarray) -> np.ndarray:
    return 1 - progress


def cosine(progress: np.ndarray) -> np.ndarray:
    found: np.ndarray = (1 + np.cos(np.pi * progress)) / 2
    return found


def one_cycle(progress: np.ndarray) -> np.ndarray:
    rise = START_SHARE + (1 - START_SHARE) * (1 - np.cos(np.pi * progress / WARM_UP)) / 2
    fall = END_SHARE + (1 - END_SHARE) * (1 + np.cos(np.pi * (progress - WARM_UP) / (1 - WARM_UP))) / 2
    return np.where(progress < WARM_UP, rise, fall)


class Schedule:
    """Multiplies the learning rates in all rows of the watched environment by a factor over the training.

    Without `settings`, each training starts from the rates drawn by its context.
    """

    kind = "baseline"

    def __init__(self, shape: Callable[[np.ndarray], np.ndarray] = constant, settings: Rates | None = None) -> None:
        self.shape, self.settings = shape, settings

    def watch(self, env: MoEMetaOptVectorEnv) -> None:
        """Attach to a vector environment."""
        self.env, self._first = env, np.zeros((env.num_envs, 2))

    def predict(
        self, observation: np.ndarray, state: Any = None, episode_start: Any = None, deterministic: bool = True
    ) -> tuple[np.ndarray, Any]:
        """Set the rates and return a neutral action."""
        env, begun = self.env, self.env.taken == 0
        self._first[begun] = env.training.rates[begun]
        if self.settings is not None:
            self._first[begun] = np.broadcast_to(self.settings.rates, self._first.shape)[begun]
            env.ladder = np.broadcast_to(self.settings.ladder, env.ladder.shape).copy()
        rates = self._first * self.factor(begun)[:, None]
        env.training.set(np.clip(rates, *RATES), DECAYS[env.ladder])
        return np.tile(KEEP, (len(observation), 1)), state

    def factor(self, begun: np.ndarray) -> np.ndarray:
        """Current factor of the initial rates, `[n]`."""
        return self.shape(self.env.taken / self.env.max_actions)


class Plateau(Schedule):
    """Halves the rates when the validation loss has not fallen for three validations (torch's ReduceLROnPlateau)."""

    def watch(self, env: MoEMetaOptVectorEnv) -> None:
        """Attach to a vector environment."""
        super().watch(env)
        self._factor, self._best, self._waited = (
            np.ones(env.num_envs),
            np.full(env.num_envs, np.inf),
            np.zeros(env.num_envs),
        )

    def factor(self, begun: np.ndarray) -> np.ndarray:
        """Factor 1, halved at each plateau."""
        loss = self.env.validation_loss
        self._factor[begun], self._best[begun], self._waited[begun] = 1.0, np.inf, 0
        better = loss < self._best
        self._waited = np.where(better, 0, self._waited + 1)
        self._best = np.minimum(self._best, loss)
        plateau = self._waited >= PATIENCE
        self._factor[plateau] /= 2
        self._waited[plateau] = 0
        return self._factor


class Heuristic(Schedule):
    """`agents.deploy.metaopt.Rules` in every row, starting from the rates drawn by its context."""

    def watch(self, env: MoEMetaOptVectorEnv) -> None:
        """Attach to a vector environment."""
        super().watch(env)
        self._rules = [Rules() for _ in range(env.num_envs)]

    def predict(
        self, observation: np.ndarray, state: Any = None, episode_start: Any = None, deterministic: bool = True
    ) -> tuple[np.ndarray, Any]:
        """Set the rates and decays and return a neutral action."""
        env, norms = self.env, self.env.training.weight_norms()
        rates, ladder = env.training.rates.copy(), env.ladder.copy()
        for row, rules in enumerate(self._rules):
            if env.taken[row] == 0:
                rules = self._rules[row] = Rules()
            metrics = {"validation_loss": env.validation_loss[row], "gate_entropy": env.gate_entropy[row]}
            rates[row], ladder[row] = rules(metrics, rates[row], ladder[row], norms[row])
        env.ladder = ladder
        env.training.set(rates, DECAYS[ladder])
        return np.tile(KEEP, (len(observation), 1)), state


class RandomActions:
    """Random actions from a separate generator."""

    kind = "baseline"

    def __init__(self, seed: int = 0) -> None:
        self._generator = np.random.default_rng(seed)

    def predict(
        self, observation: np.ndarray, state: Any = None, episode_start: Any = None, deterministic: bool = True
    ) -> tuple[np.ndarray, Any]:
        """Random actions."""
        return self._generator.integers(0, 3, (len(observation), 4)), state


SCHEDULES: dict[str, Callable[[Rates | None], Schedule]] = {
    "constant": lambda settings: Schedule(constant, settings),
    "linear": lambda settings: Schedule(linear, settings),
    "cosine": lambda settings: Schedule(cosine, settings),
    "one-cycle": lambda settings: Schedule(one_cycle, settings),
    "plateau": lambda settings: Plateau(settings=settings),
}


def trainings(policy: Any, seeds: Iterable[int], split: str, **env_kwargs: Any) -> pd.DataFrame:
    """Run one training per seed, in order; columns of `agents.evaluate` and `steps`, the decisions to the target, or
    the maximum plus one if it was not reached."""
    if not isinstance(env_kwargs.get("task", ""), str):
        raise ValueError(f"task={env_kwargs['task']!r}: baselines judge one task at a time")
    seeds = list(seeds)
    env = gymnasium.make_vec(
        ID, len(seeds), "vector_entry_point", autoreset_mode=AutoresetMode.SAME_STEP.value, split=split, **env_kwargs
    )
    frame = play(policy, env, len(seeds), seeds)
    arrived, most = frame["meta/arrived"] == 1, env.unwrapped.max_actions  # type: ignore[attr-defined]
    return frame.assign(arrived=arrived, steps=frame["meta/actions"].where(arrived, most + 1))


class Searched(NamedTuple):
    """Best settings of a search, their mean steps in the last round, and the total number of decisions."""

    settings: Rates
    steps: float
    decisions: int


class Round(NamedTuple):
    """Search round: number of candidates and contexts per candidate."""

    candidates: int
    contexts: int


def search(
    make: Callable[[Rates | None], Schedule], groups: bool, rounds: Iterable[Round], seed: int = 0, **env_kwargs: Any
) -> Searched:
    """Search settings with the fewest mean steps on validation contexts; the best random candidates advance to the next
    round.

    With `groups`, gate and experts have separate settings.
    """
    rounds = list(rounds)
    generator, count = np.random.default_rng(seed), rounds[0].candidates
    size = (count, 2 if groups else 1)
    low, high = np.log([INITIAL_RATES[0], RATES[1]])
    rates = np.exp(generator.uniform(low, high, size)) * np.ones(2)
    ladder = generator.integers(len(DECAYS), size=size) * np.ones(2, dtype=np.int64)
    steps, decisions = np.zeros(count), 0
    for candidates, contexts in rounds:
        best = np.argsort(steps, kind="stable")[:candidates]
        rates, ladder = rates[best], ladder[best]
        frames = []
        for first in range(0, candidates, max(1, ROWS // contexts)):  # more rows would exceed the CPU caches
            chunk = slice(first, first + max(1, ROWS // contexts))
            settings = Rates(np.repeat(rates[chunk], contexts, 0), np.repeat(ladder[chunk], contexts, 0))
            seeds = list(range(contexts)) * len(rates[chunk])
            frames.append(trainings(make(settings), seeds, "validation", **env_kwargs))
        frame = pd.concat(frames, ignore_index=True)
        steps = frame["steps"].to_numpy().reshape(candidates, contexts).mean(1)
        decisions += int(frame["meta/actions"].sum())
    best_one = int(steps.argmin())
    return Searched(Rates(rates[best_one], ladder[best_one]), float(steps[best_one]), decisions)


ROUNDS = (Round(48, 8), Round(12, 32), Round(4, 128))  # 1,280 trainings per schedule
BY_GROUP = "constant, by group"  # separate settings for gate and experts
DECAY = 1e-2  # initial weight decay, AdamW's default


def baselines(
    env_id: str,
    *,
    report: Callable[[float], object] = lambda share: None,
    rounds: Iterable[Round] = ROUNDS,
    **env_kwargs: Any,
) -> dict[str, Any]:
    """Schedules from the initial rate of each training and with settings searched on validation, our rules, and random
    actions. `rounds` are the rounds of each of the six searches."""
    arguments = {key: value for key, value in env_kwargs.items() if key != "split"}
    found: dict[str, Any] = {"random actions": RandomActions(), "rules": Heuristic()}
    found |= {name: make(None) for name, make in SCHEDULES.items()}
    searches = {f"{name}, searched": (make, False) for name, make in SCHEDULES.items()}
    searches[f"{BY_GROUP}, searched"] = SCHEDULES["constant"], True
    for number, (name, (make, groups)) in enumerate(searches.items()):
        found[name] = make(search(make, groups, list(rounds), **arguments).settings)
        report((number + 1) / len(searches))
    return found


def bound(env_id: str, **env_kwargs: Any) -> None:
    """None, since no bound is known; `agents.baselines.metaopt_bound.beam_search` finds good sequences only."""
