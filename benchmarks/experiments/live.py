"""What is a policy that was trained on profiled costs worth when the experts are really run and timed?

PPO is trained and the baselines are tuned on this machine's profile, as in `routing`; then all of them play the same
test batches twice, paid by the profile and paid live, in blocks by turns, with nothing else running.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from agents import runs
from benchmarks.experiments import routing
from benchmarks.results import tables as report
from benchmarks.results.statistics import mean_interval, paired_difference
from cost.files import write_text
from cost.machine import provenance

LIVE_ENV = "moe_envs:MoERoutingLive-v0"
BLOCKS, EPISODES_A_BLOCK = 5, 200
Result = dict[str, Any]


def run(
    cost_weight: float,
    seeds: list[int],
    out: Path,
    *,
    bundle: str = "fashion-mnist",
    jobs: int = 2,
    timesteps: int | None = None,
    add_task: Callable[[str], Callable[[float], object]] = lambda description: lambda share: None,
) -> Result:
    """Train as `routing` does with costs="machine", then play under both costs; writes live.json and live.png."""
    trained = routing.run(
        [cost_weight], seeds, out, bundle=bundle, costs="machine", jobs=jobs, timesteps=timesteps, add_task=add_task
    )
    arguments = {"bundle": bundle, "cost_weight": cost_weight}
    frame = _play(_policies(cost_weight, seeds, out, arguments), arguments, add_task("playing under both costs"))
    result: Result = {"rows": summarise(frame), "cost_weight": cost_weight, "seeds": seeds, "bundle": bundle}
    result["episodes"] = BLOCKS * EPISODES_A_BLOCK
    result["ppo_less_best_baseline"] = compare(frame, trained["summary"][0]["best_baseline"])
    result |= provenance()
    write_text(out / "live.json", json.dumps(result, indent=1))
    frame.to_csv(out / "live.csv", index=False)
    plot(frame, out / "live.png")
    return result


def summarise(frame: pd.DataFrame) -> list[dict[str, Any]]:
    """For each policy: its returns under both costs, their paired difference, and the time live over profiled."""
    rows = []
    for name, group in frame.groupby("policy", sort=False):
        live, profiled = (_table(group, costs, "return") for costs in ("live", "machine"))
        seconds, expected = (_table(group, costs, "cost/time") for costs in ("live", "machine"))
        rows.append(
            {
                "policy": name,
                "kind": group["kind"].iloc[0],
                "machine": float(profiled.mean()),
                "live": float(live.mean()),
                "live_ci95": list(mean_interval(live)),
                "difference": float((live - profiled).mean()),
                "difference_ci95": list(mean_interval(live - profiled)),
                "time_ratio_of_means": float(seconds.mean() / expected.mean()),
                "time_ratio_median": float(np.median(seconds / expected)),
                "accuracy": float(group["quality"].mean()),
            }
        )
    return sorted(rows, key=lambda row: -row["live"])


def compare(frame: pd.DataFrame, baseline: str) -> dict[str, Any]:
    """PPO less the baseline that was best on validation under the profile, under either cost."""
    found: dict[str, Any] = {"baseline": baseline}
    for costs in ("machine", "live"):
        ours, theirs = (_table(frame[frame["policy"] == name], costs, "return") for name in ("PPO", baseline))
        difference, interval = paired_difference(ours, theirs[0])
        found[costs] = {"difference": difference, "ci95": list(interval)}
    return found


def tables(result: Result) -> list[Any]:
    """What to print."""
    columns = ("policy", "machine", "live", "live - machine, 95 %", "time")
    title = f"return by costs, test, cost weight {result['cost_weight']:g}; time: live / profiled"
    drawn = report.plain_table(title, *columns)
    for row in result["rows"]:
        low, high = row["difference_ci95"]
        difference = f"{row['difference']:+.4f} ({low:+.4f} .. {high:+.4f})"
        figures = f"{row['machine']:.4f}", f"{row['live']:.4f}", difference, f"{row['time_ratio_of_means']:.2f}"
        drawn.add_row(row["policy"], *figures, style=report.STYLES[row["kind"]])
    gains = result["ppo_less_best_baseline"]
    lines = [
        f"PPO less {gains['baseline']}, {costs}: {gains[costs]['difference']:+.4f} "
        f"({gains[costs]['ci95'][0]:+.4f} .. {gains[costs]['ci95'][1]:+.4f})"
        for costs in ("machine", "live")
    ]
    return [drawn, *lines]


def plot(frame: pd.DataFrame, path: Path) -> None:
    """The times of batches, live against profiled, and the returns under both costs."""
    from matplotlib.figure import Figure

    figure = Figure((11, 4.5), layout="constrained")
    left, right = figure.subplots(1, 2)
    for costs in ("machine", "live"):
        seconds = frame[(frame["costs"] == costs) & (frame["policy"] == "PPO")]["cost/time"] * 1e6
        left.hist(np.minimum(seconds, seconds.quantile(0.99)), bins=60, alpha=0.6, label=costs)
    left.set(xlabel="time of a batch under PPO, µs (clipped at P99)", ylabel="batches")
    left.legend()
    means = frame.groupby(["policy", "costs"])["return"].mean().unstack().sort_values("live")
    right.barh(np.arange(len(means)) - 0.2, means["machine"], 0.4, label="machine")
    right.barh(np.arange(len(means)) + 0.2, means["live"], 0.4, label="live")
    right.set_yticks(np.arange(len(means)), means.index, fontsize="small")
    right.set(xlabel="mean return on test", xlim=(min(0.0, float(means.min().min())), 1))
    right.legend()
    figure.savefig(path, dpi=120)


def _policies(
    cost_weight: float, seeds: list[int], out: Path, arguments: dict[str, Any]
) -> list[tuple[str, str, int, Any]]:
    from agents.baselines.routing import baselines

    learned = [("PPO", "learned", seed, runs.load(out / f"ppo-{cost_weight:g}-seed{seed}")[0]) for seed in seeds]
    tuned = baselines(routing.ENV, **arguments, costs="machine")
    return [*learned, *((name, policy.kind, 0, policy) for name, policy in tuned.items() if name != "random")]


def _play(
    policies: list[tuple[str, str, int, Any]], arguments: dict[str, Any], progress: Callable[[float], object]
) -> pd.DataFrame:
    from agents.evaluate import evaluate

    frames = []
    for block in range(BLOCKS):
        for index, (name, kind, seed, policy) in enumerate(policies):
            for costs, env in (("machine", routing.ENV), ("live", LIVE_ENV)):
                own = {**arguments, "costs": costs, "split": "test"}
                played = evaluate(policy, env, EPISODES_A_BLOCK, routing.EPISODE_SEED + 1000 * block, **own)
                columns = played[["return", "quality", "cost", "cost/time"]]
                frames.append(columns.assign(policy=name, kind=kind, seed=seed, costs=costs, block=block))
            progress((block + (index + 1) / len(policies)) / BLOCKS)
    return pd.concat(frames, ignore_index=True)


def _table(group: pd.DataFrame, costs: str, column: str) -> np.ndarray:
    """Values `[seeds, episodes]`; an episode is the same batch for all policies and both costs."""
    chosen = group[group["costs"] == costs]
    return np.stack([rows[column].to_numpy() for _, rows in chosen.groupby("seed")])
