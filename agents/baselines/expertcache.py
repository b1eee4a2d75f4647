"""Baselines for MoEExpertCache-v0: which missing experts are loaded by rules on their weights, with each eviction; for
recorded routing, which experts are loaded in advance.

Rules are tuned on validation streams for the cost weight and the capacity, several candidates side by side.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, TypeVar

import numpy as np

from agents.evaluate import make_rows
from experts.offload.demand import EVICTIONS
from moe_envs.expertcache.env import MoEExpertCacheVectorEnv

ID = "moe_envs:MoEExpertCache-v0"
STREAMS = 44  # of validation, on which rules are tuned
TOGETHER = 8  # candidates side by side
WEIGHTS = (0.0, 0.04, 0.07, 0.1, 0.13, 0.16, 0.19, 0.22, 0.25, 0.28, 0.32, 0.36, 0.4, 0.46, 0.55, 0.7, 1.01)
FINE = tuple(sorted({*WEIGHTS, *((low + high) / 2 for low, high in pairwise(WEIGHTS))}))  # for the best rules
FUTURES = (0.1, 0.2, 0.4)  # what gain in demand is worth, in weight
CHANCES = (0.0, 0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.6, 0.8)
BIASES = (0.0, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0, 4.0)
OF_RULES = ("split", "eviction", "fallback", "max_episode_steps")  # which they have themselves, or none
Report = Callable[[float], object]


class LoadRule:
    """Which of the missing experts are loaded, by `bits`; `env_kwargs` say what leaves the memory."""

    kind = "baseline"
    source = "model"
    sees_hidden = False  # whether it reads this part of the observation

    def __init__(self, *, eviction: str = "predicted", fallback: str = "substitute") -> None:
        self.env_kwargs = {"eviction": eviction, "fallback": fallback}

    def bits(self, observation: np.ndarray, rows: slice) -> np.ndarray:
        """Whether each of the best experts is loaded if it is missing, `[m, K]`, for these rows of the environment."""
        raise NotImplementedError

    def watch(self, env: MoEExpertCacheVectorEnv) -> None:
        """Attach to a vector environment."""
        self.env = env

    def predict(
        self, observation: np.ndarray, state: Any = None, episode_start: Any = None, deterministic: bool = True
    ) -> tuple[np.ndarray, Any]:
        """Actions `[n, K]`."""
        return self.bits(observation, slice(None)).astype(np.int8), state


class Always(LoadRule):
    """The same for all: everything is loaded, or nothing."""

    def __init__(self, load: bool, **env_kwargs: str) -> None:
        super().__init__(**env_kwargs)
        self.load = load

    @property
    def about(self) -> dict[str, Any]:
        """Its arguments, as JSON has them."""
        return {"load": self.load, **self.env_kwargs}

    def bits(self, observation: np.ndarray, rows: slice) -> np.ndarray:
        return np.full((len(observation), self.env.k), self.load)


class MinimumWeight(LoadRule):
    """Load experts of at least a weight, one for each layer; `future` times the gain in demand is added to theirs."""

    def __init__(self, thresholds: Sequence[float] | np.ndarray, future: float = 0.0, **env_kwargs: str) -> None:
        super().__init__(**env_kwargs)
        self.thresholds, self.future = np.array(thresholds), future

    @property
    def key(self) -> tuple[bytes, float]:
        """The same for rules with the same parameters."""
        return self.thresholds.tobytes(), self.future

    @property
    def about(self) -> dict[str, Any]:
        """Its arguments, as JSON has them."""
        return {"thresholds": self.thresholds.tolist(), "future": self.future, **self.env_kwargs}

    def bits(self, observation: np.ndarray, rows: slice) -> np.ndarray:
        weights, gain, layer = (observation[:, self.env.observation_layout[name].slice] for name in PARTS)
        return np.asarray(weights + self.future * gain >= self.thresholds[layer.argmax(1)][:, None])


PARTS = ("weights", "gain", "layer")
AnyRule = TypeVar("AnyRule", bound=LoadRule)


class Biased(LoadRule):
    """The router prefers experts in memory: their logits are raised by `bias`, and what is missing of the best ones
    then is loaded (Skliar et al. 2024, arXiv 2412.00099)."""

    def __init__(self, bias: float, **env_kwargs: str) -> None:
        super().__init__(**env_kwargs)
        self.bias = bias

    @property
    def about(self) -> dict[str, Any]:
        """Its arguments, as JSON has them."""
        return {"bias": self.bias, **self.env_kwargs}

    def bits(self, observation: np.ndarray, rows: slice) -> np.ndarray:
        env = self.env
        raised = env.logits()[rows] + self.bias * env.residents()[rows]
        least = np.sort(raised, axis=1)[:, -env.k, None]
        return np.asarray(np.take_along_axis(raised, env.wanted()[rows], 1) >= least)


class Coin(LoadRule):
    """Each candidate is loaded with probability one half."""

    def __init__(self, seed: int = 0, **env_kwargs: str) -> None:
        super().__init__()
        self.env_kwargs, self.random = env_kwargs or self.env_kwargs, np.random.default_rng(seed)

    def bits(self, observation: np.ndarray, rows: slice) -> np.ndarray:
        return self.random.random((len(observation), self.env.k)) < 0.5


class Prefetch(LoadRule):
    """For `source="trace"`: load in advance the `most` probable experts of the next layer, if they are asked for with a
    probability of at least `least`; with `again`, those that the last token asked for there."""

    source = "trace"

    def __init__(self, most: int, least: float = 0.0, again: bool = False, *, eviction: str = "predicted") -> None:
        self.env_kwargs = {"eviction": eviction}
        self.most, self.least, self.again = most, least, again

    def bits(self, observation: np.ndarray, rows: slice) -> np.ndarray:
        chance, again = (observation[:, self.env.observation_layout[name].slice] for name in ("chance", "again"))
        likely = again > 0 if self.again else (chance >= self.least) & (chance > 0)
        return np.asarray(likely & (likely.cumsum(1) <= self.most))


class RuleTuning:
    """Validation streams on which rules are compared."""

    def __init__(self, env_kwargs: dict[str, Any], streams: int = STREAMS) -> None:
        self.env_kwargs, self.most = {**env_kwargs, "split": "validation"}, streams
        self.env = env = self._env(1, {})
        self.layers, self.k = int(env.layers), int(env.k)

    def scores(self, rules: Sequence[LoadRule]) -> np.ndarray:
        """Mean returns of rules with the same `env_kwargs`."""
        found = [self._played(rules[start : start + TOGETHER]) for start in range(0, len(rules), TOGETHER)]
        return np.concatenate(found)

    def best(self, rules: Sequence[AnyRule]) -> AnyRule:
        """The rule with the best return."""
        return rules[int(self.scores(rules).argmax())]

    def climbed(self, starts: Sequence[MinimumWeight], weights: Sequence[float] = WEIGHTS) -> list[MinimumWeight]:
        """From each of these rules, which have the same `env_kwargs`, one layer after the other goes to a better
        threshold near it until no layer does; side by side, as many rows are faster than few."""
        known: dict[tuple[bytes, float], float] = {}
        before: list[MinimumWeight] = []
        best = list(starts)
        while best != before:
            before = best
            for layer in range(self.layers):
                trials = [[rule, *_near(rule, layer, weights)] for rule in best]
                new = {each.key: each for near in trials for each in near if each.key not in known}
                if new:
                    known.update(zip(new, self.scores(list(new.values())).tolist(), strict=True))
                best = [max(near, key=lambda rule: known[rule.key]) for near in trials]
        return best

    def _env(self, rows: int, env_kwargs: dict[str, str]) -> MoEExpertCacheVectorEnv:
        env: Any = make_rows(ID, rows, **{**self.env_kwargs, **env_kwargs}).unwrapped
        made: MoEExpertCacheVectorEnv = env
        return made

    def _played(self, rules: Sequence[LoadRule]) -> np.ndarray:
        count = len(self._env(1, rules[0].env_kwargs).stepped.streams)
        streams = np.unique(np.linspace(0, count - 1, min(self.most, count)).round().astype(np.int64))
        size = len(streams)
        env = self._env(size * len(rules), rules[0].env_kwargs)
        parts = [slice(place * size, (place + 1) * size) for place in range(len(rules))]
        for rule in rules:
            rule.watch(env)
        observation, _ = env.reset(seed=0, options={"stream": np.tile(streams, len(rules))})
        total = np.zeros(env.num_envs)
        for _ in range(env.tokens * env.layers):
            bits = [rule.bits(observation[part], part) for rule, part in zip(rules, parts, strict=True)]
            observation, reward, _, _, _ = env.step(np.concatenate(bits).astype(np.int8))
            total += reward
        return total.reshape(len(rules), size).mean(1)


def baselines(
    env_id: str, *, report: Report = lambda share: None, streams: int = STREAMS, **env_kwargs: Any
) -> dict[str, Any]:
    """Rules that load by weight, each with its eviction, tuned on `streams` of validation; those without a parameter:
    all, nothing, at random."""
    kwargs = {name: value for name, value in env_kwargs.items() if name not in OF_RULES}
    tuning = RuleTuning(kwargs, streams)
    if kwargs.get("source") == "trace":
        return _prefetching(tuning, report)
    rules: dict[str, Any] = {f"all loaded, {eviction}": Always(True, eviction=eviction) for eviction in EVICTIONS}
    rules["nothing loaded"] = Always(False)
    rules["nothing loaded or substituted"] = Always(False, fallback="skip")
    advised = tuning.env.advised()
    for number, eviction in enumerate(("lru", "ema", "predicted")):
        rules[f"minimum weight, {eviction}"] = alike = tuning.best(_alike(tuning.layers, eviction=eviction))
        starts = [alike, MinimumWeight(advised, eviction=eviction)]
        rules[f"minimum weight per layer, {eviction}"] = per_layer = tuning.best(tuning.climbed(starts))
        report(0.2 * (number + 1))
    rules["where PPO starts"] = MinimumWeight(advised)
    with_future = tuning.climbed([MinimumWeight(per_layer.thresholds, future) for future in FUTURES])
    per_layer, *with_future = tuning.climbed([per_layer, *with_future], FINE)
    rules["minimum weight per layer, predicted"] = per_layer
    rules["minimum weight and demand per layer, predicted"] = tuning.best(with_future)
    report(0.85)
    (skipping,) = tuning.climbed([MinimumWeight(per_layer.thresholds, fallback="skip")])
    rules["minimum weight per layer, nothing instead"] = skipping
    rules["bias towards memory"] = tuning.best([Biased(bias) for bias in BIASES])
    rules["at random"] = Coin()
    report(1.0)
    return rules


def _prefetching(tuning: RuleTuning, report: Report) -> dict[str, Any]:
    """Rules for recorded routing."""
    rules: dict[str, Any] = {
        f"nothing in advance, {eviction}": Prefetch(0, eviction=eviction) for eviction in EVICTIONS
    }
    for number, eviction in enumerate(("predicted", "lru", "ema")):
        rules[f"most probable, {eviction}"] = tuning.best(_prefetches(tuning.k, eviction))
        again = [Prefetch(most, again=True, eviction=eviction) for most in range(1, tuning.k + 1)]
        rules[f"as the last token, {eviction}"] = tuning.best(again)
        report((number + 1) / 3)
    rules["at random"] = Coin(eviction="lru")
    return rules


def _prefetches(k: int, eviction: str) -> list[LoadRule]:
    return [Prefetch(most, least, eviction=eviction) for most in range(1, k + 1) for least in CHANCES]


def _alike(layers: int, **env_kwargs: Any) -> list[MinimumWeight]:
    return [MinimumWeight([weight] * layers, **env_kwargs) for weight in WEIGHTS]


def _near(rule: MinimumWeight, layer: int, weights: Sequence[float]) -> list[MinimumWeight]:
    """The rule with the next lower and higher threshold of a layer, and the nearest one if it stands at none."""
    here = int(np.abs(np.array(weights) - rule.thresholds[layer]).argmin())
    found = []
    for weight in weights[max(0, here - 1) : here + 2]:
        if weight != rule.thresholds[layer]:
            thresholds = rule.thresholds.copy()
            thresholds[layer] = weight
            found.append(MinimumWeight(thresholds, rule.future, **rule.env_kwargs))
    return found


class Clairvoyant(MinimumWeight):
    """The best thresholds for a memory that sees the future."""

    kind = "bound"


def bound(env_id: str, *, streams: int = STREAMS, **env_kwargs: Any) -> LoadRule:
    """Thresholds per layer, with an eviction that sees what the model with all experts will ask for; for recorded
    routing, what is loaded in advance is known to be needed, too. It is no exact bound: other loads may be better."""
    kwargs = {name: value for name, value in env_kwargs.items() if name not in OF_RULES}
    tuning = RuleTuning(kwargs, streams)
    if kwargs.get("source") == "trace":
        known: Any = tuning.best([Prefetch(most, eviction="belady") for most in range(1, tuning.k + 1)])
        known.kind = "bound"
        return known
    alike = tuning.best(_alike(tuning.layers, eviction="belady"))
    starts = [alike, MinimumWeight(tuning.env.advised(), eviction="belady")]
    found = tuning.best(tuning.climbed(tuning.climbed(starts), FINE))
    return Clairvoyant(found.thresholds, eviction="belady")
