"""MoERouting-v0 and MoERoutingLive-v0."""

from moe_envs.routing.env import LIVE, SPEC, MoERoutingEnv, MoERoutingVectorEnv

__all__ = ["LIVE", "SPEC", "MoERoutingEnv", "MoERoutingVectorEnv"]
