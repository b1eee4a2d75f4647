"""A learned policy as the `MetaOptimizer` of a plain torch training, beside torch's own schedulers.

The model, a Mixture of Experts on the whole images of Fashion-MNIST, and the data are none that the policy has met. The
schedulers' rates and decays are searched on other seeds than all are judged by.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from torch.optim import lr_scheduler

from agents.meta_optimizer import PolicyMetaOptimizer, gate_metrics
from agents.ppo import PPO
from agents.yardsticks.metaopt import PATIENCE, cosine
from benchmarks import jobs, runs
from benchmarks.statistics import mean_interval, median_interval, paired_difference
from cost.files import write_text
from experts import data, tasks
from experts.model import MoEClassifier
from moe_envs.metaopt import INITIAL_RATES
from moe_envs.metaopt_signals import DECAYS

# Called after each validation with its metrics and the number of decisions so far.
Driver = Callable[[dict[str, Any], int], object]
Drive = Callable[[torch.optim.Optimizer, MoEClassifier, "Problem"], Driver]
FIRST_JUDGED_SEED = 1000
SEARCH = ((12, 2), (4, 6))  # candidates, seeds: 48 trainings for each scheduler


class Problem(NamedTuple):
    """What is trained, for how long, and how often a decision is taken."""

    inputs: torch.Tensor
    labels: torch.Tensor
    validation_inputs: torch.Tensor
    validation_labels: torch.Tensor
    widths: tuple[int, ...]
    batch_size: int
    steps_per_action: int
    max_actions: int
    target: float


@cache
def fashion_images() -> Problem:
    """Fashion-MNIST, 55,000 images of 28 x 28 and 5,000 to validate on; 8 experts of 64 hidden units."""
    found = data.load("fashion-mnist")
    rows = np.concatenate([found.splits["train"], found.splits["rl_train"]])
    mean, deviation = float(found.inputs[rows].mean()), float(found.inputs[rows].std())
    validation, labels = found["validation"]
    arrays = (found.inputs[rows] - mean) / deviation, found.labels[rows], (validation - mean) / deviation, labels
    inputs, given, others, wanted = map(torch.from_numpy, arrays)
    return Problem(inputs, given, others, wanted, (64,) * 8, 128, steps_per_action=30, max_actions=30, target=0.87)


@cache
def small(name: str) -> Problem:
    """A task of MoEMetaOpt-v0 as it is there."""
    task = tasks.load(name)
    arrays = task.inputs, task.labels, task.validation_inputs, task.validation_labels
    inputs, given, others, wanted = (torch.from_numpy(array.copy()) for array in arrays)
    steps, target = task.recipe.steps, task.recipe.target
    return Problem(inputs, given, others, wanted, (16,) * 4, 64, steps_per_action=steps, max_actions=30, target=target)


def train(
    problem: Problem, optimizer: Callable[[Any], torch.optim.Optimizer], drive: Drive, seed: int
) -> dict[str, Any]:
    """A training until the target or the last decision: decisions, epochs, CPU seconds, and a timeline."""
    begun = time.process_time()
    torch.manual_seed(seed)
    model = MoEClassifier(problem.inputs.shape[1], int(problem.labels.max()) + 1, widths=problem.widths)
    made = optimizer([{"params": part.parameters()} for part in (model.gate, model.experts)])
    driver, timeline, losses = drive(made, model, problem), [], []
    batches = _batches(problem, seed)
    for action in range(1, problem.max_actions + 1):
        losses = [_step(problem, model, made, next(batches)) for _ in range(problem.steps_per_action)]
        metrics = validate(problem, model) | {"train_losses": losses}
        rates = [float(group["lr"]) for group in made.param_groups]
        decays = [float(group["weight_decay"]) for group in made.param_groups]
        timeline.append({
            "action": action, "epochs": action * problem.steps_per_action * problem.batch_size / len(problem.labels),
            "seconds": time.process_time() - begun, "accuracy": metrics["validation_accuracy"],
            "validation_loss": metrics["validation_loss"], "gate_rate": rates[0], "experts_rate": rates[1],
            "gate_decay": decays[0], "experts_decay": decays[1],
            "beta1": float(made.param_groups[0].get("betas", (np.nan,))[0]),
        })  # fmt: skip
        if metrics["validation_accuracy"] >= problem.target:
            break
        driver(metrics, action)
    arrived = metrics["validation_accuracy"] >= problem.target
    last = timeline[-1]
    return {
        "seed": seed, "arrived": arrived, "steps": action if arrived else problem.max_actions + 1,
        "epochs": last["epochs"], "seconds": last["seconds"], "loss": last["validation_loss"],
        "accuracy": last["accuracy"], "timeline": timeline,
    }  # fmt: skip


def _batches(problem: Problem, seed: int) -> Any:
    generator = torch.Generator().manual_seed(seed)
    while True:
        order = torch.randperm(len(problem.labels), generator=generator)
        yield from order.split(problem.batch_size)[: len(order) // problem.batch_size]


def _step(problem: Problem, model: MoEClassifier, optimizer: torch.optim.Optimizer, rows: torch.Tensor) -> float:
    loss = F.cross_entropy(model(problem.inputs[rows]), problem.labels[rows])
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return float(loss.detach())


@torch.no_grad()
def validate(problem: Problem, model: MoEClassifier) -> dict[str, Any]:
    """Loss, accuracy and the gate's metrics on the validation data."""
    logits = model(problem.validation_inputs)
    return gate_metrics(model.gate(problem.validation_inputs)) | {
        "validation_loss": float(F.cross_entropy(logits, problem.validation_labels)),
        "validation_accuracy": float((logits.argmax(1) == problem.validation_labels).float().mean()),
    }


def by_policy(policy: Any) -> Drive:
    """A learned policy drives."""

    def drive(optimizer: torch.optim.Optimizer, model: MoEClassifier, problem: Problem) -> Driver:
        groups = {"gate": model.gate, "experts": model.experts}
        meta = PolicyMetaOptimizer(optimizer, policy, groups, target=problem.target, max_actions=problem.max_actions)
        return meta.update_hparams

    return drive


def constant(optimizer: torch.optim.Optimizer, model: MoEClassifier, problem: Problem) -> Driver:
    """Nothing changes."""
    return lambda metrics, action: None


def by_cosine(optimizer: torch.optim.Optimizer, model: MoEClassifier, problem: Problem) -> Driver:
    """torch's LambdaLR with half a cosine over all decisions."""
    scheduler = lr_scheduler.LambdaLR(optimizer, lambda action: float(cosine(np.array(action / problem.max_actions))))
    return lambda metrics, action: scheduler.step()


def by_plateau(optimizer: torch.optim.Optimizer, model: MoEClassifier, problem: Problem) -> Driver:
    """torch's ReduceLROnPlateau, with the patience and factor of our rules."""
    scheduler = lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.5, patience=PATIENCE - 1)
    return lambda metrics, action: scheduler.step(metrics["validation_loss"])


SCHEDULERS: dict[str, Drive] = {"constant": constant, "cosine": by_cosine, "plateau": by_plateau}


def adamw(rate: float, decay: float) -> Callable[[Any], torch.optim.Optimizer]:
    """AdamW with a learning rate and weight decay."""
    return lambda parts: torch.optim.AdamW(parts, lr=rate, weight_decay=decay, fused=True)


def search(name: str) -> tuple[float, float]:
    """A scheduler's learning rate and weight decay: random candidates, the best of which meet more seeds."""
    torch.set_num_threads(1)
    problem, generator = fashion_images(), np.random.default_rng(0)
    low, high = np.log(INITIAL_RATES)
    rates, decays = np.exp(generator.uniform(low, high, SEARCH[0][0])), generator.choice(DECAYS, SEARCH[0][0])
    candidates = list(zip(rates.tolist(), decays.tolist(), strict=True))
    for kept, seeds in SEARCH:
        scores = [
            np.mean([train(problem, adamw(*each), SCHEDULERS[name], seed)["steps"] for seed in range(seeds)])
            for each in candidates[:kept]
        ]
        candidates = [candidates[place] for place in np.argsort(scores, kind="stable")]
    return candidates[0]


def judge(name: str, start: str, settings: tuple[float, float] | None, policy: str | None, seed: int) -> dict[str, Any]:
    """A training from the given rate and decay, or from a random rate that the seed draws."""
    torch.set_num_threads(1)
    drawn = float(np.exp(np.random.default_rng(seed).uniform(*np.log(INITIAL_RATES))))
    drive = by_policy(PPO.load(policy)) if policy else SCHEDULERS[name]
    found = train(fashion_images(), adamw(*(settings or (drawn, 0.01))), drive, seed)
    return found | {"policy": name, "start": start, "by": policy or name}


def overhead(policy: Any, pairs: int) -> dict[str, Any]:
    """How much slower a window of training and validation is with a decision at its end: pairs of neighbours, in turn
    with the decision first and second. CPU time."""
    torch.set_num_threads(1)
    problem = fashion_images()._replace(target=1.1, max_actions=2 * pairs)
    windows: list[float] = []
    begun = 0.0

    def drive(optimizer: torch.optim.Optimizer, model: MoEClassifier, problem: Problem) -> Driver:
        meta = by_policy(policy)(optimizer, model, problem)

        def driver(metrics: dict[str, Any], action: int) -> None:
            nonlocal begun
            if (action % 4) in (1, 0):  # with, without, without, with
                meta(metrics, action)
            windows.append(time.process_time() - begun)
            begun = time.process_time()

        begin()
        return driver

    def begin() -> None:
        nonlocal begun
        begun = time.process_time()

    train(problem, adamw(0.003, 0.01), drive, 0)
    table = np.array(windows[1:]) if len(windows) % 2 else np.array(windows)
    first, second = table.reshape(-1, 2).T
    even = np.arange(len(first)) % 2 == 0
    ratios = np.where(even, first / second, second / first) - 1
    return {"pairs": len(ratios), "overhead": float(np.median(ratios)), "ci95": median_interval(ratios)}


def run(policies: list[Path], seeds: int, pairs: int, processes: int, out: Path, add_task: Any) -> dict[str, Any]:
    """Search, judge, measure; writes results.json, trainings.csv, timelines.csv and curves.png."""
    with jobs.pool(processes) as pool:
        report = add_task("searching the schedulers' settings")
        settings = dict(
            zip(SCHEDULERS, jobs.gather([pool.submit(search, name) for name in SCHEDULERS], report), strict=True)
        )
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
        "rows": summarise(rows), "overhead": overhead(PPO.load(policies[0]), pairs), **runs.provenance(),
    }  # fmt: skip
    out.mkdir(parents=True, exist_ok=True)
    rows.to_csv(out / "trainings.csv", index=False)
    timelines.to_csv(out / "timelines.csv", index=False)
    write_text(out / "results.json", json.dumps(result, indent=1))
    _draw(timelines, out / "curves.png")
    return result


def summarise(rows: pd.DataFrame) -> list[dict[str, Any]]:
    """Of each start and policy: means with 95 % intervals over seeds, share that arrived, PPO's steps less its own."""
    found = []
    for start, group in rows.groupby("start", sort=False):
        tables = {
            name: part.pivot(index="by", columns="seed", values="steps").to_numpy()
            for name, part in group.groupby("policy", sort=False)
        }
        for name, part in group.groupby("policy", sort=False):
            table = tables[name]
            row: dict[str, Any] = {"start": start, "policy": name, "steps": float(table.mean())}
            row |= {"ci95": mean_interval(table), "arrived": float(part["arrived"].mean())}
            row |= {key: float(part[key].mean()) for key in ("epochs", "seconds", "loss", "accuracy")}
            if name != "PPO":
                less, interval = paired_difference(tables["PPO"], table[0])
                row |= {"ppo_less": less, "ppo_less_ci95": interval, "share": less / row["steps"]}
            found.append(row)
    return found


def _draw(timelines: pd.DataFrame, path: Path) -> None:
    """Accuracy and hyperparameters over the epochs of one seed, from the tuned rate."""
    from matplotlib.figure import Figure

    seed = timelines["seed"].min()
    shown = timelines[(timelines["seed"] == seed) & (timelines["start"] == "tuned rate")]
    figure = Figure((16, 3.6), layout="constrained")
    panels = figure.subplots(1, 5)
    columns = ("accuracy", "gate_rate", "experts_rate", "gate_decay", "experts_decay")
    for panel, column in zip(panels, columns, strict=True):
        for number, (_, part) in enumerate(shown.groupby("by", sort=False)):
            name = part["policy"].iloc[0]
            panel.plot(part["epochs"], part[column], f"C{number}", lw=2 if name == "PPO" else 1, label=name)
        panel.set(xlabel="epochs", title=column.replace("_", ", "), yscale="log" if "_rate" in column else "linear")
        panel.grid(alpha=0.3)
    panels[0].legend(fontsize=8)
    figure.savefig(path, dpi=120)
