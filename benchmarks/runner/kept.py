"""Policies that several runs of a matrix need, trained once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from agents import training, tuned
from cost.files import locked


def policy_of(path: Path, env_id: str, env_kwargs: dict[str, Any], seed: int, timesteps: int | None = None) -> Any:
    """Our PPO after a training with its tuned settings, kept in the folder `path`, whose name says of what it is."""
    from agents.ppo import PPO

    with locked(path):
        if not path.exists():
            settings = tuned.settings("ppo", env_id)
            settings |= {"total_timesteps": timesteps} if timesteps else {}
            agent = training.make(env_id, "ppo", "own", env_kwargs, seed, settings)
            agent.learn(settings["total_timesteps"])
            agent.save(path)
    return PPO.load(path)
