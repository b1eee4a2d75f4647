"""MoECompression-v0."""

from moe_envs.compression.env import SPEC, MoECompressionEnv, MoECompressionVectorEnv

__all__ = ["SPEC", "MoECompressionEnv", "MoECompressionVectorEnv"]
