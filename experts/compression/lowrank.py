"""Low-rank compression: a matrix as the product of two thin quantised matrices.

Shape legend: O rows (outputs), I columns (inputs), R rank.
"""

from __future__ import annotations

import numpy as np

from experts.compression.quantize import dequantize, quantize, quantized_bytes


def rank_of(shape: tuple[int, int], share: float) -> int:
    """The largest rank whose factors have at most a share of the matrix's weights."""
    return max(1, int(share * shape[0] * shape[1] / (shape[0] + shape[1])))


def factors(weights: np.ndarray, rank: int, importance: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
    """`[O, R]` and `[R, I]` with the least squared error, columns weighted by `importance [I]` (Eckart & Young 1936);
    the singular values are shared between both."""
    root = np.ones(weights.shape[1]) if importance is None else np.sqrt(np.maximum(importance, 1e-8))
    weighed = weights * root
    wide = weighed.shape[0] <= weighed.shape[1]
    small = weighed if wide else weighed.T
    # By the eigenvectors of the smaller Gram matrix, in float64: the largest are exact, and it is many times faster.
    _, vectors = np.linalg.eigh(small.astype(np.float64) @ small.T)
    basis = vectors[:, : -rank - 1 : -1]
    other = basis.T @ small
    norm = np.sqrt(np.maximum(np.linalg.norm(other, axis=1, keepdims=True), 1e-12))
    basis, other = basis * norm.T, other / norm
    left, right = (basis, other) if wide else (other.T, basis.T)
    return left.astype(np.float32), (right / root).astype(np.float32)


def truncate(weights: np.ndarray, share: float, importance: np.ndarray | None = None) -> np.ndarray:
    """Closest matrix of this rank to weights `[O, I]`."""
    left, right = factors(weights, rank_of(weights.shape, share), importance)
    return left @ right


def decompose(weights: np.ndarray, share: float, bits: int, importance: np.ndarray | None = None) -> bytes:
    """Both factors of weights `[O, I]`, the left one by columns, so that each direction has scales of its own."""
    left, right = factors(weights, rank_of(weights.shape, share), importance)
    return quantize(left.T, bits) + quantize(right, bits)


def compose(raw: bytes, shape: tuple[int, int], share: float, bits: int) -> np.ndarray:
    """Restore weights `[O, I]` float32 from the bytes of `decompose`."""
    rank = rank_of(shape, share)
    cut = quantized_bytes((rank, shape[0]), bits)
    left, right = dequantize(raw[:cut], (rank, shape[0]), bits), dequantize(raw[cut:], (rank, shape[1]), bits)
    return left.T @ right


def decomposed_bytes(shape: tuple[int, int], share: float, bits: int) -> int:
    """Size in bytes of the result of `decompose`."""
    rank = rank_of(shape, share)
    return quantized_bytes((rank, shape[0]), bits) + quantized_bytes((rank, shape[1]), bits)


def automatic_rank(weights: np.ndarray, loss: float) -> int:
    """Lowest rank that loses at most a share `loss` of the squared weights."""
    energy = np.cumsum(np.square(np.linalg.svd(weights, compute_uv=False)))
    return int(np.searchsorted(energy, (1 - loss) * energy[-1]) + 1)
