"""Proximal policy optimisation (Schulman et al. 2017), with SB3's settings and several times its speed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
from gymnasium.vector import VectorEnv

from agents.distributions import Evaluation
from agents.learner import Learner, Logs


class PPO(Learner):
    """PPO with SB3's names and defaults; an update costs a fraction of SB3's, the results are as good.

    `env` is an id, as "moe_envs:MoERouting-v0" (made with `n_envs` rows and `env_kwargs`, by its vector face where it
    has one), or an environment. See `Learner` for schedules, `policy_kwargs` and `temperature`.
    """

    name = "PPO"

    def __init__(
        self,
        env: str | gymnasium.Env[Any, Any] | VectorEnv[Any, Any, Any],
        *,
        n_envs: int = 8,
        env_kwargs: dict[str, Any] | None = None,
        seed: int = 0,
        device: str = "cpu",
        tensorboard_log: str | Path | None = None,
        learning_rate: float | str = 3e-4,
        n_steps: int = 2048,
        batch_size: int = 64,
        n_epochs: int = 10,
        gamma: float = 0.99,
        gae_lambda: float = 0.95,
        clip_range: float = 0.2,
        normalize_advantage: bool = True,
        ent_coef: float = 0.0,
        vf_coef: float = 0.5,
        max_grad_norm: float = 0.5,
        target_kl: float | None = None,
        temperature: float | str = 1.0,
        normalize_observations: bool = False,
        normalize_rewards: bool = False,
        policy_kwargs: dict[str, Any] | None = None,
    ) -> None:
        settings = {
            "learning_rate": learning_rate, "n_steps": n_steps, "batch_size": batch_size, "n_epochs": n_epochs,
            "gamma": gamma, "gae_lambda": gae_lambda, "clip_range": clip_range, "ent_coef": ent_coef,
            "normalize_advantage": normalize_advantage, "vf_coef": vf_coef, "max_grad_norm": max_grad_norm,
            "target_kl": target_kl, "temperature": temperature, "normalize_observations": normalize_observations,
            "normalize_rewards": normalize_rewards, "policy_kwargs": policy_kwargs,
        }  # fmt: skip
        super().__init__(env, n_envs, env_kwargs, seed, device, tensorboard_log, settings)

    def gradient(self, evaluation: Evaluation, log_prob: np.ndarray, advantages: np.ndarray) -> tuple[np.ndarray, bool]:
        """The clipped surrogate's; stops where the estimated divergence exceeds 1.5 `target_kl`."""
        target, clip = self.settings["target_kl"], self.settings["clip_range"]
        change = evaluation.log_prob - log_prob
        ratio = np.exp(change)
        stop = target is not None and float((ratio - 1 - change).mean()) > 1.5 * target
        bound = np.where(advantages > 0, np.float32(1 + clip), np.float32(1 - clip))
        gained = ratio * advantages
        return np.where(gained <= bound * advantages, -gained, np.float32(0)), stop

    def losses(self, evaluation: Evaluation, log_prob: np.ndarray, advantages: np.ndarray) -> Logs:
        """With the estimated divergence (Schulman 2020, "Approximating KL divergence") and the share clipped."""
        change, clip = evaluation.log_prob - log_prob, self.settings["clip_range"]
        ratio = np.exp(change)
        held = np.clip(ratio, 1 - clip, 1 + clip)
        return {
            "train/policy_gradient_loss": -float(np.minimum(ratio * advantages, held * advantages).mean()),
            "train/approx_kl": float((ratio - 1 - change).mean()),
            "train/clip_fraction": float((np.abs(ratio - 1) > clip).mean()),
        }
