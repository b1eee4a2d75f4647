"""Table of compression levels, from float32 down, to store and restore any matrix.

A level is never larger than the previous one: if its own form would be, the previous form is used.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from experts.compression import lowrank, prune, quantize
from experts.compression.packing import CompressedLayer

Shape = tuple[int, int]
KINDS = ("conv", "linear", "gate", "expert in", "expert out")  # of matrices


class Level(NamedTuple):
    """A name, and three functions: weights `[O, I]` and the columns' importance to bytes; bytes and shape to weights;
    the shape to the number of bytes. Where the form is a product of two thin matrices, `project` takes weights next to
    those that it can have, but for rounding, and `rank` a shape to its rank."""

    name: str
    store: Callable[[np.ndarray, np.ndarray | None], bytes]
    load: Callable[[bytes, Shape], np.ndarray]
    size: Callable[[Shape], int]
    project: Callable[[np.ndarray, np.ndarray | None], np.ndarray] | None = None
    rank: Callable[[Shape], int] | None = None


def _exact() -> Level:
    return Level(
        "float32",
        lambda weights, importance: np.ascontiguousarray(weights, dtype="<f4").tobytes(),
        lambda raw, shape: np.frombuffer(raw, dtype="<f4").reshape(shape).copy(),
        lambda shape: 4 * shape[0] * shape[1],
    )


def _quantized(bits: int) -> Level:
    return Level(
        f"int{bits}",
        lambda weights, importance: quantize.quantize(weights, bits, importance),
        lambda raw, shape: quantize.dequantize(raw, shape, bits),
        lambda shape: quantize.quantized_bytes(shape, bits),
    )


def _pruned(share: float, bits: int) -> Level:
    return Level(
        f"{1 - share:.0%} pruned, int{bits}",
        lambda weights, importance: prune.prune(weights, share, bits, importance),
        lambda raw, shape: prune.restore(raw, shape, share, bits),
        lambda shape: prune.pruned_bytes(shape, share, bits),
    )


def _low_rank(share: float, bits: int) -> Level:
    return Level(
        f"low rank, {share:g} of the weights, int{bits}",
        lambda weights, importance: lowrank.decompose(weights, share, bits, importance),
        lambda raw, shape: lowrank.compose(raw, shape, share, bits),
        lambda shape: lowrank.decomposed_bytes(shape, share, bits),
        lambda weights, importance: lowrank.truncate(weights, share, importance),
        lambda shape: lowrank.rank_of(shape, share),
    )


LEVELS: tuple[Level, ...] = (
    _exact(), _quantized(8), _pruned(0.5, 8), _quantized(4), _low_rank(0.5, 8), _pruned(0.5, 4), _pruned(0.25, 8),
    _quantized(2), _pruned(0.25, 4), _low_rank(0.25, 8), _pruned(0.1, 8), _pruned(0.1, 4), _low_rank(0.125, 8),
    _low_rank(0.0625, 8),
)  # fmt: skip


def effective(shape: Shape, level: int) -> int:
    """Level whose form is actually used for a matrix of this shape at `level`: the last smallest one up to it."""
    _check(level)
    sizes = [each.size(shape) for each in LEVELS[: level + 1]]
    return max(place for place, size in enumerate(sizes) if size == min(sizes))


def size_of(shape: Shape, level: int) -> int:
    """Size of a matrix at a level in bytes, without compressing it."""
    return LEVELS[effective(shape, level)].size(shape)


def compress(weights: np.ndarray, level: int, importance: np.ndarray | None = None) -> CompressedLayer:
    """A matrix `[O, I]` at a level; `importance [I]`, mean squares of its inputs, weighs the errors of its columns.

    Raises `ValueError` for non-finite weights.
    """
    if not np.isfinite(weights).all() or not (importance is None or np.isfinite(importance).all()):
        raise ValueError("weights and their importance must be finite")
    form = LEVELS[effective(weights.shape, level)]
    raw = form.store(np.asarray(weights, dtype=np.float32), importance)
    return CompressedLayer(level, raw, form.load(raw, weights.shape))


def decompress(raw: bytes, shape: Shape, level: int) -> np.ndarray:
    """The weights `[O, I]` float32 of a payload; raises `ValueError` where its length is not that of the level."""
    form = LEVELS[effective(shape, level)]
    if len(raw) != form.size(shape):
        raise ValueError(f"{len(raw)} bytes for a matrix {shape} at level {level}, which takes {form.size(shape)}")
    return form.load(raw, shape)


def _check(level: int) -> None:
    if not 0 <= level < len(LEVELS):
        raise ValueError(f"level={level!r}: must be from 0 to {len(LEVELS) - 1}")
