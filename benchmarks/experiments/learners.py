"""Are our learners as good as SB3's? PPO with equal settings: returns of the final policies and CPU seconds."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd

from agents import training, tuned
from benchmarks.results.statistics import welch_interval
from benchmarks.runner.setup import Arguments
from cost.timing import torch_threads

ROUTING = "moe_envs:MoERouting-v0"
# CartPole: RL Baselines3 Zoo settings with a constant clip range. Acrobot: close to the Zoo, without normalisation.
PPO: dict[str, dict[str, Any]] = {
    "CartPole-v1": {
        "n_envs": 8, "total_timesteps": 100_000, "n_steps": 32, "batch_size": 256, "n_epochs": 20,
        "gae_lambda": 0.8, "gamma": 0.98, "learning_rate": "linear 1e-3",
    },
    "Acrobot-v1": {
        "n_envs": 16, "total_timesteps": 200_000, "n_steps": 256, "batch_size": 256, "n_epochs": 4,
        "gae_lambda": 0.94, "gamma": 0.99, "learning_rate": 1e-3,
    },
    ROUTING: tuned.settings("ppo", ROUTING, "sb3"),
}  # fmt: skip
SEEDS = tuple(range(10))
SETTINGS = {f"{env}, {backend}": {"env": env, "backend": backend} for env in PPO for backend in ("own", "sb3")}
QUICK = {"seeds": [0, 1], "settings": {"timesteps": 4096, "episodes": 20}}


class LearnerSetup(Arguments):
    """`timesteps` overrides the default; the final policy is evaluated on `episodes` episodes."""

    env: Literal["CartPole-v1", "Acrobot-v1", "moe_envs:MoERouting-v0"]
    backend: Literal["own", "sb3"]
    timesteps: int | None = None
    episodes: int = 200


Setup = LearnerSetup


def measure(setup: LearnerSetup, seed: int, split: str, folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Train once; returns the mean return of the deterministic final policy."""
    from stable_baselines3.common.env_util import make_vec_env
    from stable_baselines3.common.evaluation import evaluate_policy

    from agents.evaluate import evaluate

    values = dict(PPO[setup.env])
    total = setup.timesteps or values["total_timesteps"]
    with torch_threads(1):
        begun = time.process_time()
        agent = training.make(setup.env, "ppo", setup.backend, {}, seed, values)
        agent.learn(total)
        seconds = time.process_time() - begun
        if setup.env == ROUTING:
            mean = float(evaluate(agent, setup.env, 5 * setup.episodes, split="test")["return"].mean())
        else:
            found, _ = evaluate_policy(agent, make_vec_env(setup.env, 8, seed=10_000 + seed), setup.episodes)
            mean = float(np.mean(found))
    return {"return": mean}, {"train_s": seconds}


def score(frame: pd.DataFrame) -> dict[str, Any]:
    """Mean returns per environment, their difference with 95 % Welch interval, and CPU seconds."""
    rows = []
    for env, group in frame.groupby("env", sort=False):
        own, sb3 = (group[group["backend"] == backend] for backend in ("own", "sb3"))
        if len(own) and len(sb3):
            rows.append({
                "environment": env, "seeds": len(own), "own": float(own["return"].mean()),
                "SB3": float(sb3["return"].mean()),
                "difference": float(own["return"].mean() - sb3["return"].mean()),
                "95 %": welch_interval(own["return"].to_numpy(), sb3["return"].to_numpy()),
                "own, CPU s": float(own["train_s"].median()), "SB3, CPU s": float(sb3["train_s"].median()),
            })  # fmt: skip
    return {"tables": {"Returns of final policies": rows}}
