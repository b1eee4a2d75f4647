"""Evaluation of any policy in our environments: one row per episode, paired by seed."""

from __future__ import annotations

import importlib
import inspect
from typing import Any, Protocol

import gymnasium
import numpy as np
import pandas as pd
from gymnasium.envs.registration import EnvSpec
from gymnasium.vector import AutoresetMode, VectorEnv

MAX_ROWS = 1000


class Policy(Protocol):
    """Batched version of SB3's policy interface.

    It may have `env_kwargs`, arguments required of its environment (e.g. subset actions), and `watch(env)`, which
    passes the vector environment to baselines and bounds that inspect it.
    """

    def predict(
        self,
        observation: np.ndarray,
        state: Any = None,
        episode_start: np.ndarray | None = None,
        deterministic: bool = False,
    ) -> tuple[np.ndarray, Any]: ...


def evaluate(policy: Policy, env_id: str, episodes: int = 300, seed: int = 0, **env_kwargs: Any) -> pd.DataFrame:
    """Run `episodes` episodes; columns: episode, return, quality, cost (relative), the sums of `cost/*` and the last
    values of other scalars in `info`. The same seed and number of episodes give the same episodes for every policy."""
    arguments = {**env_kwargs, **getattr(policy, "env_kwargs", {})}
    env = make_rows(env_id, min(episodes, MAX_ROWS), **arguments)
    try:
        return play(policy, env, episodes, seed)
    finally:
        env.close()


def spec_of(env_id: str) -> EnvSpec:
    """The spec of an environment; its package is imported if the id names one ("package:Name-v0").

    Raises `gymnasium.error.Error` for an unknown id.
    """
    module, _, name = env_id.rpartition(":")
    if module:
        importlib.import_module(module)
    return gymnasium.spec(name)


def make_rows(env_id: str, rows: int, **env_kwargs: Any) -> VectorEnv[Any, Any, Any]:
    """Create the native vector environment for `play`."""
    mode = AutoresetMode.SAME_STEP.value
    return gymnasium.make_vec(
        env_id, num_envs=rows, vectorization_mode="vector_entry_point", autoreset_mode=mode, **env_kwargs
    )


def play(
    policy: Policy,
    env: VectorEnv[Any, Any, Any],
    episodes: int,
    seed: int | list[int],
    options: dict[str, Any] | None = None,
) -> pd.DataFrame:
    """Evaluate in an environment of `make_rows`, which policies can share; `seed` is one seed, or one per row;
    `options` of `reset` are those of each row's first episode."""
    if hasattr(policy, "watch"):
        policy.watch(env.unwrapped)
    rows, finished, records = env.num_envs, 0, []
    observation, _ = env.reset(seed=seed, options=options)  # type: ignore[arg-type]
    state, start, played = None, np.ones(rows, dtype=np.bool_), np.zeros(rows, dtype=np.int64)
    masked = takes_masks(policy) and hasattr(env.unwrapped, "action_masks")
    sums = {key: np.zeros(rows) for key in ("return", "reward/quality", "reward/cost")}
    wanted = episodes // rows + (np.arange(rows) < episodes % rows)
    while finished < episodes:
        more = {"action_masks": env.unwrapped.action_masks()} if masked else {}  # type: ignore[attr-defined]
        action, state = policy.predict(observation, state=state, episode_start=start, deterministic=True, **more)
        observation, reward, terminated, truncated, infos = env.step(action)
        start = terminated | truncated
        scalars = _scalars(infos, start)
        for key in scalars:
            if key.startswith(("reward/", "cost/")):
                sums[key] = sums.get(key, 0.0) + scalars[key]
        sums["return"] = sums["return"] + reward
        for row in (start & (played < wanted)).nonzero()[0]:
            last = {key: value[row].item() for key, value in scalars.items() if key not in sums}
            total = {key: value[row].item() for key, value in sums.items()}
            records.append({"episode": int(played[row] * rows + row)} | total | last)
        finished = len(records)
        played += start
        sums = {key: np.where(start, 0.0, value) for key, value in sums.items()}
    frame = pd.DataFrame(records).rename(columns={"reward/quality": "quality", "reward/cost": "cost"})
    return frame.sort_values("episode", ignore_index=True)


def takes_masks(policy: Any) -> bool:
    """Whether `predict` accepts `action_masks`, as our learners and MaskablePPO do."""
    return "action_masks" in inspect.signature(policy.predict).parameters


def _scalars(infos: dict[str, Any], ended: np.ndarray) -> dict[str, np.ndarray]:
    """Scalar infos of all rows, from `final_info` for ended rows."""
    final = infos.get("final_info", {})
    keys = [key for key in {**infos, **final} if "/" in key and key[0] != "_"]
    return {key: np.where(ended, final.get(key, 0), infos.get(key, 0)) for key in keys}
