"""Those who decide: learners, glue for Stable-Baselines3, baselines that do not learn, policies leaving the gym.

`agents` is also the import name of the PyPI package openai-agents; `benchmarks.cli` says so where that one shadows us.
"""

from typing import Any

DISTRIBUTION = "moe-envs"  # whose `agents` this is
__all__ = ["PPO", "REINFORCE"]


def __getattr__(name: str) -> Any:
    """The learners, imported when they are asked for: torch takes a second."""
    if name == "PPO":
        from agents.ppo import PPO

        return PPO
    if name == "REINFORCE":
        from agents.reinforce import REINFORCE

        return REINFORCE
    raise AttributeError(f"module 'agents' has no attribute {name!r}")
