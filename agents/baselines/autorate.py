"""Baselines for MoEAutoRate-v0: cosine schedules, a range test, and a rule of three lines.

Some set the rates of the watched trainings before the first decision, so that their start is their own.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import gymnasium
import numpy as np
from gymnasium.vector import AutoresetMode, VectorEnv

from agents.evaluate import MAX_ROWS, play
from moe_envs.autorate.env import MoEAutoRateVectorEnv
from moe_envs.autorate.estimator import LAYOUT
from moe_envs.autorate.references import RATES
from moe_envs.autorate.signals import BACK, CLIMB, FACTORS, KEEP, got_worse

ID = "moe_envs:MoEAutoRate-v0"
CLIMBED, HELD = 1.1, 1.3  # validation loss over the best one at which the rule goes back
EPISODES = 256  # validation episodes for each rate of the search


def rule(observation: np.ndarray, climb: bool = True) -> np.ndarray:
    """Actions `[n]`: three times the rate until the validation loss is 10 % above the best one, then back; from there
    on, and from the first decision without `climb`, keep the rate, and go back where the loss is 30 % above."""
    part = {name: observation[:, each.slice.start] for name, each in LAYOUT.items()}
    climbing = climb & (part["backs"] == 0)
    worse = got_worse(part["over_first"], part["best_over_first"], np.where(climbing, CLIMBED, HELD))
    return np.where(worse, BACK, np.where(climbing, CLIMB, KEEP))


def estimate(observation: np.ndarray) -> np.ndarray:
    """The actions `[n]` that are rated best: towards the estimated best rate, or back."""
    found: np.ndarray = observation[:, LAYOUT["rating"].slice].argmax(1)
    return found


class Rule:
    """The rule, from the rate drawn or, if `swept`, from what a range test finds, without climbing."""

    kind = "baseline"

    def __init__(self, swept: bool = False) -> None:
        self.swept = swept

    def watch(self, env: VectorEnv[Any, Any, Any]) -> None:
        """Attach to a vector environment."""
        self.envs: list[MoEAutoRateVectorEnv] = getattr(env, "envs", [env])

    def predict(
        self, observation: np.ndarray, state: Any = None, episode_start: Any = None, deterministic: bool = True
    ) -> tuple[np.ndarray, Any]:
        """Actions `[n]`."""
        if self.swept:
            for env in self.envs:
                start_at(env, lambda env: env.references.found[env.context])
        return self.actions(observation), state

    def actions(self, observation: np.ndarray) -> np.ndarray:
        """Actions `[n]` by the observations."""
        return rule(observation, climb=not self.swept)


class Cosine(Rule):
    """A cosine from the rate drawn, from what a range test finds, or from given rates for AdamW and SGD."""

    def __init__(self, swept: bool = False, rates: tuple[float, float] | None = None) -> None:
        super().__init__(swept)
        self.rates = rates

    def predict(
        self, observation: np.ndarray, state: Any = None, episode_start: Any = None, deterministic: bool = True
    ) -> tuple[np.ndarray, Any]:
        """Actions `[n]`."""
        if self.rates is not None:
            adamw, sgd = self.rates
            for env in self.envs:
                start_at(env, lambda env: np.where(env.trainings.training.sgd, sgd, adamw))
        return super().predict(observation, state)

    def actions(self, observation: np.ndarray) -> np.ndarray:
        """Keep the rate."""
        return np.full(len(observation), KEEP)


class Estimate(Rule):
    """The actions that are rated best."""

    def actions(self, observation: np.ndarray) -> np.ndarray:
        """Actions `[n]` by the observations."""
        return estimate(observation)


class RandomChanges(Rule):
    """Random actions from a separate generator."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        self._generator = np.random.default_rng(seed)

    def actions(self, observation: np.ndarray) -> np.ndarray:
        """Random actions."""
        return self._generator.integers(0, len(FACTORS) + 1, len(observation))


def start_at(env: MoEAutoRateVectorEnv, rates: Callable[[MoEAutoRateVectorEnv], np.ndarray]) -> None:
    """Set the rates of the trainings that have not begun."""
    begun = env.taken == 0
    env.rate = np.where(begun, rates(env), env.rate)


def search(report: Callable[[float], object] = lambda share: None, **env_kwargs: Any) -> tuple[float, float]:
    """The initial rates for AdamW and for SGD whose cosines have the highest mean return on validation contexts."""
    mode = AutoresetMode.SAME_STEP.value
    env = gymnasium.make_vec(
        ID, min(EPISODES, MAX_ROWS), "vector_entry_point", autoreset_mode=mode, **(env_kwargs | {"split": "validation"})
    )
    best = []
    for number, rates in enumerate(RATES.values()):
        scores = []
        for place, rate in enumerate(rates.tolist()):
            frame = play(Cosine(rates=(rate, rate)), env, EPISODES, seed=0)
            scores.append(frame.loc[frame["autorate/sgd"] == number, "return"].mean())
            report((number + (place + 1) / len(rates)) / 2)
        best.append(float(rates[int(np.argmax(scores))]))
    env.close()
    return best[0], best[1]


def baselines(
    env_id: str, *, report: Callable[[float], object] = lambda share: None, **env_kwargs: Any
) -> dict[str, Any]:
    """Cosines and the rule from the rate drawn and from a range test, a cosine from rates searched on validation, and
    random actions."""
    arguments = {key: value for key, value in env_kwargs.items() if key != "split"}
    return {
        "random actions": RandomChanges(),
        "cosine": Cosine(),
        "estimate": Estimate(),
        "range test, estimate": Estimate(swept=True),
        "rule": Rule(),
        "range test, cosine": Cosine(swept=True),
        "range test, rule": Rule(swept=True),
        "cosine, searched": Cosine(rates=search(report, **arguments)),
    }


def bound(env_id: str, **env_kwargs: Any) -> None:
    """None: no bound is known. An excess of 0 is the best of eight cosines, chosen in hindsight for each training."""
