"""Agents: learners, Stable-Baselines3 integration, baselines, and deployment of policies.

`agents` is also the import name of the PyPI package openai-agents; `benchmarks.cli` reports if it shadows this package.
"""

from typing import Any

DISTRIBUTION = "moe-envs"  # distribution of this `agents` package
__all__ = ["PPO", "REINFORCE"]


def __getattr__(name: str) -> Any:
    """Import the learners on first access, since importing torch takes a second."""
    if name == "PPO":
        from agents.ppo import PPO

        return PPO
    if name == "REINFORCE":
        from agents.reinforce import REINFORCE

        return REINFORCE
    raise AttributeError(f"module 'agents' has no attribute {name!r}")
