"""What could better decisions gain in MoEExpertCache-v0, for the token at hand?

Each decision of a rule is also taken the other way, from the same state of the environment, and the token is read to
its end: this tells what loading an expert is worth, its price subtracted. Three decide what is loaded: thresholds;
networks that start from them and maximise this value, with the value of every choice known in training; and one that
knows it in the test, too. A learner that sees rewards alone can hardly find more than such a network. What an expert in
memory is worth for later tokens is not counted.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure
from torch import nn

from agents.baselines.expertcache import FINE, MinimumWeight
from agents.baselines.supervised import fit_perceptron
from benchmarks.results.statistics import seeds_interval
from benchmarks.runner.setup import Arguments
from cost.timing import torch_threads
from moe_envs.expertcache.env import SURE, MoEExpertCacheVectorEnv

RULE, SEEN, MORE, KNOWN = "thresholds", "network", "network, more inputs", "value known (bound)"
SEEDS = (0, 1, 2, 3, 4)
SETTINGS: dict[str, dict[str, Any]] = {
    f"capacity {capacity}, cost weight {weight:g}": {"capacity": capacity, "cost_weight": weight}
    for weight in (0.2, 0.8) for capacity in (6, 4, 8)
}  # fmt: skip
QUICK = {
    "seeds": [0, 1],
    "setups": {"short": {"tokens": 2, "passages": 2, "train": 2, "test": 1}},
}


class CacheHeadroomSetup(Arguments):
    """`train` streams of rl_train teach, `test` streams of validation stop the training, and as many of the test split
    judge; a stream is `passages` of `tokens` tokens."""

    capacity: int = 6
    cost_weight: float = 0.2
    tokens: int = 64
    passages: int = 2
    train: int = 48
    test: int = 22


Setup = CacheHeadroomSetup


class Choices(NamedTuple):
    """Of m requests: observations `[m, size]`, what else is known `[m, more]`, weights of the experts `[m, K]`, their
    layers `[m]`, and what loading each is worth in nats, its price subtracted, `[m, K]`; 0 if it is not missing."""

    seen: np.ndarray
    more: np.ndarray
    weights: np.ndarray
    layer: np.ndarray
    worth: np.ndarray


class MinusValue(nn.Module):
    """Minus the mean value of loading each expert with the probability that logits tell: the first half of the
    network's answers and those of thresholds, added; `given` has what loading is worth, and the latter."""

    def forward(self, answers: torch.Tensor, given: torch.Tensor) -> torch.Tensor:
        worth, start = given.chunk(2, dim=1)
        return -(torch.sigmoid(start + answers[:, : start.shape[1]]) * worth).sum(1).mean()


def measure(setup: CacheHeadroomSetup, seed: int, split: str, folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Value in nats a token of what each decision maker loads, over loading nothing."""
    random = np.random.default_rng(seed)
    train, stop, test = (
        choices(setup, part, count, random)
        for part, count in (("rl_train", setup.train), ("validation", setup.test), ("test", setup.test))
    )
    least, scale = thresholds(train), float(np.abs(train.worth).mean())
    starts = [SURE * (part.weights**2 - least[part.layer][:, None] ** 2) for part in (train, stop, test)]
    loads = {RULE: starts[2] >= 0, KNOWN: test.worth > 0}
    for name, inputs in ((SEEN, lambda part: part.seen), (MORE, lambda part: np.hstack([part.seen, part.more]))):
        given = [
            (inputs(part), np.hstack([part.worth / scale, start]))
            for part, start in zip((train, stop), starts, strict=False)
        ]
        with torch_threads(1):
            network = fit_perceptron(given[0], given[1], MinusValue())
            with torch.no_grad():
                changes = network(torch.from_numpy(inputs(test).astype(np.float32))).numpy()
        loads[name] = starts[2] + changes[:, : test.worth.shape[1]] > 0
    requests = setup.test * setup.tokens * setup.passages
    return {"values": {name: float((each * test.worth).sum() / requests) for name, each in loads.items()}}, {}


def score(frame: pd.DataFrame) -> dict[str, Any]:
    """Gains over thresholds."""
    rows: list[dict[str, Any]] = []
    for setup, group in frame.groupby("setup", sort=False):
        values = {name: np.array([each[name] for each in group["values"]]) for name in (RULE, SEEN, MORE, KNOWN)}
        row: dict[str, Any] = {"setting": setup, RULE: float(values[RULE].mean())}
        for name in (SEEN, MORE, KNOWN):
            gain = values[name] - values[RULE]
            row |= {f"{name}: gain": float(gain.mean()), f"{name}: gain, 95 %": seeds_interval(gain)}
        rows.append(row)
    return {"tables": {"Value in nats a token": rows}, "notes": [
        "thresholds: value over loading nothing, with the best threshold for each layer. gain: over thresholds. "
        f"{SEEN}: sees the observation, and was trained with the value of every choice; {MORE}: sees the router's "
        "logits and the experts' numbers, too. Everything is trained on rl_train and judged on test streams. Only the "
        "token at hand counts.",
    ]}  # fmt: skip


def plot(frame: pd.DataFrame, result: dict[str, Any], out: Path) -> list[str]:
    """Plot the gains with intervals."""
    rows = result["tables"]["Value in nats a token"]
    figure = Figure((8, 0.6 * len(rows) + 1.5), layout="constrained")
    axis = figure.subplots()
    for number, name in enumerate((SEEN, MORE, KNOWN)):
        for place, row in enumerate(rows):
            gain = row[f"{name}: gain"]
            low, high = row[f"{name}: gain, 95 %"] or (gain, gain)
            axis.errorbar(gain, place + 0.2 * (number - 1), xerr=[[gain - low], [high - gain]], fmt="o",
                          color=f"C{number}", label=None if place else name)  # fmt: skip
    axis.axvline(0, color="grey", lw=0.8)
    axis.set_yticks(range(len(rows)), [row["setting"] for row in rows])
    axis.set_xlabel("gain over thresholds, nats a token")
    axis.legend(loc="upper left", bbox_to_anchor=(1, 1))
    figure.savefig(out / "headroom.png", dpi=120)
    return ["headroom.png"]


def choices(setup: CacheHeadroomSetup, split: str, count: int, random: np.random.Generator) -> Choices:
    """What each choice of a rule on some streams is worth. Row 0 of a stream follows the rule, row i does the opposite
    with expert i; all go on from the state of row 0."""
    kwargs = setup.model_dump(include={"capacity", "cost_weight", "tokens", "passages"})
    one = MoEExpertCacheVectorEnv(1, split=split, **kwargs)
    drawn, k = random.permutation(len(one.stepped.streams))[:count], one.k
    if len(drawn) < count:
        raise ValueError(f"{count} streams: split {split!r} has {len(drawn)} only")
    env = MoEExpertCacheVectorEnv(count * (k + 1), split=split, autoreset_mode="Disabled", **kwargs)
    rule = MinimumWeight(env.advised())
    rule.watch(env)
    observation, _ = env.reset(seed=0, options={"stream": drawn.repeat(k + 1)})
    opposite = np.tile(np.vstack([np.zeros(k, dtype=np.bool_), np.eye(k, dtype=np.bool_)]), (count, 1))
    parts, found = env.observation_layout, []
    for layer in [*range(env.layers)] * env.tokens:
        before, seen, bits = env.state(), observation[:: k + 1], rule.bits(observation, slice(None))
        logits, wanted = env.logits()[:: k + 1], env.wanted()[:: k + 1]
        observation, total, *_ = env.step((bits ^ opposite).astype(np.int8))
        for _ in range(layer + 1, env.layers):
            observation, reward, *_ = env.step(rule.bits(observation, slice(None)).astype(np.int8))
            total += reward
        nats = env.tokens * total.reshape(count, k + 1)
        worth = (nats[:, 1:] - nats[:, :1]) * np.where(bits[:: k + 1], -1, 1)
        worth[seen[:, parts["missing"].slice] == 0] = 0
        numbers = np.eye(env.experts)[wanted].reshape(count, -1)
        weights = seen[:, parts["weights"].slice]
        found.append(Choices(seen, np.hstack([logits, numbers]), weights, np.full(count, layer), worth))
        observation = env.restore(before)
        observation, *_ = env.step(bits.astype(np.int8))
    return Choices(*(np.concatenate(each) for each in zip(*found, strict=True)))


def thresholds(choices: Choices) -> np.ndarray:
    """For each layer the weight of the most value from which experts are loaded."""
    found = []
    for layer in range(choices.layer.max() + 1):
        here = choices.layer == layer
        values = [((choices.weights[here] >= least) * choices.worth[here]).sum() for least in FINE]
        found.append(FINE[int(np.argmax(values))])
    return np.array(found)
