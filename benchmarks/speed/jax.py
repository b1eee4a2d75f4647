"""How fast is our PPO compared with a fully jitted JAX PPO on MoERouting-v0? Needs the extra bench."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pandas as pd

from benchmarks.results.tables import renamed
from benchmarks.runner.setup import Arguments

ID = "moe_envs:MoERouting-v0"
CASES = [(8, 128, 64), (64, 128, 64), (1024, 32, 64), (64, 128, 1024), (1024, 32, 4096)]  # rows, steps, minibatch
EPOCHS = 4  # as in `benchmarks.programs.jax_ppo`
ONE_THREAD = "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"
SEEDS = (0,)
SETTINGS = {
    f"{rows} rows, minibatch {size}": {"rows": rows, "steps": steps, "batch_size": size} for rows, steps, size in CASES
}
QUICK = {"setups": dict(list(SETTINGS.items())[:1]), "settings": {"timesteps": 2048, "rounds": 1}}


class JaxSpeed(Arguments):
    """`rounds` alternate between the learners, with `timesteps` each."""

    rows: int
    steps: int
    batch_size: int
    timesteps: int = 131_072
    rounds: int = 3


Setup = JaxSpeed


def measure(setup: JaxSpeed, seed: int, split: str, folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Medians and median ratio of alternating runs; compilation is excluded. Raises `ValueError` without JAX.

    JAX runs in a separate process because its threads must be set before import.
    """
    if find_spec("jax") is None:
        raise ValueError("jax is not installed: pip install 'moe-envs[bench]'")
    from threadpoolctl import threadpool_limits

    from agents import PPO
    from benchmarks.speed.ppo import rate
    from cost.timing import torch_threads

    environment = os.environ | {"XLA_FLAGS": ONE_THREAD, "OMP_NUM_THREADS": "1", "JAX_PLATFORMS": "cpu"}
    rows, steps, size = setup.rows, setup.steps, setup.batch_size
    with threadpool_limits(1, "blas"), torch_threads(1):
        agent = PPO(
            "MlpPolicy", ID, env_kwargs={"observation": "features"}, n_envs=rows, n_steps=steps, batch_size=size,
            n_epochs=EPOCHS,
        ).learn(rows * steps)  # fmt: skip
        command = [sys.executable, "-m", "benchmarks.programs.jax_ppo", *map(str, (rows, steps, size, setup.timesteps))]
        with subprocess.Popen(
            command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        ) as process:
            rates = [(rate(agent, setup.timesteps), _ask(process)) for _ in range(setup.rounds)]
            process.communicate("\n")
    ours, theirs = (statistics.median(column) for column in zip(*rates, strict=True))
    return {}, {"own": ours, "jax": theirs, "ratio": statistics.median(own / jax for own, jax in rates)}


def score(frame: pd.DataFrame) -> dict[str, Any]:
    """One row per case."""
    columns = {"rows": "rows", "batch_size": "minibatch", "own": "own, steps/s", "jax": "JAX, steps/s",
               "ratio": "own / JAX"}  # fmt: skip
    return {"tables": {"Steps per second of CPU time, medians": renamed(frame, columns)}}


def _ask(process: subprocess.Popen[str]) -> float:
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write("go\n")
    process.stdin.flush()
    return float(json.loads(process.stdout.readline())["rate"])
