"""Does a learned policy schedule a plain torch training better than the schedulers of torch?

The model is a Mixture of Experts on full-size Fashion-MNIST images, larger than any model in the policy's training. The
data set is new to the policy too, unless it was trained on pooled Fashion-MNIST tasks. Learning rates and weight decays
of the schedulers are searched on separate seeds. To evaluate your own policies: --set 'policies=["FOLDER", ...]'; by
default, PPO is trained on digits.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
import torch

from agents.ppo import PPO
from benchmarks.results.paired import less_decisions
from benchmarks.results.statistics import median_interval
from benchmarks.results.tables import records
from benchmarks.runner.kept import found_once, policy_of
from benchmarks.runner.setup import Arguments
from benchmarks.torch_training import (
    SCHEDULERS,
    Driver,
    LoopTask,
    adamw,
    by_policy,
    drawn_rate,
    fashion_images,
    search,
    small,
    train,
)
from cost.timing import torch_threads
from experts.model import MoEClassifier

FIRST_JUDGED_SEED = 1000
SEEDS = tuple(range(FIRST_JUDGED_SEED, FIRST_JUDGED_SEED + 10))
SEARCH = ((24, 1), (6, 4))  # (candidates, seeds) per round: 48 trainings per scheduler
STARTS = "tuned rate", "random rate"
SETTINGS: dict[str, dict[str, Any]] = {
    f"{name}, {start}": {"policy": name, "start": start} for start in STARTS for name in (*SCHEDULERS, "PPO")
} | {"overhead": {"policy": "overhead", "start": "tuned rate"}}
QUICK = {"seeds": [1000, 1001], "settings": {"data": "digits", "search": [[2, 1]], "timesteps": 1024, "pairs": 2}}


class LoopSetup(Arguments):
    """`data` is "fashion-mnist" (full-size images) or a task of MoEMetaOpt-v0; `search` lists (candidates, seeds) per
    round; `pairs` is the number of window pairs timed with and without a decision."""

    policy: str
    start: Literal["tuned rate", "random rate"]
    policies: list[str] = []
    data: str = "fashion-mnist"
    search: list[tuple[int, int]] = list(SEARCH)
    timesteps: int | None = None
    pairs: int = 100


Setup = LoopSetup


def once(setup: LoopSetup) -> bool:
    """True for the overhead: it is measured once."""
    return setup.policy == "overhead"


def measure(setup: LoopSetup, seed: int, split: str, folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Train from the searched rate and decay, or from a random rate drawn by the seed, for PPO once per policy; or
    measure the overhead of a decision."""
    task = fashion_images() if setup.data == "fashion-mnist" else small(setup.data)
    with torch_threads(1):
        if setup.policy == "overhead":
            return {}, {"overhead": overhead(task, _policies(setup, folder)[0][1], setup.pairs)}
        name = setup.policy if setup.policy in SCHEDULERS else "constant"
        settings = _searched(setup, name, folder) if setup.start == "tuned rate" else (drawn_rate(seed), 0.01)
        drives = [(name, SCHEDULERS[name])]
        if setup.policy not in SCHEDULERS:
            drives = [(path, by_policy(policy)) for path, policy in _policies(setup, folder)]
        found = [train(task, adamw(*settings), drive, seed) | {"by": by} for by, drive in drives]
    measured = [{"by": each["by"], "seconds": each.pop("seconds")} for each in found]
    for each in found:
        for row in each["timeline"]:
            row.pop("seconds")
    return {"trainings": found}, {"measured": measured}


def _searched(setup: LoopSetup, name: str, folder: Path) -> tuple[float, float]:
    """Search the learning rate and weight decay of a scheduler once."""

    def settings() -> dict[str, Any]:
        task = fashion_images() if setup.data == "fashion-mnist" else small(setup.data)
        return dict(zip(("rate", "decay"), search(task, adamw, SCHEDULERS[name], setup.search), strict=True))

    found = found_once(folder / f"search-{setup.data}-{name}-{json.dumps(setup.search)}.json", settings)
    return found["rate"], found["decay"]


def _policies(setup: LoopSetup, folder: Path) -> list[tuple[str, Any]]:
    """Policies by name; raises `ValueError` if their tasks differ or a name occurs twice."""
    if not setup.policies:
        path = folder / f"policy-digits-{setup.timesteps or 'all'}"
        return [("PPO", policy_of(path, "moe_envs:MoEMetaOpt-v0", {"task": "digits"}, 0, setup.timesteps))]
    agents = [(path, PPO.load(path)) for path in setup.policies]
    trained_on = {json.dumps(agent.arguments["env_kwargs"].get("task", "digits")) for _, agent in agents}
    if len(trained_on) != 1 or len({Path(path).resolve() for path in setup.policies}) != len(agents):
        raise ValueError(f"the policies must be different ones, trained on the same tasks; got {sorted(trained_on)}")
    return agents


def overhead(task: LoopTask, policy: Any, pairs: int) -> dict[str, Any]:
    """Relative CPU time that a decision adds to a window of training and validation, from adjacent pairs of windows in
    alternating order."""
    task = task._replace(target=1.1, max_actions=2 * pairs)
    windows: list[float] = []

    def drive(optimizer: torch.optim.Optimizer, model: MoEClassifier, problem: LoopTask) -> Driver:
        meta, ends = by_policy(policy)(optimizer, model, problem), [time.process_time()]

        def driver(metrics: dict[str, Any], action: int) -> None:
            if action % 4 in (0, 1):  # with, without; without, with
                meta(metrics, action)
            ends.append(time.process_time())
            windows.append(ends[-1] - ends[-2])

        return driver

    train(task, adamw(0.003, 0.01), drive, 0)
    first, second = np.array(windows).reshape(-1, 2).T
    even = np.arange(len(first)) % 2 == 0
    ratios = np.where(even, first / second, second / first) - 1
    return {"pairs": len(ratios), "slow-down": float(np.median(ratios)), "95 %": median_interval(ratios)}


def score(frame: pd.DataFrame) -> dict[str, Any]:
    """Epochs and decisions to the target, paired by seed, and the overhead of a decision."""
    rows = _trainings(frame)
    tables: dict[str, Any] = {}
    if len(rows):
        paired = less_decisions(rows.rename(columns={"seed": "episode", "by": "seed"}))
        means = rows.groupby(["start", "policy"])[["epochs", "loss", "accuracy"]].mean()
        for row in paired:
            of_each = means.loc[(row["from the"], row["policy"])]
            row |= {str(key): float(value) for key, value in of_each.items()}
        tables["Until the target"] = paired
    costs = frame[frame["policy"] == "overhead"]
    if len(costs):
        tables["What a decision adds to its window, CPU time"] = [costs["overhead"].iloc[0]]
    return {"tables": tables}


def plot(frame: pd.DataFrame, result: dict[str, Any], out: Path) -> list[str]:
    """Accuracy and hyperparameters over the epochs of one seed, from the tuned rate."""
    rows = _trainings(frame)
    if not len(rows) or not (rows["start"] == "tuned rate").any():
        return []
    shared = ("policy", "start", "by", "seed")
    lines = [{key: each[key] for key in shared} | row for each in records(rows) for row in each["timeline"]]
    _draw(pd.DataFrame(lines), out / "curves.png")
    return ["curves.png"]


def _trainings(frame: pd.DataFrame) -> pd.DataFrame:
    trained = frame[frame["policy"] != "overhead"]
    return pd.DataFrame([
        {"policy": row["policy"], "start": row["start"], **each}
        for row in records(trained) for each in row["trainings"]
    ])  # fmt: skip


def _draw(timelines: pd.DataFrame, path: Path) -> None:
    """Accuracy and hyperparameters over the epochs of one seed, from the tuned rate."""
    from matplotlib.figure import Figure

    seed = timelines["seed"].min()
    shown = timelines[(timelines["seed"] == seed) & (timelines["start"] == "tuned rate")]
    figure = Figure((16, 3.6), layout="constrained")
    panels = figure.subplots(1, 5)
    columns = ("accuracy", "gate_rate", "experts_rate", "gate_decay", "experts_decay")
    for panel, column in zip(panels, columns, strict=True):
        for number, (name, several) in enumerate(shown.groupby("policy", sort=False)):
            for first, (_, part) in enumerate(several.groupby("by", sort=False)):
                label = None if first else name
                panel.plot(part["epochs"], part[column], f"C{number}", lw=2 if name == "PPO" else 1, label=label)
        panel.set(xlabel="epochs", title=column.replace("_", ", "), yscale="log" if "_rate" in column else "linear")
        panel.grid(alpha=0.3)
    panels[0].legend(fontsize=8)
    figure.savefig(path, dpi=120)
