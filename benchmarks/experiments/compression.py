"""Does a learned policy choose better plans for a byte budget than searches do, on models it knows and on others?

Everything is chosen on one half of the validation images and judged on the test images. PPO is one policy for all
budgets and models; searches run for each. "PPO" is its plan from the sensitivities alone; "PPO, best of N" draws N
plans and keeps the best, as many evaluations as the searches have.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from agents import tuned
from agents.baselines import compression as baselines
from agents.deploy.compression import levels_of
from agents.ppo import PPO
from benchmarks import policies
from benchmarks.results.statistics import mean_interval
from benchmarks.runner import processes as jobs
from cost.files import write_text
from cost.machine import provenance
from experts import reference_models
from moe_envs.compression.env import SHARES as SHARES_DRAWN
from moe_envs.compression.tables import CompressionTables

ID = "moe_envs:MoECompression-v0"
SHARES = {
    "fashion-mnist-conv": (0.034, 0.04, 0.048, 0.062, 0.069, 0.086, 0.104, 0.173),
    "digits-mlp": (0.07, 0.09, 0.12, 0.16),
}
TIE = 0.2  # points of accuracy; the standard error of a test accuracy is larger
VARIANTS: dict[str, dict[str, Any]] = {
    "PPO": {"warm": 0.6, "masks": True},
    "PPO, no warm start": {"warm": 0.0, "masks": True},  # with as many evaluations: 0.4 of the steps
    "PPO, no masks": {"warm": 0.6, "masks": False},
}
Result = dict[str, Any]


def budgets_of(model: str) -> list[int]:
    """The budgets in bytes that plans are compared at: 98 to 500 kB of the convolutional model."""
    kind, _ = reference_models.recipe_of(model)
    whole = CompressionTables((model,), "train", "expert", "accuracy", "reference").bytes
    return [round(share * whole) for share in SHARES[kind]]


def prepare(agent: Any, total: int, warm: float, masks: bool, shares: Any) -> Callable[[Any], object]:
    """Let an agent train the share `warm` of its steps on the sum of sensitivities, with or without action masks."""
    env: Any = agent.rows.env.unwrapped
    agent.rows.has_masks &= masks
    env.additive = warm > 0

    def after(agent: Any) -> None:
        env.additive = agent.num_timesteps < warm * total

    return after


def judge_policy(path: str, name: str, seed: int, model: str, evaluations: int) -> pd.DataFrame:
    """A policy's plans for each budget, with and without evaluations."""
    policy, budgets = PPO.load(path), budgets_of(model)
    plain = levels_of(policy, model, budgets, masks=VARIANTS[name]["masks"])[:, 0]
    found = [_judged(model, budgets, list(plain), name, seed, _sensitivities(model))]
    if name == "PPO":
        drawn = levels_of(policy, model, budgets, deterministic=False, repeats=evaluations - 1)
        tables = _tables(model)
        best = []
        for first, others in zip(plain, drawn, strict=True):
            plans = np.concatenate([first[None], others])
            best.append(plans[tables.quality(np.zeros(len(plans), dtype=np.int64), plans)[0].argmax()])
        found.append(
            _judged(model, budgets, best, f"PPO, best of {evaluations}", seed, evaluations + _sensitivities(model))
        )
    return pd.concat(found)


def find(name: str, tables: CompressionTables, room: float, evaluations: int, seed: int) -> np.ndarray:
    """The plan of a baseline of `BASELINES` within `room` bytes for matrices, levels `[U]`."""
    sizes, gains = tables.sizes, tables.gains[0]

    def scores(plans: np.ndarray) -> np.ndarray:
        return tables.quality(np.zeros(len(plans), dtype=np.int64), plans)[0]

    if name == "uniform":
        return baselines.uniform(sizes, room)
    if name == "greedy":
        return baselines.greedy(sizes, gains, room)
    if name == "random search":
        return baselines.random_search(scores, sizes, room, evaluations, seed).levels
    exact = baselines.exact(sizes, gains, room)
    if name == "exact on sensitivities":
        return exact
    return baselines.local_search(
        lambda levels: float(scores(levels[None])[0]), exact, sizes, room, evaluations, seed
    ).levels


def judge_baseline(name: str, model: str, evaluations: int, seed: int) -> pd.DataFrame:
    """A baseline's plans for each budget."""
    tables, budgets = _tables(model), budgets_of(model)
    plans = [find(name, tables, budget - tables.overhead, evaluations, seed) for budget in budgets]
    measured = 0 if name in ("uniform", "random search") else _sensitivities(model)
    return _judged(model, budgets, plans, name, seed, measured + (evaluations if name in SEARCHES else 0))


BASELINES = ("uniform", "greedy", "exact on sensitivities", "random search", "exact, then local search")
SEARCHES = BASELINES[3:]


def run(
    models: list[str], held_out: list[str], seeds: int, timesteps: int | None, evaluations: int, searches: int,
    ablations: int, processes: int, out: Path, add_task: Callable[[str], Callable[[float], object]],
) -> Result:  # fmt: skip
    """Train, search, judge; writes results.json, plans.csv, a picture and the policies."""
    out.mkdir(parents=True, exist_ok=True)
    for model in (*models, *held_out):
        _tables(model)  # trained and measured once, before several processes ask for it
    with jobs.pool(processes) as pool:
        todo = [(name, seed) for name in VARIANTS for seed in range(seeds if name == "PPO" else ablations)]
        total = timesteps or tuned.settings("ppo", ID, "own")["total_timesteps"]
        steps = {name: round(total * (0.4 if variant["warm"] == 0 else 1)) for name, variant in VARIANTS.items()}
        learning = [
            pool.submit(
                policies.learn, {"model": models}, seed, steps[name], out / "policies" / f"{_file(name)}-{seed}", ID,
                prepare, shares=SHARES_DRAWN, **VARIANTS[name],
            )
            for name, seed in todo
        ]  # fmt: skip
        learned = jobs.gather(learning, add_task(f"{len(todo)} trainings of PPO"))
        every = [(model, "known") for model in models] + [(model, "held out") for model in held_out]
        judging = []
        for model, kind in every:
            for (name, seed), each in zip(todo, learned, strict=True):
                judging.append((kind, pool.submit(judge_policy, each["path"], name, seed, model, evaluations)))
            for name in BASELINES:
                for seed in range(searches if name in SEARCHES else 1):
                    judging.append((kind, pool.submit(judge_baseline, name, model, evaluations, seed)))
        found = jobs.gather([each for _, each in judging], add_task("searching and judging"))
    frame = pd.concat(
        [each.assign(kind=kind) for (kind, _), each in zip(judging, found, strict=True)], ignore_index=True
    )
    kept = [
        each | {"variant": name, "evaluations": _evaluations(each)}
        for (name, _), each in zip(todo, learned, strict=True)
    ]
    result: Result = {
        "models": models, "held_out": held_out, "evaluations": evaluations, "tie": TIE, "rows": summarise(frame),
        "policies": kept, **provenance(),
    }  # fmt: skip
    frame.to_csv(out / "plans.csv", index=False)
    write_text(out / "results.json", json.dumps(result, indent=1))
    _draw(frame, out / "points.png")
    return result


def summarise(frame: pd.DataFrame) -> list[Result]:
    """For each kind of models, budget and policy the mean change of test accuracy in points, and how far that is ahead
    of exact allocation with local search; of several seeds with 95 % intervals over seeds and models."""
    rows = []
    for _, group in frame.groupby(["kind", "budget"], sort=True):
        common: Result = {"kind": group["kind"].iloc[0], "budget": int(group["budget"].iloc[0])}
        tables = {
            name: part.pivot(index="seed", columns="model", values="points").to_numpy()
            for name, part in group.groupby("policy", sort=False)
        }
        for name, table in tables.items():
            part, difference = group[group["policy"] == name], table - tables[SEARCHES[1]].mean(0)
            row = common | {
                "policy": name,
                "points": float(table.mean()),
                "seeds": len(table),
                "models": table.shape[1],
            }
            row |= {"evaluations": int(part["evaluations"].max()), "bytes": float(part["bytes"].mean())}
            row |= {"ahead": float(difference.mean()), "tie": bool(abs(difference.mean()) < TIE)}
            row |= {"ci95": _interval(table), "ahead_ci95": _interval(difference)}
            rows.append(row)
    return rows


def _interval(table: np.ndarray) -> tuple[float, float] | None:
    """Of `[seeds, models]`; of one seed there is none, and the seeds of one model are all there is."""
    if len(table) == 1:
        return None
    return mean_interval(table if table.shape[1] > 1 else table.T)


def _sensitivities(model: str) -> int:
    """Evaluations that the sensitivities of a model took."""
    return _tables(model).gains[0].size + 1


def _tables(model: str, split: str = "train") -> CompressionTables:
    return CompressionTables((model,), split, "expert", "accuracy and loss", "reference")


def _judged(
    model: str, budgets: list[int], plans: list[np.ndarray], name: str, seed: int, evaluations: int
) -> pd.DataFrame:
    """Changes of accuracy in points, and of loss, on the test images."""
    tables = _tables(model, "test")
    _, accuracy, loss = tables.quality(np.zeros(len(plans), dtype=np.int64), np.stack(plans))
    sizes = [baselines.size(plan, tables.sizes) + tables.overhead for plan in plans]
    assert all(size <= budget for size, budget in zip(sizes, budgets, strict=True))
    return pd.DataFrame({
        "model": model, "policy": name, "seed": seed, "evaluations": evaluations, "budget": budgets, "bytes": sizes,
        "points": 100 * accuracy, "loss": loss, "levels": [" ".join(map(str, plan)) for plan in plans],
    })  # fmt: skip


def _evaluations(policy: Result) -> int:
    """How many plans a policy's training ran a model for, at most: repeated ones are looked up."""
    steps = policy["settings"]["total_timesteps"] * (1 - policy["warm"])
    return int(steps / len(_tables(policy["env_kwargs"]["model"][0]).units))


def _file(name: str) -> str:
    return name.replace(", ", "-").replace(" ", "-").lower()


def _draw(frame: pd.DataFrame, path: Path) -> None:
    """Points lost at each budget, means over models and seeds."""
    kinds = list(dict.fromkeys(frame["kind"]))
    figure = Figure((6.5 * len(kinds) + 1.5, 4.5), layout="constrained")
    panels = figure.subplots(1, len(kinds), squeeze=False)[0]
    for panel, kind in zip(panels, kinds, strict=True):
        part = frame[frame["kind"] == kind]
        for name, each in part.groupby("policy", sort=False):
            means = each.groupby("budget")["points"].mean()
            panel.plot(means.index / 1000, means, marker="o", ms=3, lw=3 if name == "PPO" else 1, label=name)
        panel.set(title=f"models {kind}", xlabel="budget [kB]", ylabel="change of test accuracy [points]", xscale="log")
        panel.set_yscale("symlog", linthresh=0.5)
        panel.set_ylim(top=0.2)
        panel.grid(alpha=0.3)
    figure.legend(*panels[0].get_legend_handles_labels(), fontsize=8, loc="outside right upper")
    figure.savefig(path, dpi=120)
