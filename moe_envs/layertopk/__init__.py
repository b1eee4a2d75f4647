"""MoELayerTopK-v0."""

from moe_envs.layertopk.env import SPEC, MoELayerTopKEnv, MoELayerTopKVectorEnv

__all__ = ["SPEC", "MoELayerTopKEnv", "MoELayerTopKVectorEnv"]
