"""Does a learned router earn its keep? PPO on MoERouting-v0 against every baseline and the exact bound, on test data.

Learners train on `rl_train`; their weights, every baseline's parameters and the best baseline are chosen on
`validation`; all figures are of `test`, of episodes that are the same for every policy.
"""

from __future__ import annotations

import json
import multiprocessing
from collections.abc import Callable
from concurrent.futures import FIRST_EXCEPTION, ProcessPoolExecutor, wait
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from agents import runs, tuned
from benchmarks.results import pareto
from benchmarks.results import tables as report
from benchmarks.results.statistics import paired_difference
from cost.files import write_text
from cost.machine import provenance

ENV = "moe_envs:MoERouting-v0"
EPISODES = {"validation": 1000, "test": 2000}
EPISODE_SEED = 10_000

Result = dict[str, Any]
Returns = dict[str, np.ndarray]  # split -> return of each episode


def run(
    cost_weights: list[float],
    seeds: list[int],
    out: Path,
    *,
    bundle: str = "fashion-mnist",
    costs: str = "reference",
    action: str = "expert",
    jobs: int = 2,
    timesteps: int | None = None,
    add_task: Callable[[str], Callable[[float], object]] = lambda description: lambda share: None,
) -> Result:
    """Train and compare in `jobs` processes; writes results.json and pareto.png into `out`, run folders below it.

    Trainings that an earlier, interrupted call finished there, by the same commit and settings, are not repeated.
    """
    from experts import profiles

    fixed = {"bundle": bundle, "costs": costs, "action": action}
    profiles.prepare(bundle, costs)
    learners = [(weight, seed, fixed | {"cost_weight": weight}) for weight in cost_weights for seed in seeds]
    context = multiprocessing.get_context("spawn")
    with context.Manager() as manager, ProcessPoolExecutor(jobs, mp_context=context) as pool:
        shares = manager.dict()
        trainings = [
            pool.submit(_learned, index, kwargs, seed, out / f"ppo-{weight:g}-seed{seed}", timesteps, shares)
            for index, (weight, seed, kwargs) in enumerate(learners)
        ]
        groups = [cost_weights[start::jobs] for start in range(min(jobs, len(cost_weights)))]
        rules = [pool.submit(_baselines, fixed, group) for group in groups]
        names = [f"PPO, cost weight {weight:g}, seed {seed}" for weight, seed, _ in learners]
        names += [f"baselines, cost weights {', '.join(f'{weight:g}' for weight in group)}" for group in groups]
        _watch(pool, [*trainings, *rules], shares, [add_task(name) for name in names])
        scored = [item for future in (*trainings, *rules) for item in future.result()]
    result: Result = {"rows": [row for row, _ in scored], "summary": summarise(scored, cost_weights)}
    result |= {"settings": fixed | {"seeds": seeds, "episodes": EPISODES}, **provenance()}
    write_text(out / "results.json", json.dumps(result, indent=1))
    pareto.plot(pd.DataFrame(result["rows"]), out / "pareto.png", f"MoERouting-v0, {bundle}, test, costs: {costs}")
    return result


def summarise(scored: list[tuple[dict[str, Any], Returns]], cost_weights: list[float]) -> list[dict[str, Any]]:
    """For each cost weight: the baseline best on validation, the paired difference, and the share of the way from
    that baseline to the bound; marks the chosen baseline's row."""
    summary = []
    for weight in cost_weights:
        here = [item for item in scored if item[0]["cost_weight"] == weight]
        best = max((i for i in here if i[0]["kind"] == "baseline"), key=lambda item: item[1]["validation"].mean())
        bound = next(item for item in here if item[0]["kind"] == "bound")
        ours = np.stack([returns["test"] for row, returns in here if row["kind"] == "learned"])
        best[0]["chosen"] = True
        difference, interval = paired_difference(ours, best[1]["test"])
        gap = float(bound[1]["test"].mean() - best[1]["test"].mean())
        strongest = max((i for i in here if i[0]["kind"] == "baseline"), key=lambda item: item[1]["test"].mean())
        summary.append(
            {
                "cost_weight": weight,
                "ppo": float(ours.mean()),
                "best_baseline": best[0]["policy"],
                "best_baseline_return": best[0]["return"],
                "difference": difference,
                "ci95": list(interval),
                "seeds_above": int((ours.mean(1) > best[1]["test"].mean()).sum()),
                "seeds": len(ours),
                "bound": bound[0]["return"],
                "share_of_way_to_bound": difference / gap,
                "best_on_test_in_hindsight": strongest[0]["policy"],
                "best_on_test_in_hindsight_return": strongest[0]["return"],
            }
        )
    return summary


def tables(result: Result) -> list[Any]:
    """What to print: all policies for each cost weight, then the summary, then hypervolumes."""
    rows = result["rows"]
    weights = sorted({row["cost_weight"] for row in rows})
    drawn: list[Any] = [
        report.table(
            [r for r in rows if r["cost_weight"] == weight], f"cost weight {weight:g}, test (* best on validation)"
        )
        for weight in weights
    ]
    one = ", one training seed" if result["summary"][0]["seeds"] == 1 else ""
    columns = ("λ", "PPO", "best baseline", "gain", "95 %", "seeds", "way")
    summary = report.plain_table(f"PPO less the baseline best on validation, on test{one}", *columns)
    for entry in result["summary"]:
        low, high = entry["ci95"]
        summary.add_row(
            f"{entry['cost_weight']:g}",
            f"{entry['ppo']:.4f}",
            entry["best_baseline"],
            f"{entry['difference']:+.4f}",
            f"{low:+.3f} .. {high:+.3f}",
            f"{entry['seeds_above']}/{entry['seeds']}",
            f"{entry['share_of_way_to_bound']:.1%}",
        )
    hindsight = ", ".join(
        f"λ={e['cost_weight']:g} {e['best_on_test_in_hindsight']} {e['best_on_test_in_hindsight_return']:.4f}"
        for e in result["summary"]
    )
    return [*drawn, summary, f"best baseline on test in hindsight: {hindsight}", _hypervolumes(rows)]


def _hypervolumes(rows: list[dict[str, Any]]) -> str:
    volumes = {
        kind: pareto.hypervolume(
            np.array([[r["cost"], r["quality"]] for r in rows if r["kind"] == kind]), "MoERouting-v0"
        )
        for kind in ("learned", "baseline", "bound")
    }
    return "hypervolume of (cost, accuracy): " + ", ".join(f"{kind} {volume:.4f}" for kind, volume in volumes.items())


def _learned(
    index: int, env_kwargs: dict[str, Any], seed: int, folder: Path, timesteps: int | None, shares: Any
) -> list[tuple[dict[str, Any], Returns]]:
    overrides: dict[str, Any] = {} if timesteps is None else {"total_timesteps": timesteps}
    wanted = {"env": ENV, "env_kwargs": env_kwargs, "algo": "ppo", "seed": seed}
    if runs.finished(folder, wanted | {"settings": tuned.settings("ppo", ENV, **overrides)}):
        return [_score(runs.load(folder)[0], "PPO", "learned", seed, env_kwargs)]
    report = lambda share: shares.update({index: share})  # noqa: E731
    model = runs.train(ENV, "ppo", seed, folder, env_kwargs, overrides, report, overwrite=True)
    return [_score(model, "PPO", "learned", seed, env_kwargs)]


def _baselines(fixed: dict[str, Any], cost_weights: list[float]) -> list[tuple[dict[str, Any], Returns]]:
    import torch

    from agents.baselines.routing import Problem, baselines, fit_scorers

    torch.set_num_threads(1)
    scorers, scored = fit_scorers(Problem(ENV, **fixed)), []
    for weight in cost_weights:
        env_kwargs = fixed | {"cost_weight": weight}
        tuned = baselines(ENV, scorers, **env_kwargs)
        scored += [_score(policy, name, policy.kind, 0, env_kwargs) for name, policy in tuned.items()]
    return scored


def _score(policy: Any, name: str, kind: str, seed: int, env_kwargs: dict[str, Any]) -> tuple[dict[str, Any], Returns]:
    from agents.evaluate import evaluate

    frames = {
        split: evaluate(policy, ENV, episodes, EPISODE_SEED, **env_kwargs, split=split)
        for split, episodes in EPISODES.items()
    }
    row = report.row(frames["test"], ENV, name, kind, seed=seed, **env_kwargs, split="test")
    return row, {split: frame["return"].to_numpy() for split, frame in frames.items()}


def _watch(
    pool: ProcessPoolExecutor, futures: list[Any], shares: Any, reports: list[Callable[[float], object]]
) -> None:
    """Draw the progress until all is done; the first failure ends all and is raised."""
    pending: set[Any] = set(futures)
    while pending:
        done, pending = wait(pending, timeout=1, return_when=FIRST_EXCEPTION)
        if failed := next((future for future in done if future.exception()), None):
            pool.shutdown(wait=False, cancel_futures=True)
            for process in multiprocessing.active_children():
                process.terminate()
            failed.result()
        for index, (future, report_share) in enumerate(zip(futures, reports, strict=True)):
            report_share(1.0 if future.done() else shares.get(index, 0.0))
