"""Plain torch training of Mixtures of Experts, scheduled by a learned policy or by torch schedulers."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch.optim import lr_scheduler

from agents.baselines.metaopt import PATIENCE, cosine
from agents.deploy.metaopt import PolicyMetaOptimizer, gate_metrics
from experts import data, tasks
from experts.model import MoEClassifier
from moe_envs.metaopt.env import INITIAL_RATES
from moe_envs.metaopt.signals import DECAYS, RATES

# Called after each validation with its metrics and the number of decisions so far.
Driver = Callable[[dict[str, Any], int], object]
Drive = Callable[[torch.optim.Optimizer, MoEClassifier, "LoopTask"], Driver]


class LoopTask(NamedTuple):
    """Training task: data, model, length, and interval between decisions."""

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
def fashion_images() -> LoopTask:
    """Fashion-MNIST with 55,000 training and 5,000 validation images of 28 x 28; 8 experts of 64 hidden units."""
    found = data.load("fashion-mnist")
    rows = np.concatenate([found.splits["train"], found.splits["rl_train"]])
    mean, deviation = float(found.inputs[rows].mean()), float(found.inputs[rows].std())
    validation, labels = found["validation"]
    arrays = (found.inputs[rows] - mean) / deviation, found.labels[rows], (validation - mean) / deviation, labels
    inputs, given, others, wanted = map(torch.from_numpy, arrays)
    return LoopTask(inputs, given, others, wanted, (64,) * 8, 128, steps_per_action=30, max_actions=30, target=0.87)


@cache
def small(name: str) -> LoopTask:
    """Data, model, batches and target of a task of MoEMetaOpt-v0, trained on all inputs."""
    task = tasks.load(name)
    arrays = task.inputs, task.labels, task.validation_inputs, task.validation_labels
    inputs, given, others, wanted = (torch.from_numpy(array.copy()) for array in arrays)
    steps, target = task.recipe.steps, float(task.recipe.target or 1.0)
    return LoopTask(inputs, given, others, wanted, (16,) * 4, 64, steps_per_action=steps, max_actions=30, target=target)


def train(
    problem: LoopTask, optimizer: Callable[[Any], torch.optim.Optimizer], drive: Drive, seed: int
) -> dict[str, Any]:
    """Train to the target or the last decision; returns steps, epochs and CPU seconds to the target, and a timeline.

    A training that misses the target counts as if one more decision had reached it.
    """
    begun = time.process_time()
    torch.manual_seed(seed)
    model = MoEClassifier(problem.inputs.shape[1], int(problem.labels.max()) + 1, widths=problem.widths)
    made = optimizer([{"params": part.parameters()} for part in (model.gate, model.experts)])
    driver, timeline, losses = drive(made, model, problem), [], []
    batches = _batches(problem, seed)
    for action in range(1, problem.max_actions + 1):
        losses = [_step(problem, model, made, next(batches)) for _ in range(problem.steps_per_action)]
        metrics = validate(model, problem.validation_inputs, problem.validation_labels) | {"train_losses": losses}
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
    last, more = timeline[-1], 1 if arrived else 1 + 1 / problem.max_actions
    return {
        "seed": seed, "arrived": arrived, "steps": action if arrived else problem.max_actions + 1,
        "epochs": more * last["epochs"], "seconds": more * last["seconds"], "loss": last["validation_loss"],
        "accuracy": last["accuracy"], "timeline": timeline,
    }  # fmt: skip


def _batches(problem: LoopTask, seed: int) -> Any:
    generator = torch.Generator().manual_seed(seed)
    while True:
        order = torch.randperm(len(problem.labels), generator=generator)
        yield from order.split(problem.batch_size)[: len(order) // problem.batch_size]


def _step(problem: LoopTask, model: MoEClassifier, optimizer: torch.optim.Optimizer, rows: torch.Tensor) -> float:
    loss = F.cross_entropy(model(problem.inputs[rows]), problem.labels[rows])
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return float(loss.detach())


@torch.no_grad()
def validate(model: MoEClassifier, inputs: torch.Tensor, labels: torch.Tensor) -> dict[str, Any]:
    """Loss and accuracy on validation data."""
    logits = model(inputs)
    return {
        "validation_loss": float(F.cross_entropy(logits, labels)),
        "validation_accuracy": float((logits.argmax(1) == labels).float().mean()),
    }


def by_policy(policy: Any) -> Drive:
    """Schedule by a learned policy; computing the gate metrics counts as part of its decision."""

    def drive(optimizer: torch.optim.Optimizer, model: MoEClassifier, problem: LoopTask) -> Driver:
        groups = {"gate": model.gate, "experts": model.experts}
        meta = PolicyMetaOptimizer(optimizer, policy, groups, target=problem.target, max_actions=problem.max_actions)

        def decide(metrics: dict[str, Any], action: int) -> None:
            with torch.no_grad():
                gate = model.gate(problem.validation_inputs)
            meta.update_hparams(metrics | gate_metrics(gate), action)

        return decide

    return drive


def constant(optimizer: torch.optim.Optimizer, model: MoEClassifier, problem: LoopTask) -> Driver:
    """Constant learning rate and weight decay."""
    return lambda metrics, action: None


def by_cosine(optimizer: torch.optim.Optimizer, model: MoEClassifier, problem: LoopTask) -> Driver:
    """torch's LambdaLR with half a cosine over all decisions."""
    scheduler = lr_scheduler.LambdaLR(optimizer, lambda action: float(cosine(np.array(action / problem.max_actions))))
    return lambda metrics, action: scheduler.step()


def by_plateau(optimizer: torch.optim.Optimizer, model: MoEClassifier, problem: LoopTask) -> Driver:
    """torch's ReduceLROnPlateau, with the patience and factor of our rules."""
    scheduler = lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.5, patience=PATIENCE - 1)
    return lambda metrics, action: scheduler.step(metrics["validation_loss"])


SCHEDULERS: dict[str, Drive] = {"constant": constant, "cosine": by_cosine, "plateau": by_plateau}


def drawn_rate(seed: int) -> float:
    """Draw an initial learning rate, log-uniform as in MoEMetaOpt-v0."""
    return float(np.exp(np.random.default_rng(seed).uniform(*np.log(INITIAL_RATES))))


def search(
    problem: LoopTask, make: Callable[[float, float], Callable[[Any], torch.optim.Optimizer]], drive: Drive,
    rounds: Sequence[tuple[int, int]],
) -> tuple[float, float]:  # fmt: skip
    """Learning rate and weight decay with the fewest mean steps; random search with (candidates, seeds) per round."""
    generator, count = np.random.default_rng(0), rounds[0][0]
    low, high = np.log([INITIAL_RATES[0], RATES[1]])
    rates, decays = np.exp(generator.uniform(low, high, count)), generator.choice(DECAYS, count)
    candidates: list[tuple[float, float]] = list(zip(rates.tolist(), decays.tolist(), strict=True))
    for kept, seeds in rounds:
        scores = [
            np.mean([train(problem, make(*each), drive, seed)["steps"] for seed in range(seeds)])
            for each in candidates[:kept]
        ]
        candidates = [candidates[place] for place in np.argsort(scores, kind="stable")]
    return candidates[0]


def adamw(rate: float, decay: float) -> Callable[[Any], torch.optim.Optimizer]:
    """AdamW with a learning rate and weight decay."""
    return lambda parts: torch.optim.AdamW(parts, lr=rate, weight_decay=decay, fused=True)
