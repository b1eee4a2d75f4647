"""REINFORCE with a learned baseline (Williams 1992)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from agents.distributions import Evaluation
from agents.learner import Learner
from agents.settings import Settings


@dataclass(frozen=True, kw_only=True)
class ReinforceSettings(Settings):
    """Defaults for one update with each whole rollout."""

    learning_rate: float | str = 1e-3
    n_steps: int = 128
    batch_size: int | None = None
    gae_lambda: float = 1.0

    whole_rollouts: ClassVar[bool] = True


class REINFORCE(Learner):
    """Policy gradient on Monte Carlo returns less a learned baseline, one update for each rollout.

    An episode that a rollout's end cuts is continued by the baseline. `batch_size` is the whole rollout unless given.
    """

    name = "REINFORCE"
    settings_class = ReinforceSettings

    def gradient(self, evaluation: Evaluation, log_prob: np.ndarray, advantages: np.ndarray) -> tuple[np.ndarray, bool]:
        """Minus the advantages."""
        return -advantages, False

    def losses(self, evaluation: Evaluation, log_prob: np.ndarray, advantages: np.ndarray) -> dict[str, float]:
        """The policy gradient's."""
        return {"train/policy_gradient_loss": -float((advantages * evaluation.log_prob).mean())}
