"""Baselines for MoELayerTopK-v0: numbers of experts by rules on the router's probabilities, and an oracle.

Rules are tuned on validation for the cost weight or the budget, in whole passages at once, which is faster than steps.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import product
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch

from agents.baselines.supervised import values
from agents.evaluate import make_rows, play
from cost.timing import torch_threads
from moe_envs.layertopk.env import MoELayerTopKVectorEnv
from moe_envs.layertopk.model import PricedModel

ID = "moe_envs:MoELayerTopK-v0"
Count = Callable[["Routed"], np.ndarray]  # numbers of experts [n], by the router
OF_RULES = ("split", "granularity", "observation", "max_episode_steps")  # which they have themselves, or none
PASSAGES = 12  # of a domain on which rules are tuned
SHORTLIST = 24  # static numbers that are judged on all of these passages
MENU = 1024  # static numbers that are all tried; of more, those on a greedy way are
RESERVES = (0.0, 0.5, 0.75, 1.0)  # experts kept for each later decision, under a budget
# Prices of an expert that are tried under a budget, in nats of its token
PRICES = (0.0, 0.003, 0.006, 0.01, 0.015, 0.02, 0.03, 0.04, 0.06, 0.08, 0.16, 0.32)
GRIDS: dict[str, tuple[float, ...]] = {
    "top-p": (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.01),
    "minimum probability": (0.0, 0.02, 0.04, 0.06, 0.08, 0.1, 0.13, 0.17, 0.22, 0.3, 0.4, 1.01),
    "minimum weight": (0.0, 0.08, 0.12, 0.16, 0.2, 0.24, 0.28, 0.34, 0.45, 0.6, 1.01),
    "ratio (NAEE)": (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.01),
    "worth": (0.005, 0.01, 0.02, 0.03, 0.04, 0.06, 0.08, 0.12, 0.16, 0.24, 0.36, 0.6, 1.0),
    "entropy": (0.25, 0.4, 0.55, 0.7, 0.85, 1.0, 1.2, 1.5, 2.0, 4.0, np.inf),
}


@dataclass(frozen=True)
class Routed:
    """What a rule sees of n tokens in their layers: log probabilities of the best K experts `[n, K]`, entropy in nats
    `[n]`, layer `[n]`."""

    best: np.ndarray
    entropy: np.ndarray
    layer: np.ndarray

    @property
    def k(self) -> int:
        """The most experts of a token."""
        return self.best.shape[1]

    @property
    def odds(self) -> np.ndarray:
        """Probabilities of the best experts `[n, K]`."""
        return np.asarray(np.exp(self.best))


def counted(kind: str, thresholds: Sequence[float], experts: int, prices: np.ndarray) -> Count:
    """A rule of `GRIDS` with a threshold for each layer; `prices [L, K + 1]` are what numbers of experts cost a token,
    in nats.

    "top-p" takes the fewest experts whose probabilities sum to p; "minimum probability" and "minimum weight" those of
    at least so much, of all experts or of the best K; "ratio (NAEE)" those of at least a share of the best (Lu et al.
    2024); "worth" takes the number with the least price plus loss, which is taken to be the threshold, in nats, times
    the square of the weight left out; "entropy" takes a number that rises with the entropy, K at a share of its
    maximum.
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
        elif kind == "worth":
            found = worth(seen, limit, prices[seen.layer])
        else:
            share = seen.entropy / (limit[:, 0] * np.log(experts))
            found = np.ceil(share * seen.k).clip(0, seen.k)
        return np.asarray(found, dtype=np.int64)

    return count


def worth(seen: Routed, steep: np.ndarray, prices: np.ndarray) -> np.ndarray:
    """Numbers `[n]` with the least price, of `prices [n, K + 1]`, plus `steep [n, 1]` times the square of the weight
    left out."""
    weights = seen.odds / seen.odds.sum(1, keepdims=True)
    left_out = 1 - np.concatenate([np.zeros((len(weights), 1)), weights.cumsum(1)], axis=1)
    return np.asarray((steep * left_out.clip(0) ** 2 + prices).argmin(1))


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
        return self.count(observed(self.env, observation))


class Paced(Watching):
    """The rule "worth" under a budget: an expert costs `price` nats more if as much of the budget is left as was
    planned, more the less is left."""

    price = 0.0

    def __init__(self, thresholds: Sequence[float], prices: np.ndarray, budget: float) -> None:
        self.by_layer, self.prices, self.budget = np.array(thresholds), prices, budget

    def numbers(self, observation: np.ndarray) -> np.ndarray:
        """Numbers of experts `[n]`, before the budget."""
        env, seen = self.env, observed(self.env, observation)
        left = env.left_experts() / np.maximum(env.left_decisions(), 1) / self.budget
        scarce = self.price * (2 - left).clip(0)[:, None] * np.arange(env.k + 1)
        return worth(seen, self.by_layer[seen.layer][:, None], self.prices[seen.layer] + scarce)


def observed(env: MoELayerTopKVectorEnv, observation: np.ndarray) -> Routed:
    """What a rule sees, from the observations `[n, ...]` of an environment."""
    part = {name: observation[:, each.slice] for name, each in env.observation_layout.items()}
    return Routed(part["router"], part["entropy"][:, 0], part["layer"].argmax(1))


class Drawn(TopKRule):
    """Numbers drawn at random."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__(lambda seen: self.random.integers(seen.k + 1, size=len(seen.layer)))
        self.random = np.random.default_rng(seed)


class Predicted(Watching):
    """The number with the best predicted quality less cost: a perceptron predicts the change of the token's loss from
    the observation, less its `budget`, and a number of experts; it is trained on random numbers in `rl_train`.

    `price` is what an expert costs beside its time, in nats of its token, where a budget makes experts scarce.
    """

    env_kwargs = {"granularity": "layer", "observation": "passage"}
    price = 0.0

    def __init__(self, predictor: Callable[[np.ndarray], np.ndarray], prices: np.ndarray) -> None:
        self.predictor, self.prices = predictor, prices

    def numbers(self, observation: np.ndarray) -> np.ndarray:
        """Numbers of experts `[n]`, before the budget."""
        layout, most = self.env.observation_layout, self.env.k
        layer = observation[:, layout["layer"].slice].argmax(1)
        known = observation[:, : layout["budget"].slice.start] if "budget" in layout else observation
        worth = np.stack([self.predictor(_with(known, k, most))[:, 0] for k in range(most + 1)], 1)
        return np.asarray((worth - self.prices[layer] - self.price * np.arange(most + 1)).argmax(1))


class Tuning:
    """Passages of the validation split, run whole: what a rule costs and loses there, `passages` of each domain."""

    def __init__(self, env_kwargs: dict[str, Any], passages: int = PASSAGES) -> None:
        env: Any = make_rows(ID, 1, **{**env_kwargs, "split": "validation", "granularity": "layer"}).unwrapped
        self.stepped: PricedModel = env.stepped
        self.weight, self.budget = env.reward.cost_weight, env_kwargs.get("budget")
        self.by_divergence = env.by_divergence
        self.relative = env.relative_costs()
        self.prices = env.prices()
        self.unlimited = self.prices - env.scarcity() * np.arange(env.k + 1)  # as if there were no budget
        self.passages, self.ids = passages, self.stepped.passages.ids[_some(self.stepped, passages)]

    def loss(self, count: Count, part: slice = slice(None)) -> tuple[float, float, float]:
        """Mean loss in nats, or divergence from all experts, relative cost of a passage and mean number of experts
        under a rule."""
        ids, cost, experts, stepped = self.ids[part], 0.0, 0, self.stepped

        def decide(layer: int, inputs_ND: torch.Tensor, logits_NE: torch.Tensor) -> torch.Tensor:
            nonlocal cost, experts
            k = count(routed(logits_NE, layer, stepped.k)).clip(0, stepped.k)
            cost, experts = cost + float(self.relative[layer, k].sum()), experts + int(k.sum())
            return torch.from_numpy(k)

        with torch_threads(1):
            lost = (
                stepped.model.divergence(ids[:, :-1], decide) if self.by_divergence else stepped.model.loss(ids, decide)
            )
        return float(lost.mean()), cost / len(ids), experts / (ids[:, 1:].size * stepped.layers)

    def score(self, count: Count, part: slice = slice(None)) -> float:
        """Return of a rule, less a constant; -inf if it takes more than the budget."""
        loss, cost, experts = self.loss(count, part)
        if self.budget is not None and experts > self.budget:
            return -np.inf
        return -loss - self.weight * cost

    def costs(self, numbers_ML: np.ndarray) -> np.ndarray:
        """Relative costs `[M]` of a passage with numbers of experts by layer `[M, L]`."""
        each = self.relative[np.arange(self.stepped.layers), numbers_ML]
        return np.asarray(each.sum(1) * self.stepped.size)

    def best_static(self, report: Callable[[float], object]) -> tuple[int, ...]:
        """Numbers of experts by layer: all of `statics` are tried on some passages, the best of them on all."""
        numbers, loss = statics(self, report)
        scores = -loss - self.weight * self.costs(numbers)
        if self.budget is not None:
            scores[numbers.sum(1) > self.budget * self.stepped.layers] = -np.inf
        short = [tuple(each) for each in numbers[np.argsort(scores)[-SHORTLIST:]].tolist()]
        return max(short, key=lambda each: self.score(static(each)))

    def counted(self, kind: str, thresholds: Sequence[float]) -> Count:
        """A rule of `GRIDS` for these thresholds."""
        return counted(kind, thresholds, self.stepped.experts, self.prices)

    def best_thresholds(self, kind: str) -> tuple[list[float], list[float]]:
        """The best single threshold, and the best one for each layer, found one layer after the other."""
        layers, grid = self.stepped.layers, GRIDS[kind]

        @cache
        def score(thresholds: tuple[float, ...]) -> float:
            return self.score(self.counted(kind, thresholds))

        alike = max(((each,) * layers for each in grid), key=score)
        best: tuple[float, ...] = alike
        before: tuple[float, ...] = ()
        while before != best:  # until no step of one layer is better
            before = best
            for layer, step in product(range(layers), (-2, -1, 1, 2)):
                place = grid.index(best[layer]) + step
                if 0 <= place < len(grid):
                    best = max(best, (*best[:layer], grid[place], *best[layer + 1 :]), key=score)
        return list(alike), list(best)


class Judge:
    """The same passages of the validation split in the environment, on which policies are played."""

    def __init__(self, env_kwargs: dict[str, Any], passages: int = PASSAGES) -> None:
        own = {key: value for key, value in env_kwargs.items() if key not in OF_RULES}
        kwargs = {**own, "split": "validation", "granularity": "layer"}
        one: Any = make_rows(ID, 1, **kwargs).unwrapped
        self.options, self.budget = {"passage": _some(one.stepped, passages)}, env_kwargs.get("budget")
        self.env = make_rows(ID, len(self.options["passage"]), **kwargs)

    def score(self, policy: Watching) -> float:
        """Mean return."""
        return float(play(policy, self.env, self.env.num_envs, 0, self.options)["return"].mean())

    def set_best(self, policy: Watching, name: str, values: Sequence[float]) -> float:
        """Set an attribute to the value with the best mean return, which is returned."""
        scores = dict[float, float]()
        for value in values:
            setattr(policy, name, value)
            scores[value] = self.score(policy)
        best = max(scores, key=scores.__getitem__)
        setattr(policy, name, best)
        return scores[best]

    def reserved(self, policy: Watching) -> float:
        """Mean return with the best reserve, which is set; without a budget there is none."""
        if self.budget is None:
            return self.score(policy)
        return self.set_best(policy, "reserve", [each for each in RESERVES if each <= self.budget])


def _some(stepped: PricedModel, passages: int) -> np.ndarray:
    """Numbers of so many passages of each domain."""
    domain = stepped.passages.domain
    return np.concatenate([np.flatnonzero(domain == each)[:passages] for each in np.unique(domain)])


_statics: WeakKeyDictionary[PricedModel, dict[tuple[bool, int], tuple[np.ndarray, np.ndarray]]] = WeakKeyDictionary()


def statics(tuning: Tuning, report: Callable[[float], object]) -> tuple[np.ndarray, np.ndarray]:
    """Numbers of experts by layer `[M, L]` with their loss `[M]` on some of the passages, whatever the cost weight or
    the budget; measured once for a model and the passages.

    If there are more than `MENU`, those on the way from K everywhere to 0, on which each step takes an expert where it
    loses least for the cost that it saves.
    """
    stepped, key = tuning.stepped, (tuning.by_divergence, tuning.passages)
    kept = _statics.setdefault(stepped, {})
    if key in kept:
        return kept[key]
    layers, few = stepped.layers, slice(None, None, max(1, tuning.passages // 2))
    losses: dict[tuple[int, ...], float] = {}

    def lost(numbers: tuple[int, ...]) -> float:
        if numbers not in losses:
            losses[numbers] = tuning.loss(static(numbers), few)[0]
        return losses[numbers]

    if (stepped.k + 1) ** layers <= MENU:
        every = list(product(range(stepped.k + 1), repeat=layers))
        for place, numbers in enumerate(every):
            lost(numbers)
            report((place + 1) / len(every))
    else:
        now = (stepped.k,) * layers
        lost(now)
        while any(now):
            fewer = [(*now[:layer], k - 1, *now[layer + 1 :]) for layer, k in enumerate(now) if k]
            saved = tuning.costs(np.array([now])) - tuning.costs(np.array(fewer))
            rises = np.array([lost(each) for each in fewer]) - losses[now]
            now = fewer[int((rises / saved.clip(1e-12)).argmin())]
            report(1 - sum(now) / (stepped.k * layers))
    kept[key] = np.array(list(losses)), np.array(list(losses.values()))
    return kept[key]


def routed(logits_NE: torch.Tensor, layer: int, k: int) -> Routed:
    """What a rule sees, from a layer's router logits."""
    logs = logits_NE.log_softmax(-1)
    best = logs.topk(k, dim=-1).values
    entropy = -(logs.exp() * logs).sum(-1)
    return Routed(best.cpu().numpy(), entropy.cpu().numpy(), np.full(len(logs), layer))


def baselines(
    env_id: str, *, report: Callable[[float], object] = lambda share: None, passages: int = PASSAGES,
    **env_kwargs: Any,
) -> dict[str, Any]:  # fmt: skip
    """Fixed and static numbers, rules with one threshold and with one for each layer, adaptive-k's rule, a supervised
    predictor, and random numbers; tuned on so many `passages` of each domain."""
    kwargs = {key: value for key, value in env_kwargs.items() if key not in OF_RULES}
    tuning = Tuning(kwargs, passages)
    layers, k = tuning.stepped.layers, tuning.stepped.k
    found: dict[str, Count] = {f"k = {each}": static([each] * layers) for each in range(k + 1)}
    found["static per layer"] = static(tuning.best_static(lambda share: report(0.5 * share)))
    thresholds: dict[str, list[float]] = {}
    for number, kind in enumerate(GRIDS):
        alike, best = tuning.best_thresholds(kind)
        thresholds[kind] = best
        found |= {kind: tuning.counted(kind, alike), f"{kind} per layer": tuning.counted(kind, best)}
        report(0.5 + 0.3 * (number + 1) / len(GRIDS))
    found["adaptive-k"] = adaptive_k
    rules: dict[str, Any] = {name: TopKRule(count) for name, count in found.items()}
    rules["predicted change of the loss"] = predictor = predicted(kwargs, 42 * passages)
    report(0.9)
    if tuning.budget is not None:
        judge = Judge(kwargs, passages)
        rules["worth per layer, paced"] = paced = Paced(thresholds["worth"], tuning.unlimited, tuning.budget)
        for each in (predictor, paced):
            judge.set_best(each, "price", PRICES)
        for rule in rules.values():
            judge.reserved(rule)
    rules["random"] = Drawn()
    report(1.0)
    return rules


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
        self.plans: dict[int, np.ndarray] = {}  # of the watched environment's passages

    def watch(self, env: MoELayerTopKVectorEnv) -> None:
        """Attach to a vector environment."""
        super().watch(env)
        self.plans = {}

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
            model, divergence = stepped.model, env.by_divergence
            lost = model.divergence(ids[:, :-1], k[:, :-1]) if divergence else model.loss(ids, k)
        losses = lost.numpy() / env.tokens
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
    tuning = Tuning({key: value for key, value in env_kwargs.items() if key not in OF_RULES}, passages)
    numbers, loss = statics(tuning, lambda share: None)
    cost = tuning.costs(numbers)
    best = [int((loss + weight * cost).argmin()) for weight in np.geomspace(1e-3, 30, 400)]
    return TokenOracle(numbers[sorted(set(best))])
