"""A policy of MoECompression-v0 as a plan for a model: levels that `Plan.compress` applies to a checkpoint."""

from __future__ import annotations

from typing import Any

import numpy as np

from experts.compression.plan import Plan
from moe_envs.compression import MoECompressionVectorEnv


def levels_of(
    policy: Any, model: str, budgets: list[int], deterministic: bool = True, repeats: int = 1, **env_kwargs: Any
) -> np.ndarray:
    """The levels `[budgets, repeats, U]` that a policy, ours or SB3's, gives the units of a reference model.

    No model is run. `env_kwargs` are those of the environment that the policy was trained in.
    """
    arguments = {**env_kwargs, "model": model, "evaluation": "additive", "split": "train"}
    found = []
    for budget in budgets:
        env = MoECompressionVectorEnv(repeats, **(arguments | {"budget": budget}))
        observation, _ = env.reset(seed=0)
        for _ in env.tables.units:
            masks = {"action_masks": env.action_masks()} if _takes_masks(policy) else {}
            actions, _ = policy.predict(observation, deterministic=deterministic, **masks)
            observation, *_ = env.step(np.asarray(actions))
        found.append(env.levels.copy())
    return np.stack(found)


def plan_of(policy: Any, model: str, budget: int, **env_kwargs: Any) -> Plan:
    """The plan that a policy gives a reference model within a budget of bytes."""
    levels = levels_of(policy, model, [budget], **env_kwargs)[0, 0]
    env = MoECompressionVectorEnv(1, **(env_kwargs | {"model": model, "evaluation": "additive"}))
    return env.tables.models[0].plan(levels)


def _takes_masks(policy: Any) -> bool:
    """Whether `predict` knows `action_masks`: our learners' and MaskablePPO's do."""
    return "action_masks" in policy.predict.__code__.co_varnames
