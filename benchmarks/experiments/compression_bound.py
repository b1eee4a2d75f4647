"""How far are searches, and PPO, from the best of all plans?

On a small model whose experts share their levels every plan can be scored. Quality is that of the images which plans
are chosen by; what the best of all is worth on the test images stands beside it.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from agents.baselines import compression as baselines
from agents.deploy.compression import levels_of
from agents.ppo import PPO
from benchmarks import policies
from benchmarks.experiments.compression import BASELINES, ID, SEARCHES, find, prepare
from benchmarks.runner import processes as jobs
from cost.files import write_text
from cost.machine import provenance
from moe_envs.compression.env import SHARES as SHARES_DRAWN
from moe_envs.compression.tables import CompressionTables

TIMES_LEAST = 1.3, 1.6, 2.0, 2.5, 3.5, 5.0  # budgets, of the smallest plan
MOST_PLANS = 200_000
Result = dict[str, Any]


def run(
    model: str, seeds: int, timesteps: int, evaluations: int, processes: int, out: Path,
    add_task: Callable[[str], Callable[[float], object]],
) -> Result:  # fmt: skip
    """Score all plans, search, train PPO; writes results.json, bound.png and the policies."""
    tables, test = (CompressionTables((model,), split, "layer", "accuracy and loss", "reference")
                    for split in ("train", "test"))  # fmt: skip
    plans = baselines.all_plans(tables.sizes)
    if len(plans) > MOST_PLANS:
        raise ValueError(
            f"{model} has {len(plans):,} plans; all of them are scored, so that {MOST_PLANS:,} is the most"
        )
    budgets = budgets_of(tables)
    with jobs.pool(processes) as pool:
        learning = [
            pool.submit(
                policies.learn, {"model": [model], "granularity": "layer"}, seed, timesteps,
                out / "policies" / str(seed), ID, prepare, shares=SHARES_DRAWN, warm=0.6, masks=True,
            )
            for seed in range(seeds)
        ]  # fmt: skip
        learned = jobs.gather(learning, add_task(f"{seeds} trainings of PPO"))
    quality = _scores(tables, plans, add_task(f"{len(plans):,} plans"))
    agents = [PPO.load(each["path"]) for each in learned]
    walks = [levels_of(agent, model, budgets) for agent in agents]
    drawn = [levels_of(agent, model, budgets, deterministic=False, repeats=evaluations - 1) for agent in agents]
    sizes, rows = tables.sizes, list[Result]()
    for number, budget in enumerate(budgets):
        room = budget - tables.overhead
        fitting = np.take_along_axis(sizes.T, plans, axis=0).sum(1) <= room
        found = {"best of all": [plans[np.where(fitting, quality, -np.inf).argmax()]]} | {
            name: [find(name, tables, room, evaluations, seed) for seed in range(seeds if name in SEARCHES else 1)]
            for name in BASELINES
        }
        found |= {
            "PPO": [walk[number, 0] for walk in walks],
            f"PPO, best of {evaluations}": [
                _best(tables, np.concatenate([walk[number], draw[number]]))
                for walk, draw in zip(walks, drawn, strict=True)
            ],
        }  # fmt: skip
        bound = float(quality[fitting].max())
        for policy, levels in found.items():
            own, points = _scores(tables, np.stack(levels)), 100 * _changes(test, np.stack(levels))
            rows.append({
                "budget": budget, "policy": policy, "quality": float(own.mean()), "behind": bound - float(own.mean()),
                "most": bound - float(own.min()), "points": float(points.mean()), "runs": len(levels),
            })  # fmt: skip
    result: Result = {
        "model": model, "plans": len(plans), "evaluations": evaluations, "rows": rows, "policies": learned,
        **provenance(),
    }  # fmt: skip
    write_text(out / "results.json", json.dumps(result, indent=1))
    _draw(rows, out / "bound.png")
    return result


def budgets_of(tables: CompressionTables) -> list[int]:
    """The budgets in bytes that plans of a small model are compared at."""
    return [round(times * (tables.overhead + int(tables.least[0]))) for times in TIMES_LEAST]


def _scores(
    tables: CompressionTables, plans: np.ndarray, progress: Callable[[float], object] = lambda share: None
) -> np.ndarray:
    parts = np.array_split(plans, max(1, len(plans) // 500))
    found = []
    for number, part in enumerate(parts):
        found.append(tables.quality(np.zeros(len(part), dtype=np.int64), part)[0])
        progress((number + 1) / len(parts))
    return np.concatenate(found)


def _best(tables: CompressionTables, plans: np.ndarray) -> np.ndarray:
    return np.asarray(plans[_scores(tables, plans).argmax()])


def _changes(tables: CompressionTables, plans: np.ndarray) -> np.ndarray:
    return tables.quality(np.zeros(len(plans), dtype=np.int64), plans)[1]


def _draw(rows: list[Result], path: Path) -> None:
    figure = Figure((9, 4.5), layout="constrained")
    panel = figure.subplots()
    for name in dict.fromkeys(row["policy"] for row in rows):
        part = [row for row in rows if row["policy"] == name]
        kilobytes, behind = [row["budget"] / 1000 for row in part], [row["behind"] for row in part]
        panel.plot(kilobytes, behind, marker="o", ms=3, lw=3 if name == "PPO" else 1, label=name)
    panel.set(xlabel="budget [kB]", ylabel="quality behind the best of all plans", xscale="log")
    panel.set_yscale("symlog", linthresh=0.02)
    panel.set_ylim(bottom=0)
    panel.grid(alpha=0.3)
    figure.legend(fontsize=8, loc="outside right upper")
    figure.savefig(path, dpi=120)
