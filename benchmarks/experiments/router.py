"""How well does a learned router work in the real model? Accuracy, cost of the router itself, and wall times.

To evaluate your own run: moe-benchmark run router --set run=RUN_DIR. By default, PPO is trained first.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from agents import runs
from agents.deploy.routing import RoutedMoE
from agents.evaluate import make_rows
from benchmarks.runner.setup import Arguments
from cost.files import locked
from cost.model import Cost
from cost.profile import measure as measure_cost
from cost.timing import torch_threads
from experts import bundle as bundles
from experts import data

BATCH_SIZES, REPEATS = (1, 32, 512), 200
ENV = "moe_envs:MoERouting-v0"
SEEDS = (0,)
SETTINGS: dict[str, dict[str, Any]] = {"router": {}}
QUICK = {"settings": {"bundle": "digits", "timesteps": 4096, "episodes": 20, "repeats": 5}}


class RouterSetup(Arguments):
    """`run` is a run folder of moe-train; if None, PPO is trained on `bundle` with `cost_weight`."""

    run: str | None = None
    bundle: str = "fashion-mnist"
    cost_weight: float = 0.2
    timesteps: int | None = None
    episodes: int = 500
    repeats: int = REPEATS


Setup = RouterSetup


def measure(setup: RouterSetup, seed: int, split: str, folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Accuracy, cost in the environment and with the router's own cost on this machine, and wall time compared with the
    top-2 gate."""
    run = Path(setup.run) if setup.run else _trained(setup, seed, folder)
    episodes = setup.episodes
    policy: Any
    policy, config = runs.load(run)
    kwargs = {**config["env_kwargs"], "split": "test"}
    env: Any = make_rows(config["env"], episodes, **kwargs).unwrapped
    loaded = bundles.load(kwargs.get("bundle", "fashion-mnist"))
    routed = RoutedMoE(loaded, policy, config["env_kwargs"])
    name = loaded.metadata["name"]
    inputs, labels = data.load(name)["test"]
    observation, _ = env.reset(seed=0)
    rows = np.array([env.tables.batch(batch)[:-1] for batch in env.batch])
    found, actions = {"quality": 0.0, "cost": 0.0}, []
    for _ in range(env.tables.batch_size):
        action, _ = policy.predict(observation, deterministic=True)
        observation, _, _, _, infos = env.step(action)
        infos = infos.get("final_info", infos)
        found = {key: found[key] + float(infos[f"reward/{key}"].mean()) for key in found}
        actions.append(action)
    x = torch.from_numpy(inputs[rows.ravel()])
    with torch_threads(1), torch.inference_mode():
        members = routed.route(x, routed.gate(routed.trunk(x))).numpy()
        accuracy = float((routed(x).argmax(1).numpy() == labels[rows.ravel()]).mean())
        times = _times(routed, loaded.model(), torch.from_numpy(inputs), setup.repeats)
    chosen = np.array(actions).swapaxes(0, 1).reshape(len(members), -1)
    same = members == (chosen == np.arange(members.shape[1]) if chosen.shape[1] == 1 else chosen == 1)
    loads = members.reshape(len(rows), -1, members.shape[1]).sum(1)
    codes = 1 << np.arange(members.shape[1])
    cost = float(((loads > 0) @ env.tables.fixed[codes, 0] + loads @ env.tables.slope[codes, 0]).mean())
    own = _router_cost(routed, x[: rows.shape[1]])
    charged = cost + float(env.tables.relative(own.time, own.memory, own.energy))
    cases = {"environment": (found["quality"], found["cost"]), "deployed": (accuracy, cost)}
    cases["deployed, with its router"] = (accuracy, charged)
    equal = float(same.all(1).mean())
    return {"decisions_equal": equal, "accuracy": accuracy}, {"router": vars(own), "times": times, "cases": [
        {"": case, "accuracy": quality, "cost": paid, "return": quality - config["cost_weight"] * paid}
        for case, (quality, paid) in cases.items()
    ]}  # fmt: skip


def score(frame: pd.DataFrame) -> dict[str, Any]:
    """Tables of accuracy, cost and wall time."""
    first = frame.iloc[0]
    times = [
        {"batch": each["batch_size"], "top-2 gate, ms": 1e3 * each["top-2"], "routed, ms": 1e3 * each["routed"],
         "of that the router, ms": 1e3 * each["router"], "routed / top-2": each["routed"] / each["top-2"]}
        for each in first["times"]
    ]  # fmt: skip
    return {
        "tables": {"Test batches; cost 1 is the top-2 gate's": first["cases"],
                   "Wall time, medians, one thread": times},
        "notes": [f"Decisions equal to the environment's: {first['decisions_equal']:.4%}."],
    }  # fmt: skip


def _trained(setup: RouterSetup, seed: int, folder: Path) -> Path:
    place = folder / f"run-{setup.bundle}-{setup.cost_weight:g}-{seed}-{setup.timesteps or 'all'}"
    with locked(place):
        if not (place / runs.SETTINGS).exists():
            more = {"total_timesteps": setup.timesteps} if setup.timesteps else {}
            kwargs = {"bundle": setup.bundle, "cost_weight": setup.cost_weight}
            with torch_threads(1):
                runs.train(ENV, "ppo", seed, place, kwargs, more, overwrite=True)
    return place


def _router_cost(routed: RoutedMoE, x: torch.Tensor) -> Cost:
    """Cost of the decisions for one batch on this machine in s, B and J."""
    with torch.inference_mode():
        gate = routed.gate(routed.trunk(x))
        profile = measure_cost({"router": lambda n: lambda: routed.route(x, gate)}, sizes=(len(x),))
    return profile.cost("router", len(x))


def _times(routed: RoutedMoE, model: Any, inputs: torch.Tensor, repeats: int) -> list[dict[str, float]]:
    """Median times in s, alternating between top-2 gate, routed model and router alone."""
    experts = list(model.experts)

    def top_2(x: torch.Tensor) -> torch.Tensor:
        hidden = model.trunk(x)
        weights, chosen = model.gate(hidden).topk(2)
        weights = weights.softmax(-1)
        logits = x.new_zeros(len(x), 10)
        for number, expert in enumerate(experts):
            rows, place = (chosen == number).nonzero(as_tuple=True)
            if len(rows):
                logits.index_add_(0, rows, expert(hidden[rows]) * weights[rows, place, None])
        return logits

    result = []
    for size in BATCH_SIZES:
        x = inputs[:size]
        cases: dict[str, Callable[[], object]] = {
            "top-2": lambda x=x: top_2(x),  # type: ignore[misc]
            "routed": lambda x=x: routed(x),  # type: ignore[misc]
            "router": lambda x=x: routed.route(x, routed.gate(routed.trunk(x))),  # type: ignore[misc]
        }
        spent: dict[str, list[float]] = {case: [] for case in cases}
        for _ in range(repeats):
            for case, call in cases.items():
                begun = time.perf_counter()
                call()
                spent[case].append(time.perf_counter() - begun)
        result.append({"batch_size": size} | {case: statistics.median(values) for case, values in spent.items()})
    return result
