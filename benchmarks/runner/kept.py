"""Trained policies shared by several runs of a matrix."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from agents import training, tuned
from cost.files import locked


def policy_of(path: Path, env_id: str, env_kwargs: dict[str, Any], seed: int, timesteps: int | None = None) -> Any:
    """PPO trained with tuned settings, or loaded from the folder `path`, whose name must identify the training."""
    from agents.ppo import PPO

    with locked(path):
        if not path.exists():
            settings = tuned.settings("ppo", env_id)
            settings |= {"total_timesteps": timesteps} if timesteps else {}
            agent = training.make(env_id, "ppo", "own", env_kwargs, seed, settings)
            agent.learn(settings["total_timesteps"])
            agent.save(path)
    return PPO.load(path)
