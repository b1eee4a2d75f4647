"""Policies that experiments train, kept beside what they were trained with."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from agents import tuned
from agents.baselines.metaopt import ID
from benchmarks import backends
from cost.files import write_text
from cost.machine import provenance

Record = dict[str, Any]


def learn(
    env_kwargs: dict[str, Any],
    seed: int,
    timesteps: int | None,
    path: Path,
    env_id: str = ID,
    prepare: Callable[..., Callable[[Any], object]] | None = None,
    **options: Any,
) -> Record:
    """Train PPO on the split `train` with the tuned settings, save it into the folder `path`, its record beside it.

    The record has the policy's folder, its arguments and settings, CPU seconds, commit and machine. A policy of the
    same arguments and settings that is there already is taken; raises `ValueError` for one of others.
    `prepare(agent, total_timesteps, **options)` gives what is called after each update.
    """
    import torch

    torch.set_num_threads(1)
    settings = tuned.settings("ppo", env_id, "own", **({"total_timesteps": timesteps} if timesteps else {}))
    wanted = {"env_kwargs": env_kwargs, "settings": settings, "seed": seed, **options}
    wanted = json.loads(json.dumps(wanted | ({"env_id": env_id} if env_id != ID else {})))
    beside = path.with_name(f"{path.name}.json")
    if beside.exists():
        found: Record = json.loads(beside.read_text())
        if {key: found.get(key) for key in wanted} != wanted:
            raise ValueError(f"{path} holds a policy of other settings; name another folder by --out")
        return found
    begun = time.process_time()
    agent = backends.make(env_id, "ppo", "own", env_kwargs, seed, settings)
    total = settings["total_timesteps"]
    agent.learn(total, prepare(agent, total, **options) if prepare else None)
    record: Record = {"path": str(path), **wanted, "seconds": time.process_time() - begun, **provenance()}
    agent.save(path)
    write_text(beside, json.dumps(record, indent=1))
    return record
