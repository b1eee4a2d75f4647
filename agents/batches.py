"""Training batches from rollouts: advantages, returns and scaled rewards.

Shape legend: rollouts are `[time, rows, ...]`; a batch is flat `[time * rows, ...]` unless the policy is recurrent.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from agents.preprocessing import Moments
from agents.rollouts import Rollout

CLIP_REWARD = 10.0  # bound of scaled rewards


class Batch(NamedTuple):
    """Training batch: flat `[time * rows, ...]`, or `[time, rows, ...]` for a recurrent policy."""

    inputs: np.ndarray
    actions: np.ndarray
    masks: np.ndarray | None
    log_prob: np.ndarray
    advantages: np.ndarray
    returns: np.ndarray
    starts: np.ndarray
    valid: np.ndarray
    state: np.ndarray  # `[rows, gru]`

    def take(self, places: np.ndarray | slice) -> Batch:
        """Select transitions, or rows of a recurrent batch."""
        if self.inputs.ndim == 2:
            return Batch._make([None if each is None else each[places] for each in self[:6]] + list(self[6:]))
        return Batch._make([*(None if each is None else each[:, places] for each in self[:-1]), self.state[places]])

    def flat(self) -> Batch:
        """Flatten time and rows into one axis."""
        count = self.starts.size
        parts: Any = (None if each is None else each.reshape(count, *each.shape[2:]) for each in self[:-1])
        return Batch._make([*parts, self.state])


def gae(
    rewards: np.ndarray, values: np.ndarray, following: np.ndarray, done: np.ndarray, gamma: float | np.ndarray,
    gae_lambda: float,
) -> np.ndarray:  # fmt: skip
    """Generalised advantage estimation (Schulman et al. 2016), `[time, rows]`; `following` are the values after each
    step, 0 after termination; `gamma` may differ from step to step."""
    decay = np.asarray(gamma * gae_lambda, dtype=np.float32)
    found: np.ndarray = (rewards + gamma * following - values).astype(np.float32)
    going_on = decay * (~done).astype(np.float32)
    for step in range(len(found) - 2, -1, -1):
        found[step] += going_on[step] * found[step + 1]
    return found


def beside_others(advantages: np.ndarray, done: np.ndarray, size: int) -> np.ndarray:
    """Advantages `[time, rows]` relative to the mean of the other rows in groups of `size`; raises `ValueError` where
    episodes of a group end in different steps."""
    grouped, ends = (each.reshape(len(each), -1, size) for each in (advantages, done))
    if (ends != ends[..., :1]).any():
        raise ValueError(f"group_size={size}: episodes of a group ended in different steps")
    apart = grouped - grouped.mean(-1, keepdims=True)
    return np.asarray(apart * np.float32(size / (size - 1))).reshape(advantages.shape)


class RewardScale:
    """Divides rewards by the running standard deviation of discounted returns, like SB3's VecNormalize."""

    def __init__(self, rows: int, gamma: float) -> None:
        self.gamma, self.moments, self.discounted = gamma, Moments(1), np.zeros(rows)

    def __call__(self, rollout: Rollout, done: np.ndarray) -> np.ndarray:
        """Scale the rewards of a rollout after updating the statistics with its returns."""
        rewards = rollout.rewards
        returns = np.empty_like(rewards)
        for step, reward in enumerate(rewards):
            self.discounted = returns[step] = self.discounted * self.gamma + reward
            if rollout.discount is not None:
                self.discounted = self.discounted * rollout.discount[step]
            self.discounted = np.where(done[step], 0.0, self.discounted)
        self.moments.update(returns[rollout.valid][:, None])
        found: np.ndarray = np.clip(rewards * self.moments.scale(), -CLIP_REWARD, CLIP_REWARD)
        return found

    def forget(self) -> None:
        """Start new episodes in all rows."""
        self.discounted = np.zeros_like(self.discounted)

    def state(self) -> dict[str, Any]:
        """State for `restore`."""
        return vars(self.moments) | {"discounted": self.discounted}

    def restore(self, state: dict[str, Any]) -> None:
        """Restore a `state()`."""
        self.discounted = state.pop("discounted")
        vars(self.moments).update(state)


def normalized(values: np.ndarray) -> np.ndarray:
    """Values with zero mean and unit standard deviation."""
    size = np.float32(len(values))
    values = values - np.add.reduce(values) / size
    values /= np.sqrt(values.dot(values) / (size - 1)) + np.float32(1e-8)
    return values
