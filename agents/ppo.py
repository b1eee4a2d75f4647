"""Proximal policy optimisation (Schulman et al. 2017), with SB3's settings and several times its speed."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from agents.distributions import Evaluation
from agents.learner import Learner
from agents.settings import Settings
from cost.arguments import Count, Positive


@dataclass(frozen=True, kw_only=True)
class PPOSettings(Settings):
    """Settings of PPO with the defaults of SB3."""

    n_epochs: Count = 10
    clip_range: Positive = 0.2
    target_kl: Positive | None = None


class PPO(Learner):
    """PPO with SB3's names and defaults, `PPO("MlpPolicy", env)`; with updates several times faster than SB3's."""

    name = "PPO"
    settings_class = PPOSettings
    settings: PPOSettings

    def gradient(self, evaluation: Evaluation, log_prob: np.ndarray, advantages: np.ndarray) -> tuple[np.ndarray, bool]:
        """Gradient of the clipped surrogate; stops if the estimated KL divergence exceeds 1.5 `target_kl`."""
        target, clip = self.settings.target_kl, self.settings.clip_range
        change = evaluation.log_prob - log_prob
        ratio = np.exp(change)
        stop = target is not None and float((ratio - 1 - change).mean()) > 1.5 * target
        bound = np.where(advantages > 0, np.float32(1 + clip), np.float32(1 - clip))
        gained = ratio * advantages
        return np.where(gained <= bound * advantages, -gained, np.float32(0)), stop

    def losses(self, evaluation: Evaluation, log_prob: np.ndarray, advantages: np.ndarray) -> dict[str, float]:
        """Losses, estimated KL divergence (Schulman 2020, "Approximating KL divergence") and clip fraction."""
        change, clip = evaluation.log_prob - log_prob, self.settings.clip_range
        ratio = np.exp(change)
        held = np.clip(ratio, 1 - clip, 1 + clip)
        return {
            "train/policy_gradient_loss": -float(np.minimum(ratio * advantages, held * advantages).mean()),
            "train/approx_kl": float((ratio - 1 - change).mean()),
            "train/clip_fraction": float((np.abs(ratio - 1) > clip).mean()),
        }
