"""Does a learned policy reach the target accuracy of MoEMetaOpt-v0 in fewer decisions than schedules do?

Schedules begin at the random learning rate of each context, or at settings that a search found on validation contexts,
which the policy gets as the rate it begins with. All are judged on the same test contexts, which nothing was chosen by.
"""

from __future__ import annotations

import json
import multiprocessing
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from agents import tuned
from agents.yardsticks.metaopt import ID, SCHEDULES, Heuristic, RandomActions, Round, Settings, search, trainings
from benchmarks import backends, runs
from benchmarks.statistics import mean_interval, paired_difference
from cost.files import write_text
from moe_envs.metaopt_signals import DECAYS

FIRST_TEST_SEED = 10**6
ROUNDS = (Round(48, 8), Round(12, 32), Round(4, 128))  # 1,280 trainings for each schedule
GROUP_ROUNDS = (Round(300, 8), Round(40, 32), Round(8, 128))  # 4,704, for gate and experts apart
Result = dict[str, Any]


def learn(env_kwargs: dict[str, Any], seed: int, timesteps: int | None) -> tuple[Any, float]:
    """A policy trained on the split `train` with the tuned settings, and its CPU seconds."""
    import torch

    torch.set_num_threads(1)
    settings = tuned.settings("ppo", ID, "own", **({"total_timesteps": timesteps} if timesteps else {}))
    begun = time.process_time()
    agent = backends.make(ID, "ppo", "own", env_kwargs, seed, settings)
    agent.learn(settings["total_timesteps"])
    return agent, time.process_time() - begun


def judge(policy: Any, contexts: int, starts: dict[str, dict[str, Any]], **env_kwargs: Any) -> list[pd.DataFrame]:
    """Trainings on the test contexts, from each start."""
    seeds = range(FIRST_TEST_SEED, FIRST_TEST_SEED + contexts)
    return [
        trainings(policy, seeds, "test", **env_kwargs, **start).assign(start=name) for name, start in starts.items()
    ]


def learnt(env_kwargs: dict[str, Any], seed: int, timesteps: int | None, contexts: int, starts: Any) -> pd.DataFrame:
    """One training of a policy, judged."""
    agent, seconds = learn(env_kwargs, seed, timesteps)
    return pd.concat(judge(agent, contexts, starts, **env_kwargs)).assign(policy="PPO", seed=seed, seconds=seconds)


def tune(name: str, groups: bool, rounds: Sequence[Round], env_kwargs: dict[str, Any]) -> tuple[Settings, float]:
    """A schedule's settings, and its mean steps on the last round's validation contexts."""
    return search(SCHEDULES[name], groups, rounds, **env_kwargs)


def run(
    task: str, seeds: int, contexts: int, timesteps: int | None, jobs: int, out: Path,
    add_task: Callable[[str], Callable[[float], object]],
) -> Result:  # fmt: skip
    """Search, train, judge; writes results.json, trainings.csv and steps.png."""
    env_kwargs = {"task": task}
    found: dict[str, tuple[Settings, float]] = {}
    with ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn")) as pool:
        report = add_task("searching the schedules' settings")
        searches = {name: pool.submit(tune, name, False, ROUNDS, env_kwargs) for name in SCHEDULES}
        searches["constant, by group"] = pool.submit(tune, "constant", True, GROUP_ROUNDS, env_kwargs)
        for number, (name, search_of) in enumerate(searches.items()):
            found[name] = search_of.result()
            report((number + 1) / len(searches))
        rate = float(found["constant"][0].rates.mean())
        starts: dict[str, Any] = {"random rate": {}, "tuned rate": {"initial_rate": rate}}
        report = add_task(f"{seeds} trainings of PPO")
        futures = [pool.submit(learnt, env_kwargs, seed, timesteps, contexts, starts) for seed in range(seeds)]
        frames = []
        for number, future in enumerate(futures):
            frames.append(future.result())
            report((number + 1) / seeds)
    frames += _yardsticks(found, contexts, starts, env_kwargs, add_task("judging the schedules"))
    frame = pd.concat(frames, ignore_index=True)
    settings = {
        name: {"rates": best.rates.tolist(), "decays": DECAYS[best.ladder].tolist(), "validation_steps": steps}
        for name, (best, steps) in found.items()
    }
    result: Result = {"task": task, "rate": rate, "settings": settings, "rows": summarise(frame), **runs.provenance()}
    out.mkdir(parents=True, exist_ok=True)
    frame.to_csv(out / "trainings.csv", index=False)
    write_text(out / "results.json", json.dumps(result, indent=1))
    _draw(frame, out / "steps.png")
    return result


def _yardsticks(
    found: dict[str, tuple[Settings, float]],
    contexts: int,
    starts: Any,
    env_kwargs: dict[str, Any],
    report: Callable[[float], object],
) -> list[pd.DataFrame]:
    random, given = {"random rate": starts["random rate"]}, {"tuned rate": starts["tuned rate"]}
    tuned_rate: dict[str, Any] = {"tuned rate": {}}  # the schedules set their own
    todo: list[tuple[str, Any, dict[str, Any]]] = [(name, make(None), random) for name, make in SCHEDULES.items()]
    todo += [("random actions", RandomActions(), random), ("rules", Heuristic(), random), ("rules", Heuristic(), given)]
    todo += [(name, SCHEDULES[name.split(",")[0]](best), tuned_rate) for name, (best, _) in found.items()]
    frames = []
    for number, (name, policy, start) in enumerate(todo):
        frames += [frame.assign(policy=name, seed=0) for frame in judge(policy, contexts, start, **env_kwargs)]
        report((number + 1) / len(todo))
    return frames


def summarise(frame: pd.DataFrame) -> list[Result]:
    """For each start and policy: mean steps with a 95 % interval, share that arrived, and PPO's steps less its own."""
    rows = []
    for start, group in frame.groupby("start", sort=False):
        tables = {
            name: part.pivot(index="seed", columns="episode", values="steps").to_numpy()
            for name, part in group.groupby("policy", sort=False)
        }
        for name, table in tables.items():
            row: Result = {"start": start, "policy": name, "steps": float(table.mean()), "seeds": len(table)}
            row |= {"ci95": mean_interval(table), "arrived": float(group[group["policy"] == name]["arrived"].mean())}
            if name != "PPO":
                difference, interval = paired_difference(tables["PPO"], table[0])
                row |= {"ppo_less": difference, "ppo_less_ci95": interval, "share": difference / row["steps"]}
            rows.append(row)
    return rows


def _draw(frame: pd.DataFrame, path: Path) -> None:
    """The share of trainings that have arrived after so many decisions."""
    figure = Figure((12, 4.5), layout="constrained")
    for panel, (start, group) in zip(figure.subplots(1, 2), frame.groupby("start", sort=False), strict=True):
        for name, part in group.groupby("policy", sort=False):
            steps = np.arange(1, int(frame["steps"].max()) + 1)
            shares = [(part["steps"] <= step).mean() for step in steps]
            panel.plot(steps, shares, label=name, lw=3 if name == "PPO" else 1)
        panel.set(title=f"from the {start}", xlabel="decisions", ylabel="share at the target")
        panel.grid(alpha=0.3)
        panel.legend(fontsize=8)
    figure.savefig(path, dpi=120)
