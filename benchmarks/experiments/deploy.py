"""What is a learned router worth in the real model? Its answers beside the environment's, its own cost, wall times."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from agents import runs
from agents.deploy.routing import RoutedMoE
from agents.evaluate import make_rows
from cost.model import Cost
from cost.profile import measure
from cost.timing import torch_threads
from experts import bundle as bundles
from experts import data

BATCH_SIZES, REPEATS = (1, 32, 512), 200
Result = dict[str, Any]


def run(folder: Path, episodes: int = 500) -> Result:
    """Deploy the policy of a run folder: accuracy and cost as in the environment and with what the router itself costs
    on this machine, wall time beside the top-2 gate."""
    policy: Any
    policy, config = runs.load(folder)
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
        times = _times(routed, loaded.model(), torch.from_numpy(inputs))
    chosen = np.array(actions).swapaxes(0, 1).reshape(len(members), -1)
    same = members == (chosen == np.arange(members.shape[1]) if chosen.shape[1] == 1 else chosen == 1)
    loads = members.reshape(len(rows), -1, members.shape[1]).sum(1)
    codes = 1 << np.arange(members.shape[1])
    cost = float(((loads > 0) @ env.tables.fixed[codes, 0] + loads @ env.tables.slope[codes, 0]).mean())
    own = _router_cost(routed, x[: rows.shape[1]])
    charged = cost + float(env.tables.relative(own.time, own.memory, own.energy))
    cases = {"environment": (found["quality"], found["cost"]), "deployed": (accuracy, cost)}
    cases["deployed, with its router"] = (accuracy, charged)
    return {
        "run": str(folder),
        "episodes": episodes,
        "rows": [
            {"case": case, "accuracy": quality, "cost": paid, "return": quality - config["cost_weight"] * paid}
            for case, (quality, paid) in cases.items()
        ],
        "decisions_equal": float(same.all(1).mean()),
        "router": vars(own),
        "times": times,
    }


def _router_cost(routed: RoutedMoE, x: torch.Tensor) -> Cost:
    """What the decisions for one batch cost on this machine, in s, B and J."""
    with torch.inference_mode():
        gate = routed.gate(routed.trunk(x))
        profile = measure({"router": lambda n: lambda: routed.route(x, gate)}, sizes=(len(x),))
    return profile.cost("router", len(x))


def _times(routed: RoutedMoE, model: Any, inputs: torch.Tensor) -> list[dict[str, float]]:
    """Medians in s, by turns: the top-2 gate as a routed layer runs it, the routed model, and its router alone."""
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
        for _ in range(REPEATS):
            for case, call in cases.items():
                begun = time.perf_counter()
                call()
                spent[case].append(time.perf_counter() - begun)
        result.append({"batch_size": size} | {case: statistics.median(values) for case, values in spent.items()})
    return result
