"""REINFORCE with a learned baseline (Williams 1992)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
from gymnasium.vector import VectorEnv

from agents.distributions import Evaluation
from agents.learner import Learner, Logs


class REINFORCE(Learner):
    """Policy gradient on Monte Carlo returns less a learned baseline, one update for each rollout.

    An episode that a rollout's end cuts is continued by the baseline. `env` and settings as in `PPO`; `batch_size` is
    the whole rollout unless given.
    """

    name = "REINFORCE"

    def __init__(
        self,
        env: str | gymnasium.Env[Any, Any] | VectorEnv[Any, Any, Any],
        *,
        n_envs: int = 8,
        env_kwargs: dict[str, Any] | None = None,
        seed: int = 0,
        device: str = "cpu",
        tensorboard_log: str | Path | None = None,
        learning_rate: float | str = 1e-3,
        n_steps: int = 128,
        batch_size: int | None = None,
        gamma: float = 0.99,
        gae_lambda: float = 1.0,
        normalize_advantage: bool = True,
        ent_coef: float = 0.0,
        vf_coef: float = 0.5,
        max_grad_norm: float = 0.5,
        temperature: float | str = 1.0,
        normalize_observations: bool = False,
        normalize_rewards: bool = False,
        policy_kwargs: dict[str, Any] | None = None,
    ) -> None:
        settings = {
            "learning_rate": learning_rate, "n_steps": n_steps, "batch_size": batch_size,
            "gamma": gamma, "gae_lambda": gae_lambda, "ent_coef": ent_coef, "normalize_advantage": normalize_advantage,
            "vf_coef": vf_coef, "max_grad_norm": max_grad_norm, "temperature": temperature,
            "normalize_observations": normalize_observations, "normalize_rewards": normalize_rewards,
            "policy_kwargs": policy_kwargs,
        }  # fmt: skip
        super().__init__(env, n_envs, env_kwargs, seed, device, tensorboard_log, settings)

    def gradient(self, evaluation: Evaluation, log_prob: np.ndarray, advantages: np.ndarray) -> tuple[np.ndarray, bool]:
        """Minus the advantages."""
        return -advantages, False

    def losses(self, evaluation: Evaluation, log_prob: np.ndarray, advantages: np.ndarray) -> Logs:
        """The policy gradient's."""
        return {"train/policy_gradient_loss": -float((advantages * evaluation.log_prob).mean())}
