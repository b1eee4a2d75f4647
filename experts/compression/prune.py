"""Magnitude pruning: one mask bit per weight, and the kept weights quantised.

Shape legend: O rows (outputs), I columns (inputs).
"""

from __future__ import annotations

import numpy as np

from experts.compression.packing import pack, packed_bytes, unpack
from experts.compression.quantize import dequantize, quantize, quantized_bytes

ROW = 64  # kept weights that share a scale


def kept(shape: tuple[int, int], share: float) -> int:
    """Number of kept weights of a matrix."""
    return max(1, round(share * shape[0] * shape[1]))


def prune(weights: np.ndarray, share: float, bits: int, importance: np.ndarray | None = None) -> bytes:
    """The mask, then the weights `[O, I]` that are kept, the share of them with the largest absolute value times the
    root of their column's `importance [I]`."""
    score = np.abs(weights) * (1 if importance is None else np.sqrt(importance))
    flat, count = score.ravel(), kept(weights.shape, share)
    mask = np.zeros(flat.size, dtype=np.bool_)
    mask[np.argsort(-flat, kind="stable")[:count]] = True
    return pack(mask, 1) + quantize(_rows(weights.ravel()[mask]), bits)


def restore(raw: bytes, shape: tuple[int, int], share: float, bits: int) -> np.ndarray:
    """Restore weights `[O, I]` float32 from the bytes of `prune`."""
    size, count = shape[0] * shape[1], kept(shape, share)
    mask = unpack(raw, 1, size).astype(np.bool_)
    weights = np.zeros(size, dtype=np.float32)
    weights[mask] = dequantize(raw[packed_bytes(size, 1) :], (-(-count // ROW), ROW), bits).ravel()[:count]
    return weights.reshape(shape)


def pruned_bytes(shape: tuple[int, int], share: float, bits: int) -> int:
    """Pruned size in bytes."""
    rows = -(-kept(shape, share) // ROW)
    return packed_bytes(shape[0] * shape[1], 1) + quantized_bytes((rows, ROW), bits)


def _rows(values: np.ndarray) -> np.ndarray:
    padded = np.zeros(-(-values.size // ROW) * ROW, dtype=np.float32)
    padded[: values.size] = values
    return padded.reshape(-1, ROW)


def boundary(weights: np.ndarray, tau: float) -> np.ndarray:
    """Weights without those below `tau` times the largest absolute value of the matrix."""
    return np.where(np.abs(weights) < tau * np.abs(weights).max(), np.float32(0), weights)
