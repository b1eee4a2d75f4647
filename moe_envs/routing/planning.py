"""Plans of a mini-batch by estimates: which pool of experts would have the largest estimated return."""

from functools import cache
from itertools import combinations

import numpy as np

from experts.bundle import subsets

PLAN_BOUND = 4.0  # of margins, in correct answers
CHUNK = 256  # batches at once
MOST = 3  # experts in a pool where there are too many for all 2^E pools
NUMBERS = 2**20  # of worth at once, for these pools


def plan_margins(worth: np.ndarray, price: np.ndarray) -> np.ndarray:
    """How much better the best pool with each expert is than the best one without it, for batches, `[b, E]`.

    `worth [b, B, E]` of an expert for an input and `price [P]` of the first use of each pool are in correct answers.
    The pools are all 2^E subsets of up to 10 experts, by code, and `pool_members` of more: those of at most 3 experts.
    Each input is answered by the expert of largest worth in the pool. The result is clipped at +-4; the best pool has
    the experts above 0.
    """
    margins = _of_all_pools if subsets.complete(worth.shape[2]) else _of_small_pools
    parts = np.array_split(worth.astype(np.float32), max(1, len(worth) // CHUNK))
    found = [margins(part, price.astype(np.float32)) for part in parts]
    return np.clip(np.concatenate(found), -PLAN_BOUND, PLAN_BOUND)


def best_of_pools(worth: np.ndarray) -> np.ndarray:
    """Largest worth of the experts in each pool, `[n, 2^E]`; -100 for the empty pool."""
    best = np.full((len(worth), 2 ** worth.shape[1]), -100.0, dtype=worth.dtype)
    for expert in range(worth.shape[1]):
        size = 1 << expert
        best[:, size : 2 * size] = np.maximum(best[:, :size], worth[:, [expert]])
    return best


@cache
def pool_members(experts: int) -> np.ndarray:
    """Which experts are in the pools of one to three of them, boolean `[P, E]`."""
    pools = [pool for size in range(1, MOST + 1) for pool in combinations(range(experts), size)]
    found = np.zeros((len(pools), experts), dtype=np.bool_)
    for place, pool in enumerate(pools):
        found[place, list(pool)] = True
    found.setflags(write=False)
    return found


@cache
def pool_experts(experts: int) -> np.ndarray:
    """The experts of the same pools, `[P, 3]`; smaller ones name their first expert again."""
    found = np.array([np.resize(np.append(row, row[:1]), MOST) for row in map(np.flatnonzero, pool_members(experts))])
    found.setflags(write=False)
    return found


def _of_all_pools(worth: np.ndarray, price: np.ndarray) -> np.ndarray:
    experts = worth.shape[2]
    best = best_of_pools(worth.reshape(-1, experts)).reshape(*worth.shape[:2], -1)
    returns = best.sum(1) - price
    halves = (returns.reshape(len(worth), -1, 2, 1 << expert) for expert in range(experts))
    return np.stack([half[:, :, 1].max((1, 2)) - half[:, :, 0].max((1, 2)) for half in halves], axis=1)


def _of_small_pools(worth: np.ndarray, price: np.ndarray) -> np.ndarray:
    experts = worth.shape[2]
    of_expert = np.ascontiguousarray(worth.transpose(2, 1, 0))  # [E, B, b]
    pools = np.array_split(pool_experts(experts), max(1, len(price) * of_expert[0].size // NUMBERS))
    returns = np.concatenate([_best(of_expert, part).sum(1) for part in pools]) - price[:, None]
    inside = pool_members(experts).T
    return np.stack([returns[row].max(0) - returns[~row].max(0) for row in inside], axis=1)


def _best(of_expert: np.ndarray, pools: np.ndarray) -> np.ndarray:
    """Largest worth in pools `[p, 3]`, `[p, B, b]`."""
    best = of_expert[pools[:, 0]]
    for place in (1, 2):
        np.maximum(best, of_expert[pools[:, place]], out=best)
    return best
