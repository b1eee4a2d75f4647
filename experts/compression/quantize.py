"""Weights as integers of 8, 4 or 2 bits, symmetric about zero, with a float16 scale for each group along a row.

Shape legend: O rows (outputs), I columns (inputs), G groups of a row, S = inputs of a group.
"""

from __future__ import annotations

from functools import cache

import numpy as np

from experts.compression.packing import pack, packed_bytes, unpack

GROUP = {8: 0, 4: 64, 2: 64}  # bits -> columns of a group, 0 for a whole row
CLIPS = np.linspace(1.0, 0.35, 14, dtype=np.float32)  # shares of the largest weight that are tried as the scale's range


def quantize(weights: np.ndarray, bits: int, importance: np.ndarray | None = None) -> bytes:
    """Scales, then packed codes, of weights `[O, I]`; `importance [I]` weighs the squared errors of the columns.

    The range of each group is the share of its largest weight in `CLIPS` with the smallest error.
    """
    groups_OGS, weigh_1GS = _grouped(weights, bits), _grouped(_importance(weights, importance), bits)
    largest_OG1 = np.abs(groups_OGS).max(-1, keepdims=True)
    best_error = np.full(largest_OG1.shape, np.inf, dtype=np.float32)
    best_scale = np.zeros_like(largest_OG1)
    for clip in CLIPS if bits < 8 else CLIPS[:1]:
        scale = (clip * largest_OG1 / _half_range(bits)).astype(np.float16).astype(np.float32)
        error = (np.square(_values(_codes(groups_OGS, scale, bits), scale, bits) - groups_OGS) * weigh_1GS).sum(
            -1, keepdims=True
        )
        better = error < best_error
        best_error, best_scale = np.where(better, error, best_error), np.where(better, scale, best_scale)
    codes = _codes(groups_OGS, best_scale, bits).reshape(len(weights), -1)[:, : weights.shape[1]]
    return best_scale.astype(np.float16).tobytes() + pack(codes, bits)


def dequantize(raw: bytes | np.ndarray, shape: tuple[int, int], bits: int) -> np.ndarray:
    """Restore weights `[O, I]` float32 from the bytes of `quantize`, or a uint8 array of them."""
    rows, columns = shape
    size = _group(columns, bits)
    count = -(-columns // size)
    scale = np.frombuffer(raw, dtype=np.float16, count=rows * count).astype(np.float32).reshape(rows, count, 1)
    units = _units(raw[2 * scale.size :], bits, rows * columns).reshape(shape)
    if columns < count * size:
        units = np.pad(units, ((0, 0), (0, count * size - columns)))
    groups = units.reshape(rows, count, size)
    groups *= scale
    return np.ascontiguousarray(groups.reshape(rows, -1)[:, :columns])


def quantized_bytes(shape: tuple[int, int], bits: int) -> int:
    """Quantised size in bytes."""
    rows, columns = shape
    return 2 * rows * -(-columns // _group(columns, bits)) + packed_bytes(rows * columns, bits)


def _group(columns: int, bits: int) -> int:
    return min(GROUP[bits] or columns, columns)


def _grouped(weights: np.ndarray, bits: int) -> np.ndarray:
    rows, columns = weights.shape
    size = _group(columns, bits)
    padded = np.zeros((rows, -(-columns // size) * size), dtype=np.float32)
    padded[:, :columns] = weights
    return padded.reshape(rows, -1, size)


def _importance(weights: np.ndarray, importance: np.ndarray | None) -> np.ndarray:
    return np.ones((1, weights.shape[1]), dtype=np.float32) if importance is None else importance[None]


def _half_range(bits: int) -> float:
    """The largest value in units of the scale: 127 with a code for zero, else half steps on both sides of it."""
    return 127.0 if bits == 8 else (2**bits - 1) / 2


def _codes(groups: np.ndarray, scale: np.ndarray, bits: int) -> np.ndarray:
    units = np.divide(groups, scale, out=np.zeros_like(groups), where=scale > 0)
    if bits == 8:
        return (np.rint(units).clip(-127, 127) + 127).astype(np.uint8)
    half = 2 ** (bits - 1)
    return (np.floor(units).clip(-half, half - 1) + half).astype(np.uint8)


def _values(codes: np.ndarray, scale: np.ndarray, bits: int) -> np.ndarray:
    return (codes.astype(np.float32) - _zero(bits)) * scale


def _zero(bits: int) -> np.float32:
    """The code of zero."""
    return np.float32(127) if bits == 8 else np.float32(2 ** (bits - 1) - 0.5)


def _units(raw: bytes | np.ndarray, bits: int, count: int) -> np.ndarray:
    """Weights `[count]` in units of their scale."""
    if bits == 8:
        return unpack(raw, bits, count).astype(np.float32) - _zero(bits)
    return _units_of_bytes(bits).take(np.frombuffer(raw, dtype=np.uint8)).view(np.float32)[:count]


@cache
def _units_of_bytes(bits: int) -> np.ndarray:
    """The units in each of the 256 bytes, side by side in one number: one look-up for all of them."""
    units = unpack(bytes(range(256)), bits, 256 * 8 // bits).astype(np.float32) - _zero(bits)
    return units.view({4: np.float64, 2: np.complex128}[bits])
