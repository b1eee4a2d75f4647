"""The environments for MO-Gymnasium: the reward is a vector, of quality and, relative to the reference policy's, minus
time, memory and energy; `cost_weight` has no effect on it."""

from typing import Any

import gymnasium
import numpy as np
from gymnasium import spaces

from moe_envs.compression import MoECompressionEnv
from moe_envs.metaopt import MoEMetaOptEnv
from moe_envs.routing import MoERoutingEnv


class MultiObjective(gymnasium.Env[np.ndarray, Any]):
    """Mixed into an environment: its `vector_reward` is its reward, and `reward_space` describes it."""

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        high = np.array([np.inf, 0, 0, 0], dtype=np.float32)
        self.reward_space = spaces.Box(np.full(4, -np.inf, dtype=np.float32), high)
        self.reward_dim = 4

    def step(self, action: Any) -> tuple[np.ndarray, Any, bool, bool, dict[str, Any]]:
        """As the environment's, with the vector `[4]` float32 for a reward."""
        observation, _, terminated, truncated, info = super().step(action)
        return observation, info["vector_reward"].astype(np.float32), terminated, truncated, info


class MORoutingEnv(MultiObjective, MoERoutingEnv):
    """mo-moe-routing-v0."""


class MOMetaOptEnv(MultiObjective, MoEMetaOptEnv):
    """mo-moe-metaopt-v0."""


class MOCompressionEnv(MultiObjective, MoECompressionEnv):
    """mo-moe-compression-v0."""
