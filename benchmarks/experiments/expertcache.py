"""Does choosing what is loaded pay in the runtime? Seconds a token and loss of a language model in a small memory.

Each decision maker runs in the offloading runtime, its own time included: test streams are decoded token by token, one
row, experts are read from the disk. Rules are tuned, PPO and a classifier of rollouts are trained, for load times of
this machine. Run it on an otherwise idle machine.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
import torch

from agents import runs
from agents.baselines import expertcache as rules
from agents.baselines.rollout_classifier import RolloutClassifier, RolloutSettings, trained
from agents.checkpoints import MANIFEST
from agents.deploy.expertcache import CacheControl
from benchmarks.experiments.offload import ALL, decoded, not_from_disk
from benchmarks.results.statistics import seeds_interval
from benchmarks.runner.kept import found_once, run_of
from benchmarks.runner.setup import Arguments
from cost.files import locked, sha256_of
from cost.timing import torch_threads
from experts.language import load
from experts.offload import OffloadedModel
from moe_envs.expertcache import MoEExpertCacheVectorEnv

LRU = "all loaded, lru for all layers"
KEPT: dict[str, Any] = {
    "all loaded, lru": rules.Always,
    "all loaded, predicted": rules.Always,
    "bias towards memory": rules.Biased,
    "minimum weight, lru": rules.MinimumWeight,
    "minimum weight per layer, predicted": rules.MinimumWeight,
    "minimum weight and demand per layer, predicted": rules.MinimumWeight,
}
SEEDS = (0, 1, 2)
Precision = Literal["float32", "int4"]
SETTINGS: dict[str, dict[str, Any]] = {
    f"{weights}, capacity {capacity}": {"weights": weights, "capacity": capacity}
    for weights in ("int4", "float32") for capacity in (4, 6, 8)
}  # fmt: skip
QUICK = {
    "seeds": [0],
    "setups": {
        "short": {
            "timesteps": 512,
            "tune": 1,
            "rollouts": 2,
            "streams": 1,
            "tokens": 4,
            "passages": 2,
            "costs": "reference",
        }
    },
}


class ExpertCacheSetup(Arguments):
    """Rules are tuned on `tune` streams for load times by `costs`, the classifier is trained on `rollouts` streams;
    `streams` of the test split, of `passages` of `tokens` tokens, are decoded."""

    model: str = "language"
    weights: Precision = "int4"
    capacity: int = 6
    cost_weight: float = 0.2
    tokens: int = 64
    passages: int = 4
    timesteps: int | None = None
    tune: int = rules.STREAMS
    rollouts: int = RolloutSettings.streams
    streams: int = 8
    costs: Literal["machine", "reference"] = "machine"


Setup = ExpertCacheSetup


def measure(setup: ExpertCacheSetup, seed: int, split: str, folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Loss, loads and seconds of each decision maker on the same test streams."""
    fields = ("model", "weights", "capacity", "cost_weight", "tokens", "passages", "costs")
    kwargs = {name: getattr(setup, name) for name in fields}
    makers: dict[str, Any] = {ALL: None, LRU: None, **tuned(folder, setup.tune, **kwargs)}
    makers["PPO"] = runs.load(run_of(folder, rules.ID, kwargs, seed, setup.timesteps))[0]
    makers["rollout classifier"] = classifier(folder, seed, setup.rollouts, **kwargs)
    env = MoEExpertCacheVectorEnv(1, split="test", **kwargs)
    stepped = env.stepped
    chosen = np.random.default_rng(seed).permutation(len(stepped.streams))[: setup.streams]
    texts = [torch.from_numpy(stepped.passages.ids[stepped.streams[each]]) for each in chosen]
    losses, counts, times, direct = dict[str, float](), dict[str, list[float]](), dict[str, list[float]](), True
    with torch_threads(1):
        for ids in texts:  # in turns
            for name, maker in makers.items():
                seconds, loss, read, from_disk = _decoded(env, setup, name, maker, ids, folder)
                direct &= from_disk
                times.setdefault(name, []).append(seconds)
                losses[name] = losses.get(name, 0.0) + loss / len(texts)
                counts.setdefault(name, []).append(read)
    loads = {name: float(np.mean(found)) for name, found in counts.items()}
    medians = {name: float(np.median(each)) for name, each in times.items()}
    return {"losses": losses, "loads": loads}, {"times": medians, "direct": direct}


def tuned(folder: Path, streams: int, **kwargs: Any) -> dict[str, rules.LoadRule]:
    """The rules, tuned once for all seeds."""

    def search() -> dict[str, Any]:
        found = rules.baselines(rules.ID, streams=streams, **kwargs)
        return {name: found[name].about for name in KEPT}

    said = json.dumps([streams, kwargs], sort_keys=True)
    found = found_once(folder / f"rules-{sha256_of(said.encode())[:16]}.json", search)
    return {name: kind(**found[name]) for name, kind in KEPT.items()}


def classifier(folder: Path, seed: int, streams: int, **kwargs: Any) -> RolloutClassifier:
    """A classifier, trained once for all runs."""
    said = json.dumps([seed, streams, kwargs], sort_keys=True)
    place = folder / f"classifier-{sha256_of(said.encode())[:16]}"
    with locked(place):
        if not (place / MANIFEST).exists():
            trained(rules.ID, seed, RolloutSettings(streams=streams), **kwargs).save(place)
        return RolloutClassifier.load(place)


def score(frame: pd.DataFrame) -> dict[str, Any]:
    """A table for each setting."""
    tables: dict[str, list[dict[str, Any]]] = {}
    for setup, rows in frame.groupby("setup", sort=False):
        table = tables[str(setup)] = []
        for name in rows["losses"].iloc[0]:
            nats = np.array([each[name] - each[ALL] for each in rows["losses"]])
            speeds = np.array([each[LRU] / each[name] for each in rows["times"]])
            table.append({
                "decided by": name, "ms a token": 1e3 * float(np.mean([each[name] for each in rows["times"]])),
                "speed": float(speeds.mean()),
                "95 %": list(seeds_interval(speeds)) if len(speeds) > 1 else None,
                "nats": float(nats.mean()), "loads a token": float(np.mean([each[name] for each in rows["loads"]])),
            })  # fmt: skip
    return {"tables": tables, "notes": [
        f"speed: tokens per second over those of {LRU!r}, which loads whatever is asked for. nats: change of the loss "
        "of a token to that with all experts in memory. The decision maker's own time is included; one thread, one "
        "row; medians over streams, means over seeds.",
        *not_from_disk(frame),
    ]}  # fmt: skip


def plot(frame: pd.DataFrame, result: dict[str, Any], out: Path) -> list[str]:
    """Loss against time in each setting."""
    import matplotlib.pyplot as plt

    tables = result["tables"]
    size = max(5, 4 * len(tables)), 5
    figure, axes = plt.subplots(1, len(tables), figsize=size, layout="constrained", squeeze=False)
    for axis, (name, table) in zip(axes[0], tables.items(), strict=True):
        for row in table:
            axis.plot(row["ms a token"], row["nats"], "o", label=row["decided by"])
        axis.set(title=name, xlabel="ms a token", ylabel="change of the loss, nats a token")
        axis.grid(alpha=0.3)
    named = axes[0][0].get_legend_handles_labels()
    figure.legend(*named, loc="outside lower center", ncols=min(2 * len(tables), 5), fontsize=7)  # beside no point
    figure.savefig(out / "time.png", dpi=110)
    plt.close(figure)
    return ["time.png"]


def _decoded(
    env: MoEExpertCacheVectorEnv, setup: ExpertCacheSetup, name: str, maker: Any, ids: torch.Tensor, folder: Path
) -> tuple[float, float, float, bool]:
    """Seconds a token, loss, and loads a token of a decision maker on the passages `[S, T + 1]`, and whether they came
    from the disk."""
    if name == ALL:
        return *decoded(env.stepped.model, ids), 0.0, True
    model = load(setup.model)
    policy = "lru" if maker is None else CacheControl(maker, model, setup.capacity, env.stepped.demand)
    file = folder / f"experts-{model.sha256[:12]}-{setup.weights}.bin"
    with OffloadedModel(model, env.memory, policy, file=file, weights=setup.weights) as offloaded:
        if maker is None:  # it begins with what the others begin with
            first = enumerate(env.stepped.demand.most(setup.capacity).tolist())
            offloaded.pool.fill((layer, expert) for layer, experts in first for expert in experts)
        before = offloaded.statistics()["loads"]
        seconds, loss = decoded(model, ids)
        loads = (offloaded.statistics()["loads"] - before) / (len(ids) * (ids.shape[1] - 1))
        return seconds, loss, loads, offloaded.direct
