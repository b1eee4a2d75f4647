"""How fast are the environments? Median CPU times on one thread, measured in alternation.

Compares MoERouting-v0 with CartPole-v1, MoEMetaOpt-v0 with the same trainings run sequentially in torch, and the plan
evaluation of MoECompression-v0 with running the decompressed model.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import gymnasium
import numpy as np
import pandas as pd

from benchmarks.runner.setup import Arguments

# rows (1: single environment by gymnasium.make) -> (steps per round, required ratio)
CASES = {1: (20_000, 2.5), 64: (4_000, 2.0), 1024: (1_000, None), 4096: (300, 0.65)}
TRAININGS = {1: 200, 32: 100, 64: 100}  # parallel trainings -> optimiser steps per round
SEEDS = (0,)
SETTINGS: dict[str, dict[str, Any]] = {f"routing, {rows} rows": {"kind": "routing", "count": rows} for rows in CASES}
SETTINGS |= {f"{count} trainings": {"kind": "trainings", "count": count} for count in TRAININGS}
SETTINGS |= {f"plans {kind}": {"kind": "plans", "plans": kind} for kind in ("at random", "of a local search")}
QUICK = {"settings": {"rounds": 1, "share": 0.01, "model": "digits-mlp"}}
TITLES = {
    "routing": "Steps per second", "trainings": "Optimiser steps per second, each fifth with a validation",
    "plans": "Seconds of one evaluation of a plan",
}  # fmt: skip


class EnvironmentSpeed(Arguments):
    """`count` parallel rows or trainings; `share` of the default steps in each of the `rounds`."""

    kind: Literal["routing", "trainings", "plans"]
    count: int = 12
    plans: str = ""
    rounds: int = 9
    share: float = 1.0
    model: str = "fashion-mnist-conv"


Setup = EnvironmentSpeed


def measure(setup: EnvironmentSpeed, seed: int, split: str, folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Measure one table row."""
    from threadpoolctl import threadpool_limits

    with threadpool_limits(1, "blas"):
        return {}, {"row": {"routing": _routing, "trainings": _trainings, "plans": _plans}[setup.kind](setup)}


def score(frame: pd.DataFrame) -> dict[str, Any]:
    """Tables of the results."""
    return {"tables": {
        TITLES[str(kind)]: group["row"].tolist() for kind, group in frame.groupby("kind", sort=False)
    }}  # fmt: skip


def _routing(setup: EnvironmentSpeed) -> dict[str, Any]:
    steps, floor = CASES[setup.count]
    steps = max(10, round(steps * setup.share))
    pair = [_runner(env_id, setup.count, steps) for env_id in ("CartPole-v1", "moe_envs:MoERouting-v0")]
    rates = [[setup.count * steps / _seconds(run) for run in pair] for _ in range(setup.rounds)]
    cartpole, routing = (statistics.median(rate) for rate in zip(*rates, strict=True))
    ratio = statistics.median(ours / theirs for theirs, ours in rates)
    return {"rows": setup.count, "CartPole-v1": cartpole, "MoERouting-v0": routing, "ratio": ratio, "asked for": floor}


def _trainings(setup: EnvironmentSpeed) -> dict[str, Any]:
    """Time sequential torch trainings (autograd, fused AdamW), the batched trainings, and the environment; returns the
    ratio of the first two, and the relative overhead of the environment over the batched trainings."""
    count, steps = setup.count, max(5, round(TRAININGS[setup.count] * setup.share))
    runs = (_torch_runner(steps), _batched_runner(count, steps), _metaopt_runner(count, steps))
    numbers = (steps, count * steps, count * steps)
    rates = [[n / _seconds(run) for n, run in zip(numbers, runs, strict=True)] for _ in range(setup.rounds)]
    torch_rate, batched, env = (statistics.median(rate) for rate in zip(*rates, strict=True))
    return {
        "trainings": count, "torch, one by one": torch_rate, "batched": batched,
        "batched / torch": statistics.median(row[1] / row[0] for row in rates), "MoEMetaOpt-v0": env,
        "slower than batched by": statistics.median(row[1] / row[2] for row in rates) - 1,
    }  # fmt: skip


def _plans(setup: EnvironmentSpeed) -> dict[str, Any]:
    """Time plan evaluation from caches, and by decompressing and running the model on the same inputs."""
    import torch
    import torch.nn.functional as F

    from experts import reference_models
    from experts.compression import LEVELS
    from experts.compression.evaluation import PlanEvaluator
    from experts.compression.pieces import importance
    from experts.compression.plan import Plan

    torch.set_num_threads(1)
    loaded, examples = reference_models.load(setup.model), reference_models.examples(setup.model)
    known = importance(loaded, torch.from_numpy(examples.calibration))
    inputs, labels = torch.from_numpy(examples.inputs), torch.from_numpy(examples.labels)
    evaluator = PlanEvaluator(loaded, examples.inputs, examples.labels, known)
    generator = np.random.default_rng(0)
    plan, seconds, differences = generator.integers(len(LEVELS), size=len(evaluator.names)), [], []
    evaluator(plan.tolist())
    for _ in range(max(2, round(setup.count * setup.share))):
        if setup.plans == "at random":
            plan = generator.integers(len(LEVELS), size=len(plan))
        else:  # change two matrices at a time
            plan[generator.choice(len(plan), 2, replace=False)] = generator.integers(len(LEVELS), size=2)
        begun = time.process_time()
        ours = evaluator(plan.tolist())
        between = time.process_time()
        with torch.inference_mode():
            loss = F.cross_entropy(Plan.of(loaded, plan.tolist()).apply(loaded, known)(inputs), labels)
        seconds.append((between - begun, time.process_time() - between))
        differences.append(abs(ours.loss - float(loss)))
    quick, slow = np.median(seconds, axis=0).tolist()
    ratio = float(np.median([theirs / ours for ours, theirs in seconds]))
    return {"plans": setup.plans, "from caches": quick, "decompressed and run": slow, "ratio": ratio,
            "losses differ by": max(differences)}  # fmt: skip


def _torch_runner(steps: int) -> Callable[[], None]:
    import torch
    import torch.nn.functional as F

    from experts import tasks
    from experts.model import MoEClassifier

    torch.set_num_threads(1)
    task, model = tasks.load("digits"), MoEClassifier(64, 10, widths=(16,) * 4)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, fused=True)
    x, y = torch.from_numpy(task.inputs[:64].copy()), torch.from_numpy(task.labels[:64].copy())
    validation = torch.from_numpy(task.validation_inputs.copy())

    def run() -> None:
        for step in range(steps):
            loss = F.cross_entropy(model(x), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if step % 5 == 4:
                with torch.inference_mode():
                    model(validation).argmax(1)

    return run


def _batched_runner(count: int, steps: int) -> Callable[[], None]:
    """The optimiser steps and validations of `_metaopt_runner` without the environment."""
    from experts import tasks
    from experts.batched_training import BatchedTraining

    task, training = tasks.load("digits"), BatchedTraining(count, 64, 10, width=16)
    training.begin(np.arange(count), [np.random.default_rng(row) for row in range(count)])
    rows = np.random.default_rng(0).integers(len(task.labels), size=(count, 64))
    x, y = task.inputs[rows], task.labels[rows]

    def run() -> None:
        for step in range(steps):
            training.step(x, y)
            if step % 5 == 4:
                training.evaluate(task.validation_inputs, task.validation_labels)

    return run


def _metaopt_runner(count: int, steps: int) -> Callable[[], None]:
    env = gymnasium.make_vec("moe_envs:MoEMetaOpt-v0", count, "vector_entry_point", widths=(16,), target=1.1)
    keep = np.ones((count, 4), dtype=np.int64)
    env.reset(seed=0)

    def run() -> None:
        for _ in range(steps // 5):
            env.step(keep)

    return run


def _seconds(run: Callable[[], None]) -> float:
    start = time.process_time()
    run()
    return time.process_time() - start


def _runner(env_id: str, rows: int, steps: int) -> Callable[[], None]:
    if rows == 1:
        return _single_runner(gymnasium.make(env_id), steps)
    env = gymnasium.make_vec(env_id, num_envs=rows, vectorization_mode="vector_entry_point")
    actions = _actions(env.single_action_space, (64, rows))
    env.reset(seed=0)

    def run() -> None:
        for step in range(steps):
            env.step(actions[step % 64])

    return run


def _single_runner(env: gymnasium.Env[Any, Any], steps: int) -> Callable[[], None]:
    actions = _actions(env.action_space, (4096,)).tolist()
    env.reset(seed=0)

    def run() -> None:
        for step in range(steps):
            _, _, terminated, truncated, _ = env.step(actions[step % 4096])
            if terminated or truncated:
                env.reset()

    return run


def _actions(space: gymnasium.Space[Any], shape: tuple[int, ...]) -> np.ndarray:
    assert isinstance(space, gymnasium.spaces.Discrete)
    return np.random.default_rng(0).integers(space.n, size=shape)
