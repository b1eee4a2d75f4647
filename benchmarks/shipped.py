"""How the shipped parts of MoEAutoRate-v0 are made: references of contexts, and the estimator."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from typing import Any

import gymnasium
import numpy as np

from experts import tasks
from moe_envs.autorate import estimator, references
from moe_envs.autorate.env import BATCH_SIZE, STEPS
from moe_envs.autorate.signals import KEEP
from moe_envs.autorate.trainings import CONTEXTS

ID = "moe_envs:MoEAutoRate-v0"
TRAINED_ON: dict[str, Any] = {"task": list(tasks.SHIPPED), "steps_per_action": [10, 25], "batch_size": [32, 128]}
SPREAD, DECISIONS, CHANGES = (0.02, 30.0), 8, ((1, KEEP, 5), (0.15, 0.7, 0.15))  # of what the estimator learns from


def ship(report: Callable[[str], object]) -> None:
    """Make both, in 40 minutes on one core."""
    for name in tasks.SHIPPED:
        path = references.shipped_path(name, STEPS, BATCH_SIZE)
        references.save(tasks.load(name), STEPS, BATCH_SIZE, path)
        report(f"references {path}")
    estimator.save(estimator.blank())  # the trainings that it is fitted on observe one, and make no use of it
    estimator.save(estimated())
    report(f"estimator {estimator.PATH}")


def estimated(seeds: tuple[int, ...] = (0, 1)) -> estimator.RateEstimator:
    """The estimator of the training contexts, whose rates are changed at random."""
    names, values = zip(*TRAINED_ON.items(), strict=True)
    found = [_decisions(seed, **dict(zip(names, each, strict=True))) for each in product(*values) for seed in seeds]
    observations, offsets = (np.concatenate([each[part] for each in found], axis=1) for part in (0, 1))
    return estimator.fit(observations, offsets)


def _decisions(seed: int, **arguments: Any) -> tuple[np.ndarray, np.ndarray]:
    """Observations after each decision `[decisions, contexts, size]`, and log10 of the rate over the best cosine's."""
    count, generator = CONTEXTS["train"], np.random.default_rng(seed)
    env: Any = gymnasium.make_vec(
        ID, count, "vector_entry_point", autoreset_mode="Disabled", spread=SPREAD, **arguments
    ).unwrapped
    env.reset(seed=seed)
    observations, offsets = [], []
    for _ in range(DECISIONS):
        observation, *_ = env.step(generator.choice(CHANGES[0], size=count, p=CHANGES[1]))
        observations.append(observation)
        offsets.append(np.log10(env.rate / env.references.tuned[env.context]))
    env.close()
    return np.stack(observations), np.stack(offsets)
