"""MoEMetaOpt-v0."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from moe_envs.core.mixed import MixedVectorEnv
from moe_envs.metaopt.env import SPEC, MoEMetaOptEnv, MoEMetaOptVectorEnv

__all__ = ["SPEC", "MoEMetaOptEnv", "MoEMetaOptVectorEnv", "make_vec"]


def make_vec(num_envs: int = 1, *, task: str | Sequence[str] = "digits", **arguments: Any) -> Any:
    """MoEMetaOpt-v0's vector face: `num_envs` trainings of a task, or of several tasks in equal shares."""
    if not isinstance(task, list | tuple):
        return MoEMetaOptVectorEnv(num_envs, task=task, **arguments)  # type: ignore[arg-type]
    if not 0 < len(task) <= num_envs:
        raise ValueError(f"task={task!r}: {len(task)} tasks for {num_envs} rows")
    shares = [len(part) for part in np.array_split(np.arange(num_envs), len(task))]
    return MixedVectorEnv(
        [MoEMetaOptVectorEnv(share, task=each, **arguments) for share, each in zip(shares, task, strict=True)]
    )
