"""Does a learned policy reach the target accuracy of MoEMetaOpt-v0 in fewer decisions than schedules do?

Schedules begin at the random learning rate of each context, or at settings that a search found on validation contexts,
which the policy gets as the rate it begins with. All are judged on the same test contexts, which nothing was chosen by.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from agents.baselines.metaopt import ID, SCHEDULES, Found, Heuristic, RandomActions, Round, Settings, search, trainings
from agents.baselines.metaopt_bound import beam_search
from agents.ppo import PPO
from benchmarks import policies
from benchmarks.results.statistics import mean_interval, paired_difference
from benchmarks.runner import processes as jobs
from cost.files import write_text
from cost.machine import provenance
from experts import profiles, tasks
from moe_envs.metaopt.signals import DECAYS

FIRST_TEST_SEED = 10**6
ROUNDS = (Round(48, 8), Round(12, 32), Round(4, 128))  # 1,280 trainings for each schedule
# 6,784 trainings of 30 decisions for gate and experts apart: as many decisions as a training of PPO has.
GROUP_ROUNDS = (Round(480, 8), Round(60, 32), Round(8, 128))
BY_GROUP, DECAY = "constant, by group", 1e-2  # the weight decay that trainings begin with, AdamW's default
SHOWN = 32  # contexts of the timelines
BEAM, SEARCHED_CONTEXTS = 2, 16
Result = dict[str, Any]


def judge(policy: Any, contexts: int, starts: dict[str, dict[str, Any]], **env_kwargs: Any) -> list[pd.DataFrame]:
    """Trainings on the test contexts, from each start."""
    seeds = range(FIRST_TEST_SEED, FIRST_TEST_SEED + contexts)
    return [
        trainings(policy, seeds, "test", **env_kwargs, **start).assign(start=name) for name, start in starts.items()
    ]


def timelines(policy: Any, contexts: int, starts: dict[str, dict[str, Any]], **env_kwargs: Any) -> pd.DataFrame:
    """What becomes of rates, decays, loss and accuracy, decision by decision, on the first test contexts."""
    found = []
    for name, start in starts.items():
        env = gymnasium.make_vec(ID, contexts, "vector_entry_point", split="test", **env_kwargs, **start)
        if hasattr(policy, "watch"):
            policy.watch(env.unwrapped)
        observation, _ = env.reset(seed=FIRST_TEST_SEED)
        going = np.ones(contexts, dtype=np.bool_)
        while going.any():
            action, _ = policy.predict(observation, deterministic=True)
            observation, _, terminated, _, infos = env.step(action)
            table = {key[5:]: values for key, values in infos.items() if key.startswith("meta/")}
            found.append(pd.DataFrame(table | {"episode": range(contexts)})[going].assign(start=name))
            going &= ~terminated
    return pd.concat(found, ignore_index=True).drop(columns="arrived")


def learnt(env_kwargs: dict[str, Any], seed: int, path: str, contexts: int, starts: Any) -> tuple[Any, Any]:
    """A policy judged, and its timelines."""
    agent = PPO.load(path)
    frame = pd.concat(judge(agent, contexts, starts, **env_kwargs)).assign(policy="PPO", seed=seed)
    return frame, timelines(agent, SHOWN, starts, **env_kwargs).assign(policy="PPO", seed=seed)


def look_ahead(env_kwargs: dict[str, Any], path: str, start: dict[str, Any], contexts: int) -> dict[str, float]:
    """Mean decisions of what a search finds that sees the future, and of the policy it sets out from."""
    agent = PPO.load(path)
    seeds = range(FIRST_TEST_SEED, FIRST_TEST_SEED + contexts)
    steps = trainings(agent, seeds, "test", **env_kwargs, **start)["steps"]
    found = [beam_search(seed, "test", BEAM, agent, **env_kwargs, **start) for seed in seeds]
    best = [len(actions) + (not arrives) for actions, arrives in found]
    return {"contexts": contexts, "searched": float(np.mean(best)), "ppo": float(steps.mean())}


def tune(name: str, groups: bool, rounds: Sequence[Round], env_kwargs: dict[str, Any]) -> Found:
    """A schedule's settings, searched on validation contexts."""
    return search(SCHEDULES[name], groups, rounds, **env_kwargs)


def run(
    task: str, seeds: int, contexts: int, timesteps: int | None, by_group: bool, processes: int, out: Path,
    add_task: Callable[[str], Callable[[float], object]],
) -> Result:  # fmt: skip
    """Search, train, judge; writes results.json, trainings.csv, timelines.csv, two pictures and the policies."""
    env_kwargs: dict[str, Any] = {"task": task} | ({} if task in tasks.SHIPPED else {"costs": "machine"})
    profiles.of_training(tasks.load(task), env_kwargs.get("costs", "reference"), np.array([8]), 1, 64)  # measured once
    with jobs.pool(processes) as pool:
        searches = {BY_GROUP: pool.submit(tune, "constant", True, GROUP_ROUNDS, env_kwargs)} if by_group else {}
        searches |= {name: pool.submit(tune, name, False, ROUNDS, env_kwargs) for name in SCHEDULES}
        results = jobs.gather(searches.values(), add_task("searching the schedules' settings"))
        found: dict[str, Found] = dict(zip(searches, results, strict=True))
        rate = float(found["constant"].settings.rates.mean())
        starts = {name: {"initial_decay": DECAY} for name in ("random rate", "tuned rate")}
        starts["tuned rate"] |= {"initial_rate": rate}
        learning = [
            pool.submit(policies.learn, env_kwargs, seed, timesteps, out / "policies" / f"{task}-{seed}")
            for seed in range(seeds)
        ]
        learned = jobs.gather(learning, add_task(f"{seeds} trainings of PPO"))
        judged = [
            pool.submit(learnt, env_kwargs, seed, each["path"], contexts, starts) for seed, each in enumerate(learned)
        ]
        judged += [pool.submit(_baseline, *each, contexts, env_kwargs) for each in _baselines(found, starts)]
        tables = jobs.gather(judged, add_task("judging them"))
        few = min(contexts, SEARCHED_CONTEXTS)
        searching = [pool.submit(look_ahead, env_kwargs, learned[0]["path"], start, few) for start in starts.values()]
        searched = jobs.gather(searching, add_task("searching with the future known"))
    frame, lines = (pd.concat(part, ignore_index=True) for part in zip(*tables, strict=True))
    settings = {
        name: {
            "rates": each.settings.rates.tolist(),
            "decays": DECAYS[each.settings.ladder].tolist(),
            "validation_steps": each.steps,
            "decisions": each.decisions,
        }
        for name, each in found.items()
    }
    result: Result = {
        "task": task, "rate": rate, "settings": settings, "rows": summarise(frame),
        "searched": dict(zip(starts, searched, strict=True)), "policies": learned,
        **provenance(),
    }  # fmt: skip
    frame.to_csv(out / "trainings.csv", index=False)
    lines.to_csv(out / "timelines.csv", index=False)
    write_text(out / "results.json", json.dumps(result, indent=1))
    _draw(frame, out / "steps.png")
    _draw_timelines(lines, out / "timelines.png")
    return result


def _baselines(found: dict[str, Found], starts: Any) -> list[tuple[str, str, Settings | None, Any]]:
    """Names, those of the policies, their settings, starts."""
    random, given = ({name: starts[name]} for name in ("random rate", "tuned rate"))
    todo: list[tuple[str, str, Settings | None, Any]] = [(name, name, None, random) for name in SCHEDULES]
    todo += [("random actions", "random actions", None, random), ("rules", "rules", None, random)]
    todo += [("rules", "rules", None, given)]
    return todo + [(name, name.split(",")[0], each.settings, given) for name, each in found.items()]


def _baseline(
    name: str, kind: str, settings: Settings | None, start: Any, contexts: int, env_kwargs: dict[str, Any]
) -> tuple[pd.DataFrame, pd.DataFrame]:
    others: dict[str, Callable[[], Any]] = {"random actions": RandomActions, "rules": Heuristic}
    policy = others[kind]() if kind in others else SCHEDULES[kind](settings)
    frame = pd.concat(judge(policy, contexts, start, **env_kwargs)).assign(policy=name, seed=0)
    return frame, timelines(policy, SHOWN, start, **env_kwargs).assign(policy=name, seed=0)


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
            shares = [(part["arrived"] & (part["steps"] <= step)).mean() for step in steps]
            panel.plot(steps, shares, label=name, lw=3 if name == "PPO" else 1)
        panel.set(title=f"from the {start}", xlabel="decisions", ylabel="share at the target")
        panel.grid(alpha=0.3)
        panel.legend(fontsize=8)
    figure.savefig(path, dpi=120)


def _draw_timelines(timelines: pd.DataFrame, path: Path) -> None:
    """Medians over contexts and seeds of rates, decays and validation loss, decision by decision; a training that has
    arrived keeps its last values."""
    columns = {
        "experts_rate": "learning rate, experts", "gate_rate": "learning rate, gate",
        "experts_decay": "weight decay, experts", "gate_decay": "weight decay, gate",
        "validation_loss": "validation loss",
    }  # fmt: skip
    figure = Figure((18, 6.4), layout="constrained")
    groups = timelines.groupby("start", sort=False)
    for panels, (start, group) in zip(figure.subplots(2, len(columns)), groups, strict=True):
        for panel, (column, title) in zip(panels, columns.items(), strict=True):
            for name, part in group.groupby("policy", sort=False):
                lines = part.pivot_table(index=["seed", "episode"], columns="actions", values=column)
                middle = lines.ffill(axis=1).median()
                panel.plot(middle.index, middle, label=name, lw=3 if name == "PPO" else 1)
            panel.set(title=title, xlabel="decisions")
            panel.set_yscale(
                "symlog" if "decay" in column else "log", **({"linthresh": 1e-3} if "decay" in column else {})
            )
            panel.grid(alpha=0.3)
        panels[0].set_ylabel(f"from the {start}")
        panels[0].legend(fontsize=7)
    figure.savefig(path, dpi=110)
