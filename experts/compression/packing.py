"""Bit packing of small integers, and compressed layers."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np


@dataclass(frozen=True)
class CompressedLayer:
    """Matrix `[rows, columns]` as stored bytes and as decompressed float32 weights."""

    level: int
    payload: bytes
    weights: np.ndarray

    @property
    def bytes(self) -> int:
        """Exact size on disk in bytes."""
        return len(self.payload)


def pack(codes: np.ndarray, bits: int) -> bytes:
    """Codes from 0 to 2^bits - 1, `bits` of 1, 2, 4 or 8 each, the last byte filled with zeros."""
    flat = np.ascontiguousarray(codes, dtype=np.uint8).ravel()
    if bits == 8:
        return flat.tobytes()
    each = 8 // bits
    padded = np.zeros(-(-flat.size // each) * each, dtype=np.uint8)
    padded[: flat.size] = flat
    shifts = np.arange(each, dtype=np.uint8) * np.uint8(bits)
    return np.bitwise_or.reduce(padded.reshape(-1, each) << shifts, axis=1).astype(np.uint8).tobytes()


def unpack(raw: bytes | np.ndarray, bits: int, count: int) -> np.ndarray:
    """The `count` codes of `pack`, uint8."""
    packed = np.frombuffer(raw, dtype=np.uint8)
    if bits == 8:
        return packed[:count]
    return _codes_of_bytes(bits).take(packed).view(np.uint8)[:count]


@cache
def _codes_of_bytes(bits: int) -> np.ndarray:
    """The codes in each of the 256 bytes, side by side in one number: looking them up is faster than shifting."""
    shifts = np.arange(8 // bits, dtype=np.uint8) * np.uint8(bits)
    codes = (np.arange(256, dtype=np.uint8)[:, None] >> shifts) & np.uint8(2**bits - 1)
    return codes.view(f"u{8 // bits}")[:, 0]


def packed_bytes(count: int, bits: int) -> int:
    """Packed size of `count` codes in bytes."""
    return -(-count * bits // 8)
