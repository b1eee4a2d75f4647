"""Steps per second of MoERouting-v0 beside CartPole-v1: CPU time, one thread, interleaved in one run, medians."""

import statistics
import time
from collections.abc import Callable
from typing import Any

import gymnasium
import numpy as np

ROUNDS = 9
# rows (1: the single environment through gymnasium.make) -> steps a round, and the ratio that is asked for
CASES = {1: (20_000, 2.5), 64: (4_000, 2.0), 1024: (1_000, None), 4096: (300, 0.65)}


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
