"""A learned policy as the `MetaOptimizer` of a plain torch training, beside torch's own schedulers.

The model is a Mixture of Experts on the whole images of Fashion-MNIST, larger than any the policy has met. The data are
new to it as well, unless it was trained on tasks of Fashion-MNIST pooled: its name says on which. The schedulers' rates
and decays are searched on other seeds than all are judged by.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from agents.ppo import PPO
from benchmarks.experiments import metaopt
from benchmarks.results.statistics import median_interval
from benchmarks.runner import processes as jobs
from benchmarks.torch_training import (
    SCHEDULERS,
    Driver,
    Problem,
    adamw,
    by_policy,
    drawn_rate,
    fashion_images,
    search,
    train,
)
from cost.files import write_text
from cost.machine import provenance
from experts.model import MoEClassifier

FIRST_JUDGED_SEED = 1000
SEARCH = ((24, 1), (6, 4))  # candidates, seeds: 48 trainings for each scheduler


def tune(name: str) -> tuple[float, float]:
    """A scheduler's learning rate and weight decay."""
    torch.set_num_threads(1)
    return search(fashion_images(), adamw, SCHEDULERS[name], SEARCH)


def judge(name: str, start: str, settings: tuple[float, float] | None, policy: str | None, seed: int) -> dict[str, Any]:
    """A training from the given rate and decay, or from a random rate that the seed draws."""
    torch.set_num_threads(1)
    drive = by_policy(PPO.load(policy)) if policy else SCHEDULERS[name]
    found = train(fashion_images(), adamw(*(settings or (drawn_rate(seed), 0.01))), drive, seed)
    return found | {"policy": name, "start": start, "by": policy or name}


def overhead(policy: Any, pairs: int) -> dict[str, Any]:
    """How much slower a window of training and validation is with a decision at its end: pairs of neighbours, in turn
    with the decision first and second. CPU time."""
    torch.set_num_threads(1)
    problem = fashion_images()._replace(target=1.1, max_actions=2 * pairs)
    windows: list[float] = []

    def drive(optimizer: torch.optim.Optimizer, model: MoEClassifier, problem: Problem) -> Driver:
        meta, ends = by_policy(policy)(optimizer, model, problem), [time.process_time()]

        def driver(metrics: dict[str, Any], action: int) -> None:
            if action % 4 in (0, 1):  # with, without; without, with
                meta(metrics, action)
            ends.append(time.process_time())
            windows.append(ends[-1] - ends[-2])

        return driver

    train(problem, adamw(0.003, 0.01), drive, 0)
    first, second = np.array(windows).reshape(-1, 2).T
    even = np.arange(len(first)) % 2 == 0
    ratios = np.where(even, first / second, second / first) - 1
    return {"pairs": len(ratios), "overhead": float(np.median(ratios)), "ci95": median_interval(ratios)}


def run(policies: list[Path], seeds: int, pairs: int, processes: int, out: Path, add_task: Any) -> dict[str, Any]:
    """Search, judge, measure; writes results.json, trainings.csv, timelines.csv and curves.png.

    Raises `ValueError` where the policies are not all of the same tasks and different from each other.
    """
    agents = [PPO.load(path) for path in policies]
    trained_on = {json.dumps(agent.arguments["env_kwargs"].get("task", "digits")) for agent in agents}
    if len(trained_on) != 1 or len({path.resolve() for path in policies}) != len(policies):
        raise ValueError(f"the policies must be different ones, trained on the same tasks; got {sorted(trained_on)}")
    with jobs.pool(processes) as pool:
        report = add_task("searching the schedulers' settings")
        tuned = jobs.gather([pool.submit(tune, name) for name in SCHEDULERS], report)
        settings = dict(zip(SCHEDULERS, tuned, strict=True))
        judged = range(FIRST_JUDGED_SEED, FIRST_JUDGED_SEED + seeds)
        todo: list[tuple[Any, ...]] = [
            (name, "tuned rate", settings[name], None, seed) for name in SCHEDULERS for seed in judged
        ]
        todo += [(name, "random rate", None, None, seed) for name in SCHEDULERS for seed in judged]
        for path in map(str, policies):
            todo += [("PPO", "tuned rate", settings["constant"], path, seed) for seed in judged]
            todo += [("PPO", "random rate", None, path, seed) for seed in judged]
        found = jobs.gather([pool.submit(judge, *each) for each in todo], add_task(f"{len(todo)} trainings"))
    rows = pd.DataFrame([{key: value for key, value in each.items() if key != "timeline"} for each in found])
    shared = ("policy", "start", "by", "seed")
    timelines = pd.DataFrame([{key: each[key] for key in shared} | row for each in found for row in each["timeline"]])
    add_task("pairs of windows with a decision and without")(0.0)
    result = {
        "settings": {name: {"rate": rate, "decay": decay} for name, (rate, decay) in settings.items()},
        "policies": list(map(str, policies)), "trained_on": json.loads(trained_on.pop()), "rows": summarise(rows),
        "overhead": overhead(agents[0], pairs), **provenance(),
    }  # fmt: skip
    out.mkdir(parents=True, exist_ok=True)
    rows.to_csv(out / "trainings.csv", index=False)
    timelines.to_csv(out / "timelines.csv", index=False)
    write_text(out / "results.json", json.dumps(result, indent=1))
    _draw(timelines, out / "curves.png")
    return result


def summarise(rows: pd.DataFrame) -> list[dict[str, Any]]:
    """As of the environment's trainings, a policy's folder being its seed, and means of what only these have."""
    found = metaopt.summarise(rows.rename(columns={"seed": "episode", "by": "seed"}))
    means = rows.groupby(["start", "policy"])[["epochs", "seconds", "loss", "accuracy"]].mean()
    of_each = [means.loc[(row["start"], row["policy"])] for row in found]
    return [
        row | {str(key): float(value) for key, value in each.items()} for row, each in zip(found, of_each, strict=True)
    ]


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
