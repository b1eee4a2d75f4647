"""MoEAutoRate-v0."""

from collections.abc import Sequence
from itertools import product
from typing import Any

import numpy as np

from moe_envs.autorate.env import BATCH_SIZE, SPEC, STEPS, SWEPT, MoEAutoRateEnv, MoEAutoRateVectorEnv
from moe_envs.core.mixed import MixedVectorEnv

__all__ = ["SPEC", "MoEAutoRateEnv", "MoEAutoRateVectorEnv", "make_vec"]
NAMES = "task", "steps_per_action", "batch_size", "initial_rate"


def make_vec(
    num_envs: int = 1,
    *,
    task: str | Sequence[str] = "digits",
    steps_per_action: int | Sequence[int] = STEPS,
    batch_size: int | Sequence[int] = BATCH_SIZE,
    initial_rate: Any = SWEPT,
    **arguments: Any,
) -> Any:
    """MoEAutoRate-v0's vector face: `num_envs` trainings, or each combination of several tasks, numbers of steps,
    batch sizes and initial rates, `["range test", (1e-5, 1)]`, in equal shares."""
    mixed = isinstance(initial_rate, list | tuple) and any(
        isinstance(each, str | list | tuple) for each in initial_rate
    )
    several = [each if isinstance(each, list | tuple) else [each] for each in (task, steps_per_action, batch_size)]
    found = list(product(*several, initial_rate if mixed else [initial_rate]))
    keywords = [dict(zip(NAMES, each, strict=True)) | arguments for each in found]
    if len(found) == 1:
        return MoEAutoRateVectorEnv(num_envs, **keywords[0])
    if not 0 < len(found) <= num_envs:
        raise ValueError(f"{len(found)} combinations of {', '.join(NAMES)} for num_envs={num_envs} rows")
    shares = [len(part) for part in np.array_split(np.arange(num_envs), len(found))]
    return MixedVectorEnv([
        MoEAutoRateVectorEnv(share, **each) for share, each in zip(shares, keywords, strict=True)
    ])  # fmt: skip
