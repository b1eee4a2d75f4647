"""Baselines for MoELayerTopK-v0: numbers of experts by rules on the router's probabilities, and an oracle.

Rules are tuned on validation for the cost weight or the budget, in whole passages at once, which is faster than steps.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import product
from typing import Any

import numpy as np
import torch

from agents.baselines.supervised import values
from agents.evaluate import make_rows, play
from cost.timing import torch_threads
from moe_envs.layertopk.env import MoELayerTopKVectorEnv
from moe_envs.layertopk.model import SteppedModel

ID = "moe_envs:MoELayerTopK-v0"
Count = Callable[["Routed"], np.ndarray]  # numbers of experts [n], by the router
PASSAGES = 12  # of a domain on which rules are tuned
SHORTLIST = 24  # static numbers that are judged on all of these passages
RESERVES = (0.0, 0.5, 0.75, 1.0)  # experts kept for each later decision, under a budget
GRIDS: dict[str, tuple[float, ...]] = {
    "top-p": (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.01),
    "minimum probability": (0.0, 0.02, 0.04, 0.06, 0.08, 0.1, 0.13, 0.17, 0.22, 0.3, 0.4, 1.01),
    "minimum weight": (0.0, 0.08, 0.12, 0.16, 0.2, 0.24, 0.28, 0.34, 0.45, 0.6, 1.01),
    "ratio (NAEE)": (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.01),
    "entropy": (0.25, 0.4, 0.55, 0.7, 0.85, 1.0, 1.2, 1.5, 2.0, 4.0, np.inf),
}


@dataclass(frozen=True)
class Routed:
    """What a rule sees of n tokens in their layers: log probabilities of the best experts `[n, K + 2]`, entropy in nats
    `[n]`, layer `[n]`."""

    best: np.ndarray
    entropy: np.ndarray
    layer: np.ndarray

    @property
    def k(self) -> int:
        """The most experts of a token."""
        return self.best.shape[1] - 2

    @property
    def odds(self) -> np.ndarray:
        """Probabilities of the best K experts `[n, K]`."""
        return np.asarray(np.exp(self.best[:, : self.k]))


def counted(kind: str, thresholds: Sequence[float], experts: int) -> Count:
    """A rule of `GRIDS` with a threshold for each layer.

    "top-p" takes the fewest experts whose probabilities sum to p; "minimum probability" and "minimum weight" those of
    at least so much, of all experts or of the best K; "ratio (NAEE)" those of at least a share of the best (Lu et al.
    2024); "entropy" takes a number that rises with the entropy, K at a share of its maximum.
    """
    by_layer = np.array(thresholds)

    def count(seen: Routed) -> np.ndarray:
        limit, odds = by_layer[seen.layer][:, None], seen.odds
        if kind == "top-p":
            found = (odds.cumsum(1) - odds < limit).sum(1)
        elif kind == "minimum probability":
            found = (odds >= limit).sum(1)
        elif kind == "minimum weight":
            found = (odds / odds.sum(1, keepdims=True) >= limit).sum(1)
        elif kind == "ratio (NAEE)":
            found = (odds >= limit * odds[:, :1]).sum(1)
        else:
            share = seen.entropy / (limit[:, 0] * np.log(experts))
            found = np.ceil(share * seen.k).clip(0, seen.k)
        return np.asarray(found, dtype=np.int64)

    return count


def adaptive_k(seen: Routed) -> np.ndarray:
    """The rule of the package adaptive-k: 1 expert below .6 nats of entropy, 2 below 1.2, else K."""
    return np.where(seen.entropy < 0.6, min(1, seen.k), np.where(seen.entropy < 1.2, min(2, seen.k), seen.k))


def static(numbers: Sequence[int]) -> Count:
    """The same numbers of experts for all tokens, one for each layer."""
    by_layer = np.array(numbers)
    return lambda seen: np.asarray(by_layer[seen.layer])


class Watching:
    """A policy that looks at its environment. Under a budget it keeps `reserve` experts for each later decision."""

    kind = "baseline"
    env_kwargs = {"granularity": "layer"}
    reserve = 0.0

    def numbers(self, observation: np.ndarray) -> np.ndarray:
        """Numbers of experts `[n]`, before the budget."""
        raise NotImplementedError

    def watch(self, env: MoELayerTopKVectorEnv) -> None:
        """Attach to a vector environment."""
        self.env = env

    def predict(
        self, observation: np.ndarray, state: Any = None, episode_start: Any = None, deterministic: bool = True
    ) -> tuple[np.ndarray, Any]:
        """Actions `[n]`."""
        env, k = self.env, self.numbers(observation)
        if env.budgeted:
            later = env.left_decisions() - 1
            k = np.minimum(k, np.maximum(np.floor(env.left_experts() - self.reserve * later + 1e-9), 0))
        return k.clip(0, env.k).astype(np.int64), state


class TopKRule(Watching):
    """A rule on the router's probabilities."""

    def __init__(self, count: Count, reserve: float = 0.0) -> None:
        self.count, self.reserve = count, reserve

    def numbers(self, observation: np.ndarray) -> np.ndarray:
        """Numbers of experts `[n]`, before the budget."""
        part = {name: observation[:, each.slice] for name, each in self.env.observation_layout.items()}
        return self.count(Routed(part["router"], part["entropy"][:, 0], part["layer"].argmax(1)))


class Drawn(TopKRule):
    """Numbers drawn at random."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__(lambda seen: self.random.integers(seen.k + 1, size=len(seen.layer)))
        self.random = np.random.default_rng(seed)


class Predicted(Watching):
    """The number with the best predicted quality less cost: a perceptron predicts the change of the token's loss from
    the observation, less its `budget`, and a number of experts; it is trained on random numbers in `rl_train`."""

    def __init__(self, predictor: Callable[[np.ndarray], np.ndarray], prices: np.ndarray) -> None:
        self.predictor, self.prices = predictor, prices

    def numbers(self, observation: np.ndarray) -> np.ndarray:
        """Numbers of experts `[n]`, before the budget."""
        layout, most = self.env.observation_layout, self.env.k
        layer = observation[:, layout["layer"].slice].argmax(1)
        known = observation[:, : layout["budget"].slice.start] if "budget" in layout else observation
        worth = np.stack([self.predictor(_with(known, k, most))[:, 0] for k in range(most + 1)], 1)
        return np.asarray((worth - self.prices[layer]).argmax(1))


class Tuning:
    """Passages of the validation split, run whole: what a rule costs and loses there. Those of the same `key` differ in
    cost weight or budget only."""

    def __init__(self, env_kwargs: dict[str, Any], passages: int = PASSAGES) -> None:
        self.key = tuple(sorted((k, v) for k, v in env_kwargs.items() if k not in ("cost_weight", "budget")))
        self.passages = passages
        env: Any = make_rows(ID, 1, **{**env_kwargs, "split": "validation", "granularity": "layer"}).unwrapped
        self.stepped: SteppedModel = env.stepped
        self.weight, self.budget = env.reward.cost_weight, env_kwargs.get("budget")
        self.relative = env.relative_costs()
        domain = self.stepped.passages.domain
        chosen = [np.flatnonzero(domain == each)[:passages] for each in np.unique(domain)]
        self.ids = self.stepped.passages.ids[np.concatenate(chosen)]
        self.full = self.loss(lambda seen: np.full(len(seen.layer), self.stepped.k))[0]

    def loss(self, count: Count, part: slice = slice(None)) -> tuple[float, float, float]:
        """Mean loss in nats, relative cost of a passage and mean number of experts under a rule."""
        ids, cost, experts, layers = self.ids[part], 0.0, 0, self.stepped.layers

        def decide(layer: int, inputs_ND: torch.Tensor, logits_NE: torch.Tensor) -> torch.Tensor:
            nonlocal cost, experts
            k = count(routed(logits_NE, layer, self.stepped.k)).clip(0, self.stepped.k)
            cost, experts = cost + float(self.relative[layer, k].sum()), experts + int(k.sum())
            return torch.from_numpy(k)

        with torch_threads(1):
            loss = float(self.stepped.model.loss(ids, k=decide).mean())
        return loss, cost / len(ids), experts / (ids[:, 1:].size * layers)

    def score(self, count: Count, part: slice = slice(None)) -> float:
        """Return of a rule, or under a budget its quality, -inf if it takes more than the budget."""
        loss, cost, experts = self.loss(count, part)
        if self.budget is not None and experts > self.budget:
            return -np.inf
        return -loss - self.weight * cost

    def best_static(self, report: Callable[[float], object]) -> tuple[int, ...]:
        """Numbers of experts by layer: all are tried on some passages, the best of them on all."""
        every, loss, cost = statics(self.key, self.passages)
        report(1.0)
        scores = -loss - self.weight * cost
        if self.budget is not None:
            scores[every.sum(1) > self.budget * self.stepped.layers] = -np.inf
        short = [tuple(each) for each in every[np.argsort(scores)[-SHORTLIST:]].tolist()]
        return max(short, key=lambda each: self.score(static(each)))

    def best_thresholds(self, kind: str) -> tuple[list[float], list[float]]:
        """The best single threshold, and the best one for each layer, found one layer after the other."""
        layers, experts = self.stepped.layers, self.stepped.experts
        grid = GRIDS[kind]

        def score(thresholds: list[float]) -> float:
            return self.score(counted(kind, thresholds, experts))

        alike = max(([each] * layers for each in grid), key=score)
        best, highest = list(alike), score(alike)
        before: list[float] = []
        while before != best:  # until no step of one layer is better
            before = list(best)
            for layer, step in product(range(layers), (-2, -1, 1, 2)):
                place = grid.index(best[layer]) + step
                if 0 <= place < len(grid):
                    trial = [*best[:layer], grid[place], *best[layer + 1 :]]
                    if (found := score(trial)) > highest:
                        best, highest = trial, found
        return alike, best


@lru_cache(maxsize=4)
def statics(key: tuple[tuple[str, Any], ...], passages: int = PASSAGES) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """All numbers of experts by layer `[M, L]` with their loss and cost `[M]` on some of the passages of validation."""
    tuning = Tuning(dict(key), passages)
    every = np.array(list(product(range(tuning.stepped.k + 1), repeat=tuning.stepped.layers)))
    few = slice(None, None, max(1, passages // 2))
    found = [tuning.loss(static(each), few)[:2] for each in every.tolist()]
    loss, cost = np.array(found).T
    return every, loss, cost


def routed(logits_NE: torch.Tensor, layer: int, k: int) -> Routed:
    """What a rule sees, from a layer's router logits."""
    logs = logits_NE.log_softmax(-1)
    best = logs.topk(min(k + 2, logs.shape[-1]), dim=-1).values
    entropy = -(logs.exp() * logs).sum(-1)
    return Routed(best.numpy(), entropy.numpy(), np.full(len(logs), layer))


def baselines(
    env_id: str, *, report: Callable[[float], object] = lambda share: None, passages: int = PASSAGES,
    **env_kwargs: Any,
) -> dict[str, Any]:  # fmt: skip
    """Fixed and static numbers, rules with one threshold and with one for each layer, adaptive-k's rule, a supervised
    predictor, and random numbers; tuned on so many `passages` of each domain."""
    kwargs = {key: value for key, value in env_kwargs.items() if key not in ("split", "granularity", "observation")}
    found = tuned(tuple(sorted(kwargs.items())), passages, report)
    rules: dict[str, Any] = {name: TopKRule(count, reserve) for name, (count, reserve) in found.items()}
    rules["predicted change of the loss"] = predicted(kwargs, 42 * passages)
    rules["random"] = Drawn()
    report(1.0)
    return rules


@lru_cache(maxsize=16)
def tuned(
    arguments: tuple[tuple[str, Any], ...], passages: int, report: Callable[[float], object]
) -> dict[str, tuple[Count, float]]:
    """Rules by name, with the reserve that is best under a budget."""
    tuning = Tuning(dict(arguments), passages)
    layers, k, experts = tuning.stepped.layers, tuning.stepped.k, tuning.stepped.experts
    found: dict[str, Count] = {f"k = {each}": static([each] * layers) for each in range(k + 1)}
    found["static per layer"] = static(tuning.best_static(lambda share: report(0.5 * share)))
    for number, kind in enumerate(GRIDS):
        alike, best = tuning.best_thresholds(kind)
        found |= {kind: counted(kind, alike, experts), f"{kind} per layer": counted(kind, best, experts)}
        report(0.5 + 0.4 * (number + 1) / len(GRIDS))
    found["adaptive-k"] = adaptive_k
    if tuning.budget is None:
        return {name: (count, 0.0) for name, count in found.items()}
    env = make_rows(ID, len(tuning.ids), **{**dict(arguments), "split": "validation", "granularity": "layer"})

    def score(count: Count, reserve: float) -> float:
        return float(play(TopKRule(count, reserve), env, env.num_envs, 0)["return"].mean())

    possible = [each for each in RESERVES if each <= tuning.budget]
    return {name: (count, max(possible, key=lambda each: score(count, each))) for name, count in found.items()}


def predicted(env_kwargs: dict[str, Any], episodes: int) -> Predicted:
    """The supervised predictor."""
    data = {}
    for split, count in (("rl_train", episodes), ("validation", max(8, episodes // 4))):
        env: Any = make_rows(ID, count, **{**env_kwargs, "split": split, "granularity": "layer", "budget": None})
        data[split] = _random_play(env)
        unwrapped = env.unwrapped
    predictor = values(data["rl_train"], data["validation"])
    return Predicted(predictor, unwrapped.reward.cost_weight * unwrapped.relative_costs() * unwrapped.tokens)


def _random_play(env: Any) -> tuple[np.ndarray, np.ndarray]:
    """Observations with the numbers drawn, and the change of the token's loss in nats, times -1."""
    policy, inputs, targets = Drawn(), [], []
    policy.watch(env.unwrapped)
    observation, _ = env.reset(seed=0)
    k, layers, tokens = env.unwrapped.k, env.unwrapped.layers, env.unwrapped.tokens
    for _ in range(tokens):
        for _ in range(layers):
            actions, _ = policy.predict(observation)
            inputs.append(np.concatenate([observation, np.eye(k + 1, dtype=np.float32)[actions]], 1))
            observation, _, _, _, infos = env.step(actions)
        found = infos.get("final_info", {}).get("reward/quality", 0) + infos.get("reward/quality", 0)
        targets += [found * tokens] * layers
    return np.concatenate(inputs), np.concatenate(targets)[:, None]


def _with(observation: np.ndarray, k: int, most: int) -> np.ndarray:
    numbers = np.zeros((len(observation), most + 1), dtype=np.float32)
    numbers[:, k] = 1
    return np.concatenate([observation, numbers], 1)


class TokenOracle(Watching):
    """For each token, the best of a `menu [M, L]` of numbers by layer, by its loss when all tokens of the passage run
    with them. Tokens affect each other through attention, so this is no exact bound.
    """

    kind = "bound"

    def __init__(self, menu: np.ndarray) -> None:
        self.menu = menu
        self.plans: dict[int, np.ndarray] = {}

    def numbers(self, observation: np.ndarray) -> np.ndarray:
        """Numbers of experts `[n]`."""
        env = self.env
        for passage in set(env.passage.tolist()) - self.plans.keys():
            self.plans[passage] = self.plan(passage)
        token, layer = env.places()
        plans = np.stack([self.plans[passage] for passage in env.passage.tolist()])
        return np.asarray(plans[np.arange(len(plans)), np.minimum(token, env.tokens - 1), layer])

    def plan(self, passage: int) -> np.ndarray:
        """Numbers `[T, L]` for a passage."""
        env, stepped, menu = self.env, self.env.stepped, self.menu
        ids = np.repeat(stepped.passages.ids[[passage]], len(menu), 0)
        k = torch.from_numpy(np.repeat(menu[:, None], ids.shape[1], 1))
        with torch_threads(1):
            losses = stepped.model.loss(ids, k=k).numpy() / env.tokens
        cost = env.reward.cost_weight * env.relative_costs()[np.arange(stepped.layers), menu].sum(1)
        if not env.budgeted:
            return np.asarray(menu[(losses + cost[:, None]).argmin(0)])
        low, high = 0.0, 10.0
        for _ in range(30):  # the price of an expert at which the budget is just kept
            price = (low + high) / 2
            best = menu[(losses + (cost + price * menu.sum(1) / env.tokens)[:, None]).argmin(0)]
            low, high = (price, high) if best.sum() > env.total else (low, price)
        return np.asarray(menu[(losses + (cost + high * menu.sum(1) / env.tokens)[:, None]).argmin(0)])


def bound(env_id: str, *, passages: int = PASSAGES, **env_kwargs: Any) -> TokenOracle:
    """An oracle that sees the losses of each token; its menu are the best static numbers at any cost weight."""
    dropped = ("split", "granularity", "observation", "cost_weight", "budget")
    every, loss, cost = statics(tuple(sorted((k, v) for k, v in env_kwargs.items() if k not in dropped)), passages)
    best = [int((loss + weight * cost).argmin()) for weight in np.geomspace(1e-3, 30, 400)]
    return TokenOracle(every[sorted(set(best))])
