"""A policy of MoECompression-v0 as a plan for a model: levels that `Plan.compress` applies to a checkpoint."""

from __future__ import annotations

from typing import Any

import numpy as np

from agents.evaluate import takes_masks
from experts.compression.plan import Plan
from moe_envs.compression.env import MoECompressionVectorEnv

# Arguments that a plan's walk has its own of.
OF_TRAINING = ("model", "budget", "split", "evaluation", "shaped", "max_episode_steps", "autoreset_mode", "render_mode")


def levels_of(
    policy: Any,
    model: str,
    budgets: list[int],
    deterministic: bool = True,
    repeats: int = 1,
    masks: bool = True,
    env_kwargs: dict[str, Any] | None = None,
) -> np.ndarray:
    """The levels `[budgets, repeats, U]` that a policy, ours or SB3's, gives the units of a reference model.

    What it sees are sensitivities, measured once for a model (U x 14 evaluations); nothing else is run. `env_kwargs`
    are those of the environment that the policy was trained in, for ours as they were saved. With `masks` a policy
    whose `predict` takes action masks gets them. Raises `ValueError` for a policy of another environment.
    """
    return np.stack([_walk(policy, _env(policy, model, budget, repeats, env_kwargs), deterministic, masks)
                     for budget in budgets])  # fmt: skip


def plan_of(policy: Any, model: str, budget: int, masks: bool = True, env_kwargs: dict[str, Any] | None = None) -> Plan:
    """The plan that a policy gives a reference model within a budget of bytes; arguments as of `levels_of`."""
    env = _env(policy, model, budget, 1, env_kwargs)
    return env.tables.models[0].plan(_walk(policy, env, True, masks)[0])


def _env(policy: Any, model: str, budget: int, rows: int, env_kwargs: dict[str, Any] | None) -> MoECompressionVectorEnv:
    if budget is None:
        raise ValueError("budget=None: a plan is for a number of bytes")
    saved = getattr(policy, "arguments", {}).get("env_kwargs", {}) if env_kwargs is None else env_kwargs
    arguments = {key: value for key, value in saved.items() if key not in OF_TRAINING}
    env = MoECompressionVectorEnv(rows, model=model, budget=budget, evaluation="additive", **arguments)
    spaces = env.single_observation_space, env.single_action_space
    of_policy = getattr(policy, "rows", policy)
    if (of_policy.observation_space, of_policy.action_space) != spaces:
        raise ValueError(
            f"the policy observes {of_policy.observation_space} and acts in {of_policy.action_space}: it is not of "
            "MoECompression-v0"
        )
    return env


def _walk(policy: Any, env: MoECompressionVectorEnv, deterministic: bool, masks: bool) -> np.ndarray:
    masked = masks and takes_masks(policy)
    observation, _ = env.reset(seed=0)
    state, start = None, np.ones(env.num_envs, dtype=np.bool_)
    for _ in env.tables.units:
        more = {"action_masks": env.action_masks()} if masked else {}
        actions, state = policy.predict(observation, state, start, deterministic=deterministic, **more)
        observation, *_ = env.step(np.asarray(actions))
        start = np.zeros_like(start)
    return env.levels.copy()
