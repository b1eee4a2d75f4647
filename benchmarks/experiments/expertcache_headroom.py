"""What could better decisions gain in MoEExpertCache-v0, for the token at hand?

Each decision of a rule is also taken the other way, from the same state of the environment, and the token is read to
its end: this tells what loading an expert is worth, its price subtracted, while all others are as the rule has them.
Three decide what is loaded: thresholds; networks that start from them and maximise the sum of worths, with the worth of
every choice known in training; and one that knows it in the test, too. What an expert in memory is worth for later
tokens is not counted.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from agents.baselines.expertcache import MinimumWeight
from agents.baselines.rollout_classifier import LoadChoices, RolloutClassifier, best_thresholds, choices, fitted
from benchmarks.results.statistics import seeds_interval
from benchmarks.runner.setup import Arguments
from moe_envs.expertcache import MoEExpertCacheVectorEnv

RULE, SEEN, MORE, KNOWN = "thresholds", "network", "network, more inputs", "each worth known"
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


def measure(setup: CacheHeadroomSetup, seed: int, split: str, folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Sum of the worths of what each decision maker loads, in nats a token."""
    kwargs = setup.model_dump(include={"capacity", "cost_weight", "tokens", "passages"})
    random, parts = np.random.default_rng(seed), []
    for part, count in (("rl_train", setup.train), ("validation", setup.test), ("test", setup.test)):
        env = MoEExpertCacheVectorEnv(1, split=part, **kwargs)
        drawn = random.permutation(len(env.stepped.streams))[:count]
        if len(drawn) < count:
            raise ValueError(f"{count} streams: split {part!r} has {len(drawn)} only")
        parts.append(choices({**kwargs, "split": part}, MinimumWeight(env.advised()), drawn))
    train, stop, test = parts
    loads = {RULE: test.weights >= best_thresholds(train)[test.layer][:, None], KNOWN: test.worth > 0}
    for name, inputs in ((SEEN, _seen), (MORE, _more)):
        rule = RolloutClassifier(*fitted(train, stop, inputs, 1, seed))
        loads[name] = rule.logits_of(inputs(test), test.weights, test.layer) > 0
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
    return {"tables": {"Worth in nats a token": rows}, "notes": [
        "thresholds: sum of the worths of what is loaded, with the best threshold for each layer. gain: over "
        f"thresholds. {SEEN}: sees the observation, and was trained with the worth of every choice; {MORE}: sees the "
        f"router's logits and the experts' numbers, too; {KNOWN}: loads what is worth more than nothing. All are "
        "trained on rl_train and judged on test streams. Each choice counts by itself, for the token at hand alone.",
    ]}  # fmt: skip


def plot(frame: pd.DataFrame, result: dict[str, Any], out: Path) -> list[str]:
    """Plot the gains with intervals."""
    rows = result["tables"]["Worth in nats a token"]
    figure = Figure((8, 0.6 * len(rows) + 1.5), layout="constrained")
    axis = figure.subplots()
    for number, name in enumerate((SEEN, MORE, KNOWN)):
        for place, row in enumerate(rows):
            gain = row[f"{name}: gain"]
            low, high = row[f"{name}: gain, 95 %"]
            axis.errorbar(gain, place + 0.2 * (number - 1), xerr=[[gain - low], [high - gain]], fmt="o",
                          color=f"C{number}", label=None if place else name)  # fmt: skip
    axis.axvline(0, color="grey", lw=0.8)
    axis.set_yticks(range(len(rows)), [row["setting"] for row in rows])
    axis.set_xlabel("gain over thresholds, nats a token")
    axis.legend(loc="upper left", bbox_to_anchor=(1, 1))
    figure.savefig(out / "headroom.png", dpi=120)
    return ["headroom.png"]


def _seen(part: LoadChoices) -> np.ndarray:
    return part.seen


def _more(part: LoadChoices) -> np.ndarray:
    numbers = np.eye(part.logits.shape[1])[part.wanted].reshape(len(part.wanted), -1)
    return np.hstack([part.seen, part.logits, numbers]).astype(np.float32)
