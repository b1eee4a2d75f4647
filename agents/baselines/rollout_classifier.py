"""Rollout classification for MoEExpertCache-v0: networks learn what is loaded from what each choice was worth.

In the states that a rule meets on `rl_train`, each of its decisions is also taken the other way, from the same state of
the environment, and the token is read to its end (Lagoudakis & Parr 2003, "Reinforcement learning as classification",
with the difference of the returns in place of labels, as in AggreVaTe, Ross & Bagnell 2014, arXiv 1406.5979). What was
learned meets other states than the rule did: it decides in the next round, whose choices are added to those before.
What a loaded expert is worth for later tokens is taken to be its gain in demand times `LATER`, in prices of a load;
nothing if it gains none, as with eviction by predicted demand it leaves at once.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

from agents import checkpoints
from agents.baselines.expertcache import FINE, LoadRule, MinimumWeight
from agents.baselines.supervised import fit_perceptron, perceptron
from agents.checkpoints import CheckpointError
from agents.evaluate import make_rows
from agents.resumable import LARGEST
from cost.arguments import choose
from cost.machine import provenance
from cost.timing import torch_threads
from experts.offload.demand import EVICTIONS
from moe_envs.expertcache.env import FALLBACKS, SURE, MoEExpertCacheVectorEnv

KIND = "rollout classifier"
LATER = 2.0  # of 1, 2, 4 and 6 the best on validation, with capacity 6, both cost weights of the board, and one round
MOST = 64  # networks
TOGETHER = 24  # streams side by side; more need more memory, and are no faster


@dataclass(frozen=True, kw_only=True)
class RolloutSettings:
    """In each of `rounds`, `streams` of `rl_train` are read; a sixth, without passages of the others and the same in
    all rounds, tells when to stop. `networks` decide together."""

    streams: int = 64
    rounds: int = 2
    networks: int = 3

    def __post_init__(self) -> None:
        if self.streams < 2 or self.rounds < 1 or not 1 <= self.networks <= MOST:
            raise ValueError(
                f"streams={self.streams}, rounds={self.rounds}, networks={self.networks}: at least 2, at least 1, and "
                f"from 1 to {MOST}"
            )


class LoadChoices(NamedTuple):
    """Of m requests: observations `[m, size]`, router logits `[m, E]`, experts asked for and their weights `[m, K]`,
    layers `[m]`, and what loading each is worth in nats, its price subtracted, `[m, K]`; 0 if it is not missing."""

    seen: np.ndarray
    logits: np.ndarray
    wanted: np.ndarray
    weights: np.ndarray
    layer: np.ndarray
    worth: np.ndarray


class MinusWorth(nn.Module):
    """Minus the mean worth of loading each expert with a probability, whose logit is the network's plus that of
    thresholds; `given` has the worths and the latter, `[n, 2 * K]`."""

    def forward(self, answers: torch.Tensor, given: torch.Tensor) -> torch.Tensor:
        worth, start = given.chunk(2, dim=1)
        return -(torch.sigmoid(start + answers) * worth).sum(1).mean()


class RolloutClassifier(LoadRule):
    """Loads what networks, which add to the logits of thresholds for each layer, hold to be worth it."""

    kind = "learner"
    sees_hidden = True

    def __init__(
        self, thresholds: np.ndarray, networks: Sequence[nn.Module], made: dict[str, Any] | None = None,
        **env_kwargs: str,
    ) -> None:  # fmt: skip
        super().__init__(**env_kwargs)
        self.thresholds, self.networks, self.made = thresholds, list(networks), made or {}

    def watch(self, env: MoEExpertCacheVectorEnv) -> None:
        """Attach to a vector environment; raises `ValueError` for one of another problem."""
        size = max(part.slice.stop for part in env.observation_layout.values())
        needed: Any = self.networks[0]
        mine, its = (needed[0].in_features, needed[-1].out_features, len(self.thresholds)), (size, env.k, env.layers)
        if mine != its:
            raise ValueError(
                "the classifier is for {} observed numbers, {} experts of a token and {} layers, ".format(*mine)
                + "not {}, {} and {}".format(*its)
            )
        self.env = env

    def save(self, folder: Path) -> None:
        """Write it to a folder, which is replaced atomically, with how it was `made`."""
        networks = [{name: value.numpy() for name, value in each.state_dict().items()} for each in self.networks]
        content = {"kind": KIND, "thresholds": self.thresholds, "networks": networks}
        checkpoints.save(folder, {**content, "env_kwargs": self.env_kwargs, "made": json.dumps(self.made, default=str)})

    @classmethod
    def load(cls, folder: Path) -> RolloutClassifier:
        """What `save` wrote; raises `CheckpointError` for anything else."""
        content = checkpoints.load(folder)
        try:
            if content.get("kind") != KIND:
                raise ValueError("it holds a checkpoint of another kind; of a run, name its folder")
            thresholds, env_kwargs = content["thresholds"], content["env_kwargs"]
            _require(thresholds.dtype == np.float64 and thresholds.ndim == 1)
            _require(((thresholds >= 0) & (thresholds <= max(FINE))).all())
            _require(set(env_kwargs) == {"eviction", "fallback"})
            choose("eviction", env_kwargs["eviction"], EVICTIONS)
            choose("fallback", env_kwargs["fallback"], FALLBACKS)
            _require(1 <= len(content["networks"]) <= MOST)
            networks = [_network(each) for each in content["networks"]]
            _require(len({str(each) for each in networks}) == 1)
            made = json.loads(content["made"])
            _require(isinstance(made, dict))
            return cls(thresholds, networks, made, **env_kwargs)
        except (KeyError, TypeError, ValueError, AttributeError, IndexError, RecursionError) as error:
            raise CheckpointError(f"{folder} is no rollout classifier: {error}") from error

    def bits(self, observation: np.ndarray, rows: slice) -> np.ndarray:
        weights, layer = (observation[:, self.env.observation_layout[name].slice] for name in ("weights", "layer"))
        return self.logits_of(observation, weights, layer.argmax(1)) > 0

    def logits_of(self, inputs: np.ndarray, weights: np.ndarray, layer: np.ndarray) -> np.ndarray:
        """Logits of loading `[m, K]`, from what the networks see, weights `[m, K]` and layers `[m]`."""
        seen = torch.from_numpy(inputs)
        with torch_threads(1), torch.no_grad():
            added = torch.stack([network(seen) for network in self.networks]).mean(0).numpy()
        return _start(self.thresholds, weights, layer) + added


def choices(env_kwargs: dict[str, Any], rule: LoadRule, streams: np.ndarray) -> LoadChoices:
    """What each choice of a rule on these streams of the split is worth."""
    return _joined([_choices(env_kwargs, rule, part) for part in np.array_split(streams, -(-len(streams) // TOGETHER))])


def best_thresholds(found: LoadChoices) -> np.ndarray:
    """For each layer the weight from which on loading is worth most, `[L]`."""
    best = []
    for layer in range(found.layer.max() + 1):
        here = found.layer == layer
        worths = [((found.weights[here] >= least) * found.worth[here]).sum() for least in FINE]
        best.append(FINE[int(np.argmax(worths))])
    return np.array(best)


def fitted(
    train: LoadChoices, stop: LoadChoices, inputs: Callable[[LoadChoices], np.ndarray], networks: int, seed: int
) -> tuple[np.ndarray, list[nn.Module]]:
    """Thresholds for each layer, and networks on `inputs(choices)` that add to them."""
    least, scale = best_thresholds(train), float(np.abs(train.worth).mean()) or 1.0
    both = [(inputs(part), np.hstack([part.worth / scale, _start(least, part.weights, part.layer)]))
            for part in (train, stop)]  # fmt: skip
    outputs = train.worth.shape[1]
    with torch_threads(1):
        found = [
            fit_perceptron(both[0], both[1], MinusWorth(), outputs=outputs, seed=seed * networks + each)
            for each in range(networks)
        ]
    return least, found


def trained(env_id: str, seed: int, settings: RolloutSettings | None = None, **env_kwargs: Any) -> RolloutClassifier:
    """A classifier for MoEExpertCache-v0 with these arguments, on whole episodes. Raises `ValueError` for recorded
    routing, and an eviction that is learned or sees the future."""
    own, kwargs = settings or RolloutSettings(), {**env_kwargs, "split": "rl_train"}
    kwargs.pop("max_episode_steps", None)
    if kwargs.get("source", "model") != "model":
        raise ValueError("choices are taken both ways with a model, not on recorded routing")
    choose("eviction", eviction := kwargs.get("eviction", "predicted"), EVICTIONS)
    env: Any = make_rows(env_id, 1, **kwargs).unwrapped
    of_streams = env.stepped.streams
    drawn, count = np.random.default_rng(seed).permutation(len(of_streams)), max(1, own.streams // 6)
    stop, others = drawn[:count], drawn[count:]
    apart = others[~np.isin(of_streams[others], of_streams[stop]).any(1)]
    if len(apart) < own.rounds * (size := own.streams - count):
        raise ValueError(
            f"rounds={own.rounds}, streams={own.streams}: {len(apart)} streams share no passage with the {count} that "
            "stop the training; fewer streams, or shorter ones (passages), are needed"
        )
    gain = env.observation_layout["gain"].slice
    price = 0 if eviction == "static" else LATER * env.price()
    chosen = {name: env_kwargs[name] for name in ("eviction", "fallback") if name in env_kwargs}
    made = {"env": env_id, "env_kwargs": env_kwargs, "seed": seed, "settings": asdict(own), **provenance()}
    train, until = list[LoadChoices](), list[LoadChoices]()
    rule: Any = MinimumWeight(env.advised())
    for place in range(own.rounds):
        for part, streams in ((train, apart[place * size : (place + 1) * size]), (until, stop)):
            found = choices(kwargs, rule, streams)
            part.append(found._replace(worth=found.worth + price * found.seen[:, gain].clip(0)))
        learned = fitted(_joined(train), _joined(until), lambda part: part.seen, own.networks, seed)
        rule = RolloutClassifier(*learned, made, **chosen)
    classifier: RolloutClassifier = rule
    return classifier


def _network(arrays: dict[str, np.ndarray]) -> nn.Sequential:
    """A network with these weights; raises `ValueError` for what are none."""
    width, inputs = arrays["0.weight"].shape
    outputs = len(arrays["4.weight"])
    shapes = [(width, inputs), (width,), (width, width), (width,), (outputs, width), (outputs,)]
    names = [f"{place}.{part}" for place in (0, 2, 4) for part in ("weight", "bias")]
    _require({name: each.shape for name, each in arrays.items()} == dict(zip(names, shapes, strict=True)))
    _require(all(each.dtype == np.float32 and (np.abs(each) < LARGEST).all() for each in arrays.values()))
    found = perceptron(inputs, width, outputs)
    found.load_state_dict({name: torch.from_numpy(each.copy()) for name, each in arrays.items()})
    return found


def _require(fine: bool) -> None:
    """Raise `ValueError` unless it is so."""
    if not fine:
        raise ValueError("its content does not fit together")


def _start(thresholds: np.ndarray, weights: np.ndarray, layer: np.ndarray) -> np.ndarray:
    """Logits of loading `[m, K]` by thresholds."""
    return np.asarray(SURE * (weights**2 - thresholds[layer][:, None] ** 2))


def _joined(parts: Sequence[LoadChoices]) -> LoadChoices:
    return LoadChoices(*(np.concatenate(each) for each in zip(*parts, strict=True)))


def _choices(env_kwargs: dict[str, Any], rule: LoadRule, streams: np.ndarray) -> LoadChoices:
    """Row 0 of a stream follows the rule, row i does the opposite with expert i; all go on from the state of row 0."""
    count, k = len(streams), MoEExpertCacheVectorEnv(1, **env_kwargs).k
    env = MoEExpertCacheVectorEnv(count * (k + 1), autoreset_mode="Disabled", **env_kwargs)
    rule.watch(env)
    observation, _ = env.reset(seed=0, options={"stream": streams.repeat(k + 1)})
    opposite = np.tile(np.vstack([np.zeros(k, dtype=np.bool_), np.eye(k, dtype=np.bool_)]), (count, 1))
    weights, missing = (env.observation_layout[name].slice for name in ("weights", "missing"))
    found, whole = [], env.STATE
    light = tuple(name for name in whole if name not in ("_keys", "_values"))
    for token, layer in product(range(env.tokens), range(env.layers)):
        # What a token's rest writes into the cache is written again, unless the next passage begins.
        env.STATE = whole if (token + 1) % env.stepped.size == 0 else light  # type: ignore[misc]
        before, seen, bits = env.state(), observation[:: k + 1], rule.bits(observation, slice(None))
        logits, wanted = env.logits()[:: k + 1], env.wanted()[:: k + 1]
        observation, total, *_ = env.step((bits ^ opposite).astype(np.int8))
        for _ in range(layer + 1, env.layers):
            observation, reward, *_ = env.step(rule.bits(observation, slice(None)).astype(np.int8))
            total += reward
        nats = env.tokens * total.reshape(count, k + 1)
        worth = (nats[:, 1:] - nats[:, :1]) * np.where(bits[:: k + 1], -1, 1) * (seen[:, missing] > 0)
        found.append(LoadChoices(seen, logits, wanted, seen[:, weights], np.full(count, layer), worth))
        env.restore(before)
        observation, *_ = env.step(bits.astype(np.int8))
    return _joined(found)
