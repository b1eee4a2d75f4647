"""Does deciding the experts of each token pay in wall time? Loss and time of the language model by rules and learners.

Each decision maker runs inside the model, its own time included: decoding for 1 and for 64 rows, and reading one
prompt and four prompts of 512 tokens. Rules are tuned, and PPO and Ada-K trained, for a cost weight at costs of this
machine.
"""

from __future__ import annotations

import time
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
import torch

from agents import runs
from agents.baselines import adak
from agents.baselines import layertopk as rules
from agents.baselines.layertopk import GRIDS
from agents.deploy.layertopk import AdaptiveK
from benchmarks.results.statistics import seeds_interval
from benchmarks.runner.kept import run_of
from benchmarks.runner.setup import Arguments
from cost.timing import torch_threads
from experts.language import LanguageModel, find, load, passages
from moe_envs.layertopk import MoELayerTopKVectorEnv

SEEDS = (0, 1, 2)
SETTINGS: dict[str, dict[str, Any]] = {
    f"cost weight {weight:g}": {"cost_weight": weight} for weight in (0.03, 0.1, 0.3)
}
QUICK = {
    "seeds": [0],
    "setups": {
        "short": {
            "timesteps": 2048,
            "adak": 2,
            "passages": 1,
            "texts": 2,
            "repeats": 1,
            "tokens": 8,
            "costs": "reference",
        }
    },
}
MODES = {"decode, 1 row": (1, 1), "decode, 64 rows": (64, 1), "prompt of 512": (1, 512), "4 prompts of 512": (4, 512)}
SEEN = 32  # tokens in the cache when the first token is decoded
DECODED = 5  # tokens that are decoded in each turn
FULL = "all experts"
MILD = 0.01  # nats


class LayerTopKSetup(Arguments):
    """Rules are tuned on `passages` of each domain at `costs`, Ada-K makes `adak` steps, losses are of `texts` test
    passages of each, times are medians of `repeats` turns."""

    model: str = "language"
    cost_weight: float = 0.1
    tokens: int = 64
    timesteps: int | None = None
    adak: int = adak.AdaKSettings.steps
    passages: int = rules.PASSAGES
    texts: int = 64
    repeats: int = 20
    costs: Literal["machine", "reference"] = "machine"


Setup = LayerTopKSetup


def measure(setup: LayerTopKSetup, seed: int, split: str, folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Loss and experts of each decision maker on test passages, and seconds a token in each mode."""
    kwargs: dict[str, Any] = {"model": setup.model, "cost_weight": setup.cost_weight, "tokens": setup.tokens}
    kwargs["costs"] = setup.costs
    model = load(setup.model)
    found = _tuned(setup.passages, **kwargs)
    kept = [f"k = {k}" for k in range(1, model.settings.k)] + ["static per layer"]
    kept += [f"{kind} per layer" for kind in GRIDS]
    makers: dict[str, Any] = {FULL: found[f"k = {model.settings.k}"]} | {name: found[name] for name in kept}
    makers |= {
        "Ada-K": adak.trained(rules.ID, seed, setup.adak, **kwargs),
        "PPO": runs.load(run_of(folder, rules.ID, {**kwargs, "observation": "token"}, seed, setup.timesteps))[0],
    }
    env = MoELayerTopKVectorEnv(1, split="test", **kwargs)
    texts = env.stepped.passages
    ids = _some(texts, setup.texts)
    with torch_threads(1):
        seen = _some(passages.load(find(setup.model), "validation"), setup.texts)
        decided = {name: _decider(model, maker, seen) for name, maker in makers.items()}
        losses = {name: _loss(model, each, ids) for name, each in decided.items()}
        times = {mode: _times(model, texts.ids, decided, sizes, setup.repeats) for mode, sizes in MODES.items()}
    return {"losses": losses}, {"times": times}


def score(frame: pd.DataFrame) -> dict[str, Any]:
    """A table for each mode, and who is fastest within 0.01 nats of all experts."""
    tables = {mode: _table(frame, mode) for mode in MODES}
    notes = [
        "nats: change of the loss of a token to all experts; speed: tokens per second over those with all experts, the "
        "decision maker's time included. Means over seeds, medians of a seed; one thread.",
        *(f"{mode}: fastest within {MILD} nats is {_fastest(table)}." for mode, table in tables.items()),
    ]
    return {"tables": tables, "notes": notes}


def plot(frame: pd.DataFrame, result: dict[str, Any], out: Path) -> list[str]:
    """Loss against speed in each mode."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(MODES), figsize=(4 * len(MODES), 4), sharey=True, layout="constrained")
    for axis, (mode, table) in zip(axes, result["tables"].items(), strict=True):
        axis.set_prop_cycle(color=plt.get_cmap("tab20").colors)  # type: ignore[attr-defined]
        for name in dict.fromkeys(row["decided by"] for row in table):
            points = sorted((row["speed"], row["nats"]) for row in table if row["decided by"] == name)
            axis.plot(*zip(*points, strict=True), marker="o", label=name, linewidth=1)
        axis.set(title=mode, xlabel="tokens per second / all experts")
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("loss over all experts, nats a token")
    axes[-1].legend(fontsize=7)
    figure.savefig(out / "speed.png", dpi=110)
    plt.close(figure)
    return ["speed.png"]


def _table(frame: pd.DataFrame, mode: str) -> list[dict[str, Any]]:
    found = []
    for setup, rows in frame.groupby("setup", sort=False):
        for name in rows["losses"].iloc[0]:
            nats = [each[name][0] - each[FULL][0] for each in rows["losses"]]
            experts = [each[name][1] for each in rows["losses"]]
            speeds = [each[mode][FULL] / each[mode][name] for each in rows["times"]]
            found.append({
                "setup": setup, "decided by": name, "experts": float(np.mean(experts)),
                "nats": float(np.mean(nats)), "speed": float(np.mean(speeds)),
                "95 %": list(seeds_interval(np.array(speeds))) if len(speeds) > 1 else None,
                "us a token": 1e6 * float(np.mean([each[mode][name] for each in rows["times"]])),
            })  # fmt: skip
    return found


def _fastest(table: list[dict[str, Any]]) -> str:
    best = max((row for row in table if row["nats"] <= MILD), key=lambda row: row["speed"])
    return f"{best['decided by']} ({best['setup']}): {best['speed']:.2f} times at {best['nats']:+.4f} nats"


def _some(texts: passages.Passages, count: int) -> np.ndarray:
    """Ids of the first passages of each domain."""
    chosen = [np.flatnonzero(texts.domain == each)[:count] for each in np.unique(texts.domain)]
    return texts.ids[np.concatenate(chosen)]


@cache
def _tuned(passages: int, **kwargs: Any) -> dict[str, Any]:
    """The rules, which do not depend on the seed."""
    return rules.baselines(rules.ID, passages=passages, **kwargs)


def _decider(model: LanguageModel, maker: Any, ids: np.ndarray) -> Any:
    """What a model takes as k: numbers where they are the same for all tokens, else the policy, which is not asked in
    layers where it is constant."""
    adaptive = AdaptiveK(model, maker)
    constant = adaptive.calibrate(ids[:, :-1])
    return list(constant.values()) if len(constant) == adaptive.layers else adaptive


def _loss(model: LanguageModel, decided: Any, ids: np.ndarray) -> tuple[float, float]:
    """Mean loss in nats, and experts of a token in a layer."""
    with torch.inference_mode():
        loss = float(model.loss(ids, k=decided).mean())
        routing = model.network(torch.from_numpy(ids[:, :-1]), decided).routing
    return loss, float(np.mean([each.members.sum(-1).float().mean().item() for each in routing]))


def _times(
    model: LanguageModel, texts: np.ndarray, decided: dict[str, Any], sizes: tuple[int, int], repeats: int
) -> dict[str, float]:
    """Median seconds a token, on texts `[N, T + 1]` one after the other; in turns, each of which begins with another
    decision maker."""
    rows, size = sizes
    length = SEEN + DECODED if size == 1 else size
    stream = torch.from_numpy(texts[:, :-1].reshape(-1))
    stream = stream.repeat(1 + 2 * rows * length // len(stream))
    spent: dict[str, list[float]] = {name: [] for name in decided}
    names = list(decided)
    for turn in range(repeats):
        start = turn * rows * length % (len(stream) - rows * length)
        ids = stream[start : start + rows * length].view(rows, -1)
        cache = model.network.cache(rows, size=length) if size == 1 else None
        order = np.roll(names, -turn).tolist()
        with torch.inference_mode():
            if cache:
                model.network(ids[:, :SEEN], None, cache)
            _run(model, ids, decided[order[-1]], cache)  # warms up
            for name in order:
                spent[name] += _run(model, ids, decided[name], cache)
    return {name: float(np.median(each)) for name, each in spent.items()}


def _run(model: LanguageModel, ids: torch.Tensor, k: Any, cache: Any) -> list[float]:
    """Seconds a token: with a cache of each token decoded, else of all at once."""
    times = list[float]()
    steps, seen = (ids[:, SEEN:].split(1, dim=1), replace(cache)) if cache else ([ids], None)
    for each in steps:
        begun = time.perf_counter()
        model.network(each, k, seen)
        times.append((time.perf_counter() - begun) / each.numel())
    return times
