"""MoEServing-v0."""

from moe_envs.serving.env import SPEC, MoEServingEnv, MoEServingVectorEnv

__all__ = ["SPEC", "MoEServingEnv", "MoEServingVectorEnv"]
