"""Speed of the environments, CPU time, one thread, interleaved in one run, medians: MoERouting-v0 beside CartPole-v1,
the trainings of MoEMetaOpt-v0 beside the same ones one after another in torch, and MoECompression-v0's evaluation of a
plan beside that of a decompressed model."""

import statistics
import time
from collections.abc import Callable
from typing import Any

import gymnasium
import numpy as np

ROUNDS = 9
# rows (1: the single environment through gymnasium.make) -> steps a round, and the ratio that is asked for
CASES = {1: (20_000, 2.5), 64: (4_000, 2.0), 1024: (1_000, None), 4096: (300, 0.65)}
TRAININGS = {1: 200, 32: 100, 64: 100}  # side by side -> optimiser steps a round


def measure() -> list[dict[str, Any]]:
    """For each number of rows: steps/s of both, their ratio, and the ratio that is asked for."""
    result = []
    for rows, (steps, floor) in CASES.items():
        pair = [_runner(env_id, rows, steps) for env_id in ("CartPole-v1", "moe_envs:MoERouting-v0")]
        rates = [[rows * steps / _seconds(run) for run in pair] for _ in range(ROUNDS)]
        cartpole, routing = (statistics.median(rate) for rate in zip(*rates, strict=True))
        ratio = statistics.median(ours / theirs for theirs, ours in rates)
        result.append({"rows": rows, "cartpole": cartpole, "routing": routing, "ratio": ratio, "floor": floor})
    return result


def measure_trainings() -> list[dict[str, Any]]:
    """For each number of trainings side by side: optimiser steps/s of one after another in torch (autograd and fused
    AdamW), of all as one batched product, and of the environment, each with a validation after five; the ratio of the
    first two, and the share by which the environment is slower than its batched product."""
    from threadpoolctl import threadpool_limits

    result = []
    for count, steps in TRAININGS.items():
        with threadpool_limits(1, "blas"):
            runs = (_torch_runner(steps), _batched_runner(count, steps), _metaopt_runner(count, steps))
            numbers = (steps, count * steps, count * steps)
            rates = [[n / _seconds(run) for n, run in zip(numbers, runs, strict=True)] for _ in range(ROUNDS)]
        torch_rate, batched, env = (statistics.median(rate) for rate in zip(*rates, strict=True))
        result.append(
            {
                "trainings": count,
                "torch": torch_rate,
                "batched": batched,
                "ratio": statistics.median(row[1] / row[0] for row in rates),
                "env": env,
                "env_overhead": statistics.median(row[1] / row[2] for row in rates) - 1,
            }
        )
    return result


def measure_plans(model: str = "fashion-mnist-conv", plans: int = 12) -> list[dict[str, Any]]:
    """For plans at random, and for those that a local search meets, two matrices changed at a time: seconds of one
    evaluation from caches, of decompressing the model and running it on the same validation inputs, their ratio, and
    the largest difference of their losses."""
    import torch
    import torch.nn.functional as F

    from experts import reference_models
    from experts.compression import LEVELS
    from experts.compression.evaluation import PlanEvaluator
    from experts.compression.pieces import importance
    from experts.compression.plan import Plan

    torch.set_num_threads(1)
    loaded, examples = reference_models.load(model), reference_models.examples(model)
    known = importance(loaded, torch.from_numpy(examples.calibration))
    inputs, labels = torch.from_numpy(examples.inputs), torch.from_numpy(examples.labels)
    evaluator = PlanEvaluator(loaded, examples.inputs, examples.labels, known)
    generator, result = np.random.default_rng(0), []
    for kind in ("at random", "of a local search"):
        plan, seconds, differences = generator.integers(len(LEVELS), size=len(evaluator.names)), [], []
        evaluator(plan.tolist())
        for _ in range(plans):
            if kind == "at random":
                plan = generator.integers(len(LEVELS), size=len(plan))
            else:
                plan[generator.choice(len(plan), 2, replace=False)] = generator.integers(len(LEVELS), size=2)
            begun = time.process_time()
            ours = evaluator(plan.tolist())
            between = time.process_time()
            with torch.inference_mode():
                loss = F.cross_entropy(Plan.of(loaded, plan.tolist()).apply(loaded, known)(inputs), labels)
            seconds.append((between - begun, time.process_time() - between))
            differences.append(abs(ours.loss - float(loss)))
        quick, slow = np.median(seconds, axis=0)
        ratio = float(np.median([theirs / ours for ours, theirs in seconds]))
        result.append({
            "plans": kind, "cached_s": float(quick), "decompressed_s": float(slow), "ratio": ratio,
            "difference": max(differences),
        })  # fmt: skip
    return result


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
    """The optimiser steps and validations of `_metaopt_runner`, alone."""
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
