"""Compression plans from policies of MoECompression-v0."""

from __future__ import annotations

from typing import Any

import numpy as np

from agents.evaluate import takes_masks
from experts.compression.plan import Plan
from moe_envs.compression.env import MoECompressionVectorEnv

# Environment arguments that are set by the plan itself.
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
    """Levels `[budgets, repeats, U]` that a policy, ours or SB3's, selects for the units of a reference model.

    The policy observes sensitivities, which are measured once per model (U x 14 evaluations). `env_kwargs` are the
    arguments of the training environment; our policies have them saved. With `masks`, action masks are passed to a
    `predict` that accepts them. Raises `ValueError` for a policy of another environment.
    """
    return np.stack([_walk(policy, _env(policy, model, budget, repeats, env_kwargs), deterministic, masks)
                     for budget in budgets])  # fmt: skip


def plan_of(policy: Any, model: str, budget: int, masks: bool = True, env_kwargs: dict[str, Any] | None = None) -> Plan:
    """Plan that a policy selects for a reference model within a byte budget; arguments as in `levels_of`."""
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
