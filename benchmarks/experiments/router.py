"""Does a learned router pay in the real model? Accuracy and wall time, its own decisions included, beside rules.

Costs are times on this machine, relative to the top-2 gate. The shipped experts are tiny; a second setup trains an MoE
of wide experts on the same data. All routers run the same code: shared trunk and gate, their own choice, and only the
chosen experts. To evaluate your own run: moe-benchmark run router --set run=RUN_DIR.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from agents import runs
from agents.baselines.routing import Planner, RoutingProblem
from agents.deploy.routing import RoutedMoE
from agents.evaluate import make_rows
from benchmarks.results.statistics import seeds_interval
from benchmarks.runner.setup import Arguments
from cost.files import locked
from cost.timing import torch_threads
from experts import bundle as bundles
from experts import data
from experts.bundle.build import build
from experts.training import TrainingSettings

BATCH_SIZES, REPEATS = (32, 512), 100
ENV = "moe_envs:MoERouting-v0"
TIME_ONLY = {"time_weight": 1.0, "memory_weight": 0.0, "energy_weight": 0.0}
SEEDS = (0, 1, 2)
WIDE = [256, 256, 512, 512, 1024, 1024, 2048, 2048]
SETTINGS: dict[str, dict[str, Any]] = {
    "experts of 4 to 64 units": {},
    "experts of 256 to 2,048 units": {"widths": WIDE},
}
QUICK = {
    "seeds": [0],
    "setups": {"small": {"bundle": "digits", "timesteps": 4096, "episodes": 32, "repeats": 3}},
}
PPO, PLAN = "PPO", "plan (estimates)"


class RouterSetup(Arguments):
    """`run` is a run folder of moe-train; if None, PPO is trained on `bundle`, or, with `widths`, on an MoE of experts
    of so many hidden units that is trained on the same data for `epochs`. `points` are those of `RoutedMoE`."""

    run: str | None = None
    bundle: str = "fashion-mnist"
    widths: list[int] | None = None
    epochs: int = 5
    points: int = 2048
    cost_weight: float = 0.2
    timesteps: int | None = None
    episodes: int = 512
    repeats: int = REPEATS


Setup = RouterSetup


def measure(setup: RouterSetup, seed: int, split: str, folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Decisions compared with the environment's, accuracy of each router, and its wall times."""
    run = Path(setup.run) if setup.run else _trained(setup, seed, folder)
    policy: Any
    policy, config = runs.load(run)
    kwargs = config["env_kwargs"]
    loaded = bundles.load(kwargs.get("bundle", "fashion-mnist"))
    if "name" not in loaded.metadata["data"]:
        raise ValueError(
            f"{loaded.path} is of data without a name, whose test inputs cannot be had: build it with data="
        )
    inputs, labels = data.load(loaded.metadata["data"]["name"])["test"]
    rows, actions = _played(policy, config["env"], setup.episodes, kwargs)
    x, right = torch.from_numpy(inputs[rows.ravel()]), torch.from_numpy(labels[rows.ravel()])
    exact = RoutedMoE(loaded, policy, kwargs)
    fast = {PPO: exact}
    if exact.estimator is not None:
        fast[PPO] = RoutedMoE(loaded, policy, kwargs, points=setup.points)
        if exact.action == "expert":
            fast[PLAN] = RoutedMoE(loaded, "plan", kwargs, points=setup.points)
    routers: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
        "top-2 gate": lambda x, gate: _largest(gate, 2),
        "top-1 gate": lambda x, gate: _largest(gate, 1),
        "best fixed pool, by the gate": _in_pool(_best_pool(config["env"], kwargs)),
        f"{PPO}, all points": exact.route,
        **{name: routed.route for name, routed in fast.items()},
    }
    with torch_threads(1), torch.inference_mode():
        members = exact.route(x, exact.gate(exact.trunk(x))).numpy()
        equal = float((members == actions.reshape(members.shape)).all(1).mean())
        answers = {name: (_answer(exact, route, x)[0].argmax(1) == right).float() for name, route in routers.items()}
        times = _times(exact, routers, x, setup.repeats)
    accuracy = {name: float(each.mean()) for name, each in answers.items()}
    return {"decisions_equal": equal, "accuracy": accuracy, "weight": float(kwargs.get("cost_weight", 0.2))}, {
        "times": times
    }


def score(frame: pd.DataFrame) -> dict[str, Any]:
    """A table for each setup and batch size: accuracy, time, return, and what PPO returns more than each."""
    tables = {}
    for setup, rows in frame.groupby("setup", sort=False):
        for size in BATCH_SIZES:
            tables[f"{setup}, batches of {size}"] = _table(rows, size)
    equal = frame["decisions_equal"].min()
    return {
        "tables": tables,
        "notes": [
            f"Decisions equal to the environment's, with all points: {equal:.4%} or more.",
            "return: accuracy - weight * time / time of the top-2 gate. Medians of a training, means of trainings, one "
            "thread. pays from: the top-2 gate's time above which routing saves more than the router takes.",
        ],
    }


def _table(rows: pd.DataFrame, size: int) -> list[dict[str, Any]]:
    """Means over trainings, and intervals of the difference to PPO."""
    times = pd.DataFrame([{name: each[str(size)] for name, each in row["times"].items()} for _, row in rows.iterrows()])
    accuracy = pd.DataFrame(list(rows["accuracy"]))
    weight = rows["weight"].to_numpy()
    ratio = pd.DataFrame({name: [a[0] / b[0] for a, b in zip(times[name], times["top-2 gate"], strict=True)]
                          for name in times})  # fmt: skip
    returns = accuracy - ratio.mul(weight, axis=0)
    found = []
    for name in times:
        whole, router = np.array(times[name].tolist()).mean(0)
        top_2 = float(np.mean([each[0] for each in times["top-2 gate"]]))
        saved = 1 - (whole - router) / top_2
        more = (returns[PPO] - returns[name]).to_numpy()
        found.append({
            "router": name, "accuracy": float(accuracy[name].mean()),
            "ms": 1e3 * whole, "of that the router": 1e3 * router,
            "time / top-2": float(ratio[name].mean()), "return": float(returns[name].mean()),
            "PPO's minus this": float(more.mean()),
            "95 %": list(seeds_interval(more)) if len(more) > 1 and name != PPO else None,
            "pays from, ms": 1e3 * router / saved if saved > 0 and router > 0 else None,
        })  # fmt: skip
    return found


def _played(policy: Any, env_id: str, episodes: int, kwargs: dict[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    """Inputs `[episodes, T]` of test batches, and which experts the policy chose in the environment, `[.., T, E]`."""
    env: Any = make_rows(env_id, episodes, **{**kwargs, "split": "test"}).unwrapped
    observation, _ = env.reset(seed=0)
    rows = np.array([env.tables.batch(batch)[:-1] for batch in env.batch])
    actions = []
    for _ in range(env.tables.batch_size):
        action, _ = policy.predict(observation, deterministic=True)
        observation, *_ = env.step(action)
        actions.append(np.eye(env.tables.num_experts)[action] if action.ndim == 1 else action)
    return rows, np.array(actions).swapaxes(0, 1) > 0


def _trained(setup: RouterSetup, seed: int, folder: Path) -> Path:
    """The run of PPO, trained by times on this machine."""
    bundle = str(_wide(setup, folder)) if setup.widths else setup.bundle
    place = folder / f"run-{Path(bundle).name}-{setup.cost_weight:g}-{seed}-{setup.timesteps or 'all'}"
    with locked(place):
        if not (place / runs.SETTINGS).exists():
            more = {"total_timesteps": setup.timesteps} if setup.timesteps else {}
            kwargs = {"bundle": bundle, "cost_weight": setup.cost_weight, "costs": "machine", **TIME_ONLY}
            with torch_threads(1):
                runs.train(ENV, "ppo", seed, place, kwargs, more, overwrite=True)
    return place


def _wide(setup: RouterSetup, folder: Path) -> Path:
    """The bundle of an MoE of experts of these widths on the data of another bundle."""
    widths = setup.widths or []
    name = f"{setup.bundle}-{'-'.join(map(str, widths))}-{setup.epochs}"
    with locked(folder / name):
        if not (folder / "bundles" / name).exists():
            source = data.load(setup.bundle)
            settings = TrainingSettings(widths=widths, epochs=setup.epochs, standardize=False)
            build(
                name, source.inputs, source.labels, splits=source.splits, settings=settings,
                data={"name": source.name, "sha256": source.sha256}, folder=folder / "bundles", progress=False,
            )  # fmt: skip
    return folder / "bundles" / name


def _best_pool(env_id: str, kwargs: dict[str, Any]) -> int:
    """Code of the pool of experts in which the gate returns most on validation."""
    arguments = {key: value for key, value in kwargs.items() if key not in ("observation", "split")}
    problem = RoutingProblem(env_id, **arguments)
    returns = Planner(problem, problem.gate, problem.singles).pool_returns(validation=True)
    return int(problem.pools[returns.mean(0).argmax()])


def _in_pool(code: int) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    def route(x: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
        outside = (code >> torch.arange(gate.shape[1]) & 1) == 0
        return _largest(gate.masked_fill(outside, -torch.inf), 1)

    return route


def _largest(scores: torch.Tensor, count: int) -> torch.Tensor:
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(1, scores.topk(count).indices, True)


def _answer(routed: RoutedMoE, route: Callable[[torch.Tensor, torch.Tensor], torch.Tensor], x: torch.Tensor) -> Any:
    """Logits of the experts that `route` chooses, and the seconds that it takes to choose."""
    hidden = routed.trunk(x)
    gate = routed.gate(hidden)
    begun = time.perf_counter()
    members = route(x, gate)
    seconds = time.perf_counter() - begun
    return routed.answer(hidden, gate, members), seconds


def _times(
    routed: RoutedMoE, routers: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]], x: torch.Tensor,
    repeats: int,
) -> dict[str, dict[str, tuple[float, float]]]:  # fmt: skip
    """Median times in s by router and batch size, of the whole model and of its router, measured in turns."""
    found: dict[str, dict[str, tuple[float, float]]] = {name: {} for name in routers}
    for size in BATCH_SIZES:
        batches = [part for part in x.split(size) if len(part) == min(size, len(x))]
        spent: dict[str, list[tuple[float, float]]] = {name: [] for name in routers}
        for number in range(repeats):
            batch = batches[number % len(batches)]
            for name, route in routers.items():
                begun = time.perf_counter()
                _, deciding = _answer(routed, route, batch)
                spent[name].append((time.perf_counter() - begun, deciding))
        for name, each in spent.items():
            whole, router = np.median(each, axis=0)
            found[name][str(size)] = float(whole), float(router)
    return found
