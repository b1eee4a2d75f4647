"""MoEExpertCache-v0."""

from moe_envs.expertcache.env import SPEC, MoEExpertCacheEnv, MoEExpertCacheVectorEnv

__all__ = ["SPEC", "MoEExpertCacheEnv", "MoEExpertCacheVectorEnv"]
