"""MoERouting-v0 and MoERoutingLive-v0."""

from collections.abc import Sequence
from itertools import product
from typing import Any

import numpy as np

from moe_envs.core.mixed import MixedVectorEnv
from moe_envs.routing.env import LIVE, SPEC, MoERoutingEnv, MoERoutingVectorEnv

__all__ = ["LIVE", "SPEC", "MoERoutingEnv", "MoERoutingVectorEnv", "make_vec"]


def make_vec(
    num_envs: int = 1,
    *,
    bundle: str | Sequence[str] = "fashion-mnist",
    cost_weight: float | Sequence[float] = 0.2,
    **arguments: Any,
) -> Any:
    """MoERouting-v0's vector face: `num_envs` mini-batches of a bundle, or of several bundles with as many experts, and
    of one or several cost weights, in equal shares."""
    if not isinstance(bundle, list | tuple) and not isinstance(cost_weight, list | tuple):
        return MoERoutingVectorEnv(num_envs, bundle=bundle, cost_weight=cost_weight, **arguments)  # type: ignore[arg-type]
    bundles, weights = (each if isinstance(each, list | tuple) else [each] for each in (bundle, cost_weight))
    pairs = list(product(bundles, weights))
    if not 0 < len(pairs) <= num_envs:
        raise ValueError(f"bundle={bundle!r} and cost_weight={cost_weight!r}: {len(pairs)} pairs for {num_envs} rows")
    shares = [len(part) for part in np.array_split(np.arange(num_envs), len(pairs))]
    return MixedVectorEnv([
        MoERoutingVectorEnv(share, bundle=name, cost_weight=weight, **arguments)
        for share, (name, weight) in zip(shares, pairs, strict=True)
    ])  # fmt: skip
