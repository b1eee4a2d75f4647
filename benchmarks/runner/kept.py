"""Results shared by several runs of a matrix: trained policies, and what a search found."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from agents import runs, training, tuned
from agents.checkpoints import MANIFEST
from benchmarks.runner.experiments import RunnerError
from cost.files import load_json, locked, save_json, sha256_of
from cost.timing import torch_threads


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


def run_of(folder: Path, env_id: str, env_kwargs: dict[str, Any], seed: int, timesteps: int | None = None) -> Path:
    """The folder of a run of PPO with tuned settings, of the best weights on validation, trained once for all runs of a
    matrix; `policy_of` keeps the last weights."""
    said = json.dumps([env_id, env_kwargs, seed, timesteps], sort_keys=True)
    place = folder / f"run-{sha256_of(said.encode())[:16]}"
    with locked(place):
        if not (place / runs.SETTINGS).exists():
            more = {"total_timesteps": timesteps} if timesteps else {}
            with torch_threads(1):
                runs.train(env_id, "ppo", seed, place, env_kwargs, more, overwrite=True)
    return place


def found_once(path: Path, search: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """The result of a search as JSON, searched once for all runs, in a sealed file whose name must identify it."""
    with locked(path):
        if not path.exists():
            save_json(path, search())
        return load_json(path, RunnerError, "delete it, and it is searched anew")
