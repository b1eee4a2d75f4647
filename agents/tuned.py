"""Tuned settings of algorithms for our environments."""

from __future__ import annotations

import copy
from math import gcd
from typing import Any

BACKENDS = {"own": ("ppo", "reinforce"), "sb3": ("ppo", "a2c", "dqn", "qrdqn", "ppo_lstm", "ppo_mask")}
# Keyword arguments of SB3's and our algorithms for each environment; "linear 1e-3" falls to 0. PPO's were tuned on the
# validation split, the others' are PPO's where they share them. `n_envs` (rows) and `total_timesteps` are ours.
TUNED: dict[str, dict[str, dict[str, Any]]] = {
    "MoERouting-v0": {
        "ppo": {
            "n_envs": 128,
            "total_timesteps": 300_000,
            "n_steps": 32,
            "batch_size": 512,
            "n_epochs": 5,
            "learning_rate": "linear 1e-3",
            "gamma": 0.99,
            "gae_lambda": 0.8,
            "ent_coef": 0.003,
            "policy_kwargs": {"net_arch": [128, 128], "residual": True},
        },
        "reinforce": {
            "n_envs": 128,
            "total_timesteps": 300_000,
            "n_steps": 128,
            "batch_size": 256,
            "learning_rate": "linear 5e-4",
            "gamma": 0.99,
            "ent_coef": 0.08,
            "policy_kwargs": {"net_arch": [128, 128], "residual": True},
        },
        "a2c": {
            "n_envs": 128,
            "total_timesteps": 1_000_000,
            "n_steps": 16,
            "learning_rate": "linear 2e-3",
            "gamma": 0.99,
            "gae_lambda": 0.8,
            "ent_coef": 0.003,
            "normalize_advantage": True,
            "policy_kwargs": {"net_arch": [128, 128]},
        },
        "dqn": {
            "n_envs": 32,
            "total_timesteps": 500_000,
            "learning_rate": "linear 1e-3",
            "buffer_size": 200_000,
            "learning_starts": 10_000,
            "batch_size": 256,
            "train_freq": 4,
            "gradient_steps": 8,
            "target_update_interval": 2_000,
            "gamma": 0.99,
            "exploration_fraction": 0.3,
            "exploration_final_eps": 0.02,
            "policy_kwargs": {"net_arch": [128, 128]},
        },
    },
}
TUNED["MoERouting-v0"]["qrdqn"] = TUNED["MoERouting-v0"]["dqn"] | {
    "policy_kwargs": {"net_arch": [128, 128], "n_quantiles": 25},
}
TUNED["MoERouting-v0"]["ppo_lstm"] = TUNED["MoERouting-v0"]["ppo"] | {
    "total_timesteps": 500_000,
    "policy_kwargs": {"net_arch": [128], "lstm_hidden_size": 64},
}
TUNED["MoEMetaOpt-v0"] = {
    "ppo": {
        "n_envs": 32,
        "total_timesteps": 200_000,
        "n_steps": 32,
        "batch_size": 256,
        "n_epochs": 5,
        "learning_rate": "linear 1e-3",
        "gamma": 0.99,
        "gae_lambda": 0.95,
        "ent_coef": 0.005,
        "policy_kwargs": {"net_arch": [64, 64]},
    },
}
TUNED["MoEAutoRate-v0"] = {
    "ppo": {
        "n_envs": 32,
        "total_timesteps": 150_000,
        "n_steps": 64,
        "batch_size": 512,
        "n_epochs": 5,
        "learning_rate": "linear 1e-3",
        "gamma": 1.0,
        "gae_lambda": 0.95,
        "ent_coef": 0.002,
        "policy_kwargs": {"net_arch": [64, 64], "residual": True},
    },
}
TUNED["MoECompression-v0"] = {
    "ppo": {
        "n_envs": 32,
        "total_timesteps": 1_200_000,
        "n_steps": 42,
        "batch_size": 168,
        "n_epochs": 5,
        "learning_rate": "linear 1e-3",
        "gamma": 1.0,
        "gae_lambda": 1.0,
        "ent_coef": 0.001,
        "policy_kwargs": {"net_arch": [64, 64]},
    },
}
TUNED["MoELayerTopK-v0"] = {
    "ppo": {
        "n_envs": 256,
        "total_timesteps": 400_000,
        "n_steps": 32,
        "batch_size": 4096,
        "n_epochs": 2,
        "learning_rate": "linear 3e-4",
        "gamma": 0.95,
        "gae_lambda": 0.95,
        "normalize_rewards": True,
        "policy_kwargs": {"net_arch": [32], "residual": True},
    },
}
TUNED["MoEExpertCache-v0"] = {
    "ppo": {
        "n_envs": 256,
        "total_timesteps": 1_000_000,
        "n_steps": 128,
        "group_size": 8,
        "batch_size": 4096,
        "n_epochs": 4,
        "learning_rate": "linear 1e-3",
        "gamma": 0.998,  # an expert that is loaded serves many tokens
        "gae_lambda": 0.995,
        "normalize_rewards": True,
        "policy_kwargs": {"net_arch": [64, 64], "residual": True, "equivariant": True},
    },
}
TUNED["MoEServing-v0"] = {
    "ppo": {
        "n_envs": 64,
        "total_timesteps": 1_000_000,
        "n_steps": 128,
        "batch_size": 2048,
        "n_epochs": 4,
        "learning_rate": "linear 3e-4",
        "gamma": 1.0,
        "gae_lambda": 0.95,
        "normalize_rewards": True,
        "policy_kwargs": {"net_arch": [64, 64], "residual": True},
    },
}
TUNED["MoERoutingLive-v0"] = TUNED["MoERouting-v0"]


def settings(algo: str, env_id: str, backend: str = "own", **overrides: Any) -> dict[str, Any]:
    """Tuned settings of an algorithm for an environment, or its defaults, with overrides. If `n_envs` is overridden, a
    tuned `group_size` is lowered to one that divides it."""
    if algo not in BACKENDS.get(backend, ()):
        known = "; ".join(f"{name}: {', '.join(algorithms)}" for name, algorithms in BACKENDS.items())
        raise ValueError(f"algo={algo!r} of backend={backend!r} is not one of {known}")
    tuned = copy.deepcopy(TUNED.get(env_id.split(":")[-1], {}).get(algo, {"n_envs": 8, "total_timesteps": 100_000}))
    if backend == "sb3":
        tuned.pop("group_size", None)  # of our learners only, as these:
        for name in ("residual", "equivariant"):
            tuned.get("policy_kwargs", {}).pop(name, None)
    rows = overrides.get("n_envs")
    if "group_size" in tuned and isinstance(rows, int):
        tuned["group_size"] = gcd(tuned["group_size"], rows)
    return tuned | overrides


def rl_zoo(algo: str) -> str:
    """Settings of an SB3 algorithm in the format of RL Baselines3 Zoo, as in `agents/rl_zoo/ALGO.yml`.

    Use: python -m rl_zoo3.train --algo ppo --env MoERouting-v0 --gym-packages moe_envs --conf-file ppo.yml
    """
    lines = [f"# python -m rl_zoo3.train --algo {algo} --env ID --gym-packages moe_envs --conf-file {algo}.yml"]
    for env_id, algorithms in TUNED.items():
        if algo not in algorithms:
            continue
        lines += [f"{env_id}:", f"  policy: {'MlpLstmPolicy' if algo == 'ppo_lstm' else 'MlpPolicy'}"]
        for name, value in settings(algo, env_id, "sb3").items():
            if name == "policy_kwargs":
                value = '"dict(' + ", ".join(f"{key}={each}" for key, each in value.items()) + ')"'
            elif name == "normalize_rewards":
                name, value = "normalize", '"dict(norm_obs=False, norm_reward=True)"'
            elif isinstance(value, str):
                value = value.replace("linear ", "lin_")
            lines.append(
                f"  {'n_timesteps' if name == 'total_timesteps' else name}: {'true' if value is True else value}"
            )
    return "\n".join(lines) + "\n"
