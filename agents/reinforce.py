"""REINFORCE with a learned baseline (Williams 1992)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from agents.distributions import Evaluation
from agents.learner import Learner
from agents.settings import Scheduled, Settings, Share, Steps


@dataclass(frozen=True, kw_only=True)
class ReinforceSettings(Settings):
    """Settings of REINFORCE; defaults use one update per whole rollout."""

    learning_rate: Scheduled = 1e-3
    n_steps: Steps = 128
    batch_size: Steps | None = None
    gae_lambda: Share = 1.0

    whole_rollouts: ClassVar[bool] = True


class REINFORCE(Learner):
    """Policy gradient on Monte Carlo returns minus a learned baseline, one update per rollout.

    Episodes cut by the end of a rollout are bootstrapped by the baseline. `batch_size` defaults to the whole rollout.
    """

    name = "REINFORCE"
    settings_class = ReinforceSettings

    def gradient(self, evaluation: Evaluation, log_prob: np.ndarray, advantages: np.ndarray) -> tuple[np.ndarray, bool]:
        """Gradient of the policy loss: the negative advantages."""
        return -advantages, False

    def losses(self, evaluation: Evaluation, log_prob: np.ndarray, advantages: np.ndarray) -> dict[str, float]:
        """The policy-gradient loss."""
        return {"train/policy_gradient_loss": -float((advantages * evaluation.log_prob).mean())}
