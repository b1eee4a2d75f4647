"""Common parts of all environments: base classes, reward, spaces and registration."""

from moe_envs.core.batched import BatchedEnv, Face, Outcome, SingleEnv, State
from moe_envs.core.reward import Reward
from moe_envs.core.spec import Spec

__all__ = ["BatchedEnv", "Face", "Outcome", "Reward", "SingleEnv", "Spec", "State"]
