"""MO-Gymnasium version of our environments with vector reward; `cost_weight` has no effect."""

from typing import Any

import gymnasium
import numpy as np
from gymnasium import spaces

from cost.arguments import choose
from moe_envs.core.batched import State
from moe_envs.core.spaces import Layout
from moe_envs.core.spec import SPECS


class MultiObjectiveEnv(gymnasium.Env[np.ndarray, Any]):
    """Environment `env_id` with `vector_reward` as reward: quality, and negative time, memory and energy relative to
    the reference; its space is `reward_space`."""

    metadata: dict[str, Any] = {"render_modes": ["rgb_array", "ansi"], "render_fps": 4}

    def __init__(self, *, env_id: str, **arguments: Any) -> None:
        choose("env_id", env_id, SPECS)
        made: Any = gymnasium.make(env_id, disable_env_checker=True, **arguments)
        self.env: Any = made.unwrapped
        self.observation_space, self.action_space = self.env.observation_space, self.env.action_space
        self.observation_layout: Layout = self.env.observation_layout
        self.render_mode = self.env.render_mode
        high = np.array([np.inf, 0, 0, 0], dtype=np.float32)
        self.reward_space = spaces.Box(np.full(4, -np.inf, dtype=np.float32), high)
        self.reward_dim = 4

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        """Start an episode."""
        observation, info = self.env.reset(seed=seed, options=options)
        self.np_random, self._np_random_seed = self.env.np_random, self.env._np_random_seed
        return observation, info

    def step(self, action: Any) -> tuple[np.ndarray, Any, bool, bool, dict[str, Any]]:
        """One step of the environment with the vector reward `[4]` float32."""
        observation, _, terminated, truncated, info = self.env.step(action)
        return observation, info["vector_reward"].astype(np.float32), terminated, truncated, info

    def render(self) -> Any:
        """As the environment's."""
        return self.env.render()

    def state(self) -> State:
        """As the environment's."""
        state: State = self.env.state()
        return state

    def restore(self, state: State) -> np.ndarray:
        """As the environment's."""
        return np.asarray(self.env.restore(state))

    def close(self) -> None:
        """Close the environment."""
        self.env.close()
