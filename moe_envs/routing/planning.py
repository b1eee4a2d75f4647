"""Plans of a mini-batch by estimates: which pool of experts would have the largest estimated return."""

import numpy as np

PLAN_BOUND = 4.0  # of margins, in correct answers
CHUNK = 256  # batches at once


def plan_margins(worth: np.ndarray, fixed: np.ndarray) -> np.ndarray:
    """How much better the best pool with each expert is than the best one without it, for batches, `[b, E]`.

    `worth [b, B, E]` of an expert for an input and `fixed [2^E]`, the price of the first use of each pool, are in
    correct answers. Each input is answered by the expert of largest worth in the pool. The result is clipped at +-4;
    the best pool has the experts above 0.
    """
    found, experts = [], worth.shape[2]
    for part in np.array_split(worth.astype(np.float32), max(1, len(worth) // CHUNK)):
        best = best_of_pools(part.reshape(-1, experts)).reshape(*part.shape[:2], -1)
        returns = best.sum(1) - fixed.astype(np.float32)
        halves = (returns.reshape(len(part), -1, 2, 1 << expert) for expert in range(experts))
        margins = [half[:, :, 1].max((1, 2)) - half[:, :, 0].max((1, 2)) for half in halves]
        found.append(np.stack(margins, axis=1))
    return np.clip(np.concatenate(found), -PLAN_BOUND, PLAN_BOUND)


def best_of_pools(worth: np.ndarray) -> np.ndarray:
    """Largest worth of the experts in each pool, `[n, 2^E]`; -100 for the empty pool."""
    best = np.full((len(worth), 2 ** worth.shape[1]), -100.0, dtype=worth.dtype)
    for expert in range(worth.shape[1]):
        size = 1 << expert
        best[:, size : 2 * size] = np.maximum(best[:, :size], worth[:, [expert]])
    return best
