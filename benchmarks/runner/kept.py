"""Results shared by several runs of a matrix: trained policies, and what a search found."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from agents import training, tuned
from agents.checkpoints import MANIFEST
from benchmarks.runner.experiments import RunnerError
from cost.files import load_json, locked, save_json


def policy_of(path: Path, env_id: str, env_kwargs: dict[str, Any], seed: int, timesteps: int | None = None) -> Any:
    """PPO trained with tuned settings, or loaded from the folder `path`, whose name must identify the training."""
    from agents.ppo import PPO

    with locked(path):
        if not (path / MANIFEST).exists():
            settings = tuned.settings("ppo", env_id)
            settings |= {"total_timesteps": timesteps} if timesteps else {}
            agent = training.make(env_id, "ppo", "own", env_kwargs, seed, settings)
            agent.learn(settings["total_timesteps"])
            agent.save(path)
    return PPO.load(path)


def found_once(path: Path, search: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """The result of a search as JSON, searched once for all runs, in a sealed file whose name must identify it."""
    with locked(path):
        if not path.exists():
            save_json(path, search())
        return load_json(path, RunnerError, "delete it, and it is searched anew")
