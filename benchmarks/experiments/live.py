"""How well does a policy trained on profiled costs perform when the experts are executed and timed?

PPO is trained and the baselines are tuned on this machine's profile. All policies are then evaluated on the same test
batches with profiled and with live costs, in alternating blocks. Run it with one job on an otherwise idle machine.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from agents import training, tuned
from agents.evaluate import evaluate
from benchmarks.results.statistics import mean_interval, paired_difference
from benchmarks.runner.setup import Arguments

PROFILED, LIVE = "moe_envs:MoERouting-v0", "moe_envs:MoERoutingLive-v0"
COLUMNS = {"return": "return", "quality": "quality", "cost/time": "time"}
FIRST_SEED = 10_000
SEEDS = (0, 1, 2, 3, 4)
SETTINGS = {"PPO": {"policy": "PPO"}, "baselines": {"policy": "baselines"}}
QUICK = {"seeds": [0], "settings": {"bundle": "digits", "timesteps": 4096, "blocks": 2, "episodes": 20, "tuning": 20}}


class LiveSetup(Arguments):
    """`blocks` of `episodes` each; `tuning` validation episodes select the parameters of each baseline."""

    policy: str
    bundle: str = "fashion-mnist"
    cost_weight: float = 0.2
    timesteps: int | None = None
    blocks: int = 5
    episodes: int = 200
    tuning: int = 1000


Setup = LiveSetup


def once(setup: LiveSetup) -> bool:
    """True for baselines: they are tuned once."""
    return setup.policy == "baselines"


def measure(setup: LiveSetup, seed: int, split: str, folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Returns, accuracies and times per episode, policy and cost source."""
    from agents.baselines import routing

    kwargs: dict[str, Any] = {"bundle": setup.bundle, "cost_weight": setup.cost_weight}
    if setup.policy == "baselines":
        policies = routing.baselines(PROFILED, episodes=setup.tuning, **kwargs, costs="machine")
        policies.pop("random")
    else:
        settings = tuned.settings("ppo", PROFILED)
        settings |= {"total_timesteps": setup.timesteps} if setup.timesteps else {}
        machine = {**kwargs, "costs": "machine"}
        policies = {"PPO": training.train(PROFILED, seed=seed, env_kwargs=machine, settings=settings).agent}
    found: dict[str, dict[str, dict[str, list[float]]]] = {}
    for block in range(setup.blocks):
        for name, policy in policies.items():
            for costs, env in (("machine", PROFILED), ("live", LIVE)):
                own = {**kwargs, "costs": costs, "split": "test"}
                played = evaluate(policy, env, setup.episodes, FIRST_SEED + 1000 * block, **own)
                of = found.setdefault(name, {}).setdefault(costs, {key: [] for key in COLUMNS.values()})
                for column, key in COLUMNS.items():
                    of[key] += played[column].round(9).tolist()
    return {}, {"played": found}


def score(frame: pd.DataFrame) -> dict[str, Any]:
    """Returns per policy under both costs, their paired difference, and PPO minus the best baseline."""
    tables: dict[str, dict[str, dict[str, list[list[float]]]]] = {}
    for played in frame["played"]:
        for name, costs in played.items():
            for which, columns in costs.items():
                for key, values in columns.items():
                    tables.setdefault(name, {}).setdefault(which, {}).setdefault(key, []).append(values)
    rows: list[dict[str, Any]] = []
    for name, of in tables.items():
        live, machine = (np.array(of[costs]["return"]) for costs in ("live", "machine"))
        seconds, expected = (np.array(of[costs]["time"]) for costs in ("live", "machine"))
        rows.append({
            "policy": name, "kind": "learned" if name == "PPO" else "baseline", "profiled": float(machine.mean()),
            "live": float(live.mean()), "live less profiled": float((live - machine).mean()),
            "95 %": mean_interval(live - machine), "accuracy": float(np.mean(of["live"]["quality"])),
            "time, live / profiled": float(seconds.mean() / expected.mean()),
        })  # fmt: skip
    rows.sort(key=lambda row: -row["live"])
    result: dict[str, Any] = {"tables": {"Returns on test": rows}}
    rules = [row for row in rows if row["kind"] == "baseline"]
    if "PPO" in tables and rules:
        best = max(rules, key=lambda row: row["profiled"])["policy"]
        gains = []
        for costs in ("machine", "live"):
            ours, theirs = (np.array(tables[name][costs]["return"]) for name in ("PPO", best))
            difference, interval = paired_difference(ours, theirs[0])
            gains.append({"paid by": {"machine": "profile", "live": "live costs"}[costs], "difference": difference,
                          "95 %": interval})  # fmt: skip
        result["tables"][f"PPO less {best}, the best baseline under the profile, on test"] = gains
    return result


def plot(frame: pd.DataFrame, result: dict[str, Any], out: Path) -> list[str]:
    """Plot the returns under both costs."""
    from matplotlib.figure import Figure

    rows = sorted(result["tables"]["Returns on test"], key=lambda row: row["live"])
    figure = Figure((8, 0.35 * len(rows) + 1.2), layout="constrained")
    panel = figure.subplots()
    places = np.arange(len(rows))
    panel.barh(places - 0.2, [row["profiled"] for row in rows], 0.4, label="profiled costs")
    panel.barh(places + 0.2, [row["live"] for row in rows], 0.4, label="live costs")
    panel.set_yticks(places, [row["policy"] for row in rows], fontsize="small")
    panel.set(xlabel="mean return on test")
    panel.legend()
    figure.savefig(out / "live.png", dpi=120)
    return ["live.png"]
