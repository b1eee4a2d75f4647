"""How fast is our PPO compared with SB3? Steps per CPU second on one thread; same network, batch size and epochs."""

from __future__ import annotations

import statistics
import time
from pathlib import Path
from typing import Any

import gymnasium
import pandas as pd
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from threadpoolctl import threadpool_limits

from agents import training
from benchmarks.results.tables import renamed
from benchmarks.runner.setup import Arguments
from cost.timing import torch_threads

ROUTING = "moe_envs:MoERouting-v0"
SINGLES = ", single environments"  # both step the same; SB3 cannot use Gymnasium's vector CartPole
CASES = [  # environment, rows, steps of a rollout, minibatch: 64 is SB3's default
    ("CartPole-v1", 8, 128, 64), ("CartPole-v1", 64, 128, 64), ("CartPole-v1" + SINGLES, 8, 128, 64),
    ("CartPole-v1" + SINGLES, 64, 128, 64), (ROUTING, 8, 128, 64), (ROUTING, 64, 128, 64), (ROUTING, 1024, 32, 64),
    ("CartPole-v1", 8, 128, 256), ("CartPole-v1", 64, 128, 1024), ("CartPole-v1" + SINGLES, 64, 128, 1024),
    (ROUTING, 8, 128, 256), (ROUTING, 64, 128, 1024), (ROUTING, 1024, 32, 4096),
]  # fmt: skip
SEEDS = (0,)
SETTINGS = {
    f"{env}, {rows} rows, minibatch {batch}": {"env": env, "rows": rows, "steps": steps, "batch_size": batch}
    for env, rows, steps, batch in CASES
}
QUICK = {"setups": dict(list(SETTINGS.items())[:1]), "settings": {"timesteps": 1024, "rounds": 1}}


class SpeedSetup(Arguments):
    """`rounds` alternate between the learners, with `timesteps` each."""

    env: str
    rows: int
    steps: int
    batch_size: int
    timesteps: int = 32_768
    rounds: int = 3

    @property
    def imports(self) -> tuple[str, ...]:
        """What a run of this setup would import."""
        return () if self.env.rpartition(":")[0] in ("", "moe_envs") else (self.env,)


Setup = SpeedSetup


def measure(setup: SpeedSetup, seed: int, split: str, folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Medians and median ratio of alternating runs."""
    values = {"n_envs": setup.rows, "n_steps": setup.steps, "batch_size": setup.batch_size, "n_epochs": 4}
    with torch_threads(1), threadpool_limits(1, "blas"):
        agents = _both(setup.env, values)
        for agent in agents:
            agent.learn(setup.rows * setup.steps)
        rates = [[rate(agent, setup.timesteps) for agent in agents] for _ in range(setup.rounds)]
    own, sb3 = (statistics.median(each) for each in zip(*rates, strict=True))
    return {}, {"own": own, "sb3": sb3, "ratio": statistics.median(ours / theirs for ours, theirs in rates)}


def rate(agent: Any, steps: int) -> float:
    """Training steps per second of CPU time of an agent of either backend."""
    begun, before = time.process_time(), agent.num_timesteps
    agent.learn(steps, reset_num_timesteps=False)
    return float((agent.num_timesteps - before) / (time.process_time() - begun))


def _both(name: str, values: dict[str, Any]) -> list[Any]:
    from agents import PPO

    env_id = name.removesuffix(SINGLES)
    agents = [training.make(env_id, "ppo", backend, {}, 0, values) for backend in ("own", "sb3")]
    if env_id != name:
        makers = [lambda: gymnasium.make(env_id)] * values["n_envs"]
        settings = {key: value for key, value in values.items() if key != "n_envs"}
        agents[0] = PPO("MlpPolicy", SyncVectorEnv(makers, autoreset_mode=AutoresetMode.SAME_STEP), **settings)
    return agents


def score(frame: pd.DataFrame) -> dict[str, Any]:
    """One row per case."""
    columns = {"env": "environment", "rows": "rows", "batch_size": "minibatch", "own": "own, steps/s",
               "sb3": "SB3, steps/s", "ratio": "own / SB3"}  # fmt: skip
    return {"tables": {"Steps per second of CPU time, medians": renamed(frame, columns)}}
