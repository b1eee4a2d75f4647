"""Levels of compression: identity, exact bytes, sizes that never rise, round trips, values worked out by hand."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from experts.compression import LEVELS, compress, decompress, effective, lowrank, prune, quantize, size_of
from experts.compression.packing import pack, packed_bytes, unpack

SHAPES = st.tuples(st.integers(1, 40), st.integers(1, 150))


def matrix(shape: tuple[int, int], seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


@given(bits=st.sampled_from([1, 2, 4, 8]), count=st.integers(0, 70), seed=st.integers(0, 99))
def test_packing_is_exact(bits: int, count: int, seed: int) -> None:
    codes = np.random.default_rng(seed).integers(2**bits, size=count).astype(np.uint8)
    raw = pack(codes, bits)
    assert len(raw) == packed_bytes(count, bits)
    np.testing.assert_array_equal(unpack(raw, bits, count), codes)


def test_packing_by_hand() -> None:
    assert pack(np.array([1, 2, 3, 15]), 4) == bytes([0x21, 0xF3])
    assert pack(np.array([1, 0, 0, 1, 1]), 1) == bytes([0b11001])


@settings(deadline=None, max_examples=40)
@given(shape=SHAPES, seed=st.integers(0, 99))
def test_every_level_of_any_matrix(shape: tuple[int, int], seed: int) -> None:
    weights, sizes = matrix(shape, seed), []
    for level in range(len(LEVELS)):
        layer = compress(weights, level)
        assert layer.bytes == len(layer.payload) == size_of(shape, level)
        np.testing.assert_array_equal(decompress(layer.payload, shape, level), layer.weights)
        assert layer.weights.shape == shape
        assert layer.weights.dtype == np.float32
        sizes.append(layer.bytes)
    assert sizes == sorted(sizes, reverse=True)
    np.testing.assert_array_equal(compress(weights, 0).weights, weights)


def test_integers_by_hand() -> None:
    weights = np.array([[-1.27, 0.0, 0.254, 1.27]], dtype=np.float32)
    restored = quantize.dequantize(quantize.quantize(weights, 8), (1, 4), 8)
    np.testing.assert_allclose(restored, [[-1.27, 0.0, 0.25, 1.27]], atol=1e-3)  # steps of 0.01
    assert restored[0, 1] == 0
    steps = np.array([[-3.0, -1.0, 1.0, 3.0]], dtype=np.float32)  # the four values of 2 bits at a scale of 2
    np.testing.assert_array_equal(quantize.dequantize(quantize.quantize(steps, 2), (1, 4), 2), steps)


def test_fewer_bits_and_less_rank_lose_more() -> None:
    weights = matrix((64, 192))
    errors = {
        level.name: float(np.square(compress(weights, place).weights - weights).mean())
        for place, level in enumerate(LEVELS)
    }
    assert errors["float32"] == 0
    assert errors["int8"] < 1e-4 < errors["int4"] < 0.012 < errors["int2"] < 0.13
    assert errors["50% pruned, int8"] < errors["75% pruned, int8"] < errors["90% pruned, int8"] < 1


def test_pruning_keeps_the_largest() -> None:
    weights = matrix((20, 30))
    restored = prune.restore(prune.prune(weights, 0.25, 8), (20, 30), 0.25, 8)
    assert prune.kept((20, 30), 0.25) == 150
    kept = restored != 0
    assert np.abs(weights[kept]).min() >= np.abs(weights[~kept]).max()
    np.testing.assert_allclose(restored[kept], weights[kept], atol=0.02)


def test_a_matrix_of_low_rank_is_restored() -> None:
    weights = matrix((40, 3)) @ matrix((3, 60), seed=1)
    assert lowrank.automatic_rank(weights, 1e-6) == 3
    left, right = lowrank.factors(weights, 3)
    np.testing.assert_allclose(left @ right, weights, atol=1e-4)
    share = 3 * 100 / 2400
    restored = lowrank.compose(lowrank.decompose(weights, share, 8), (40, 60), share, 8)
    assert np.square(restored - weights).mean() < 1e-3 * np.square(weights).mean()


@pytest.mark.parametrize("level", [4, 7, 9])
def test_importance_moves_the_error_to_columns_that_matter_less(level: int) -> None:
    weights, importance = matrix((64, 128)), np.ones(128, dtype=np.float32)
    importance[:16] = 100
    plain, weighed = compress(weights, level).weights, compress(weights, level, importance).weights
    error = [np.square(each - weights)[:, :16].mean() for each in (plain, weighed)]
    assert error[1] < 0.95 * error[0]


def test_boundary_pruning_by_hand() -> None:
    weights = np.array([[1.0, -0.25, 0.3], [0.0, -0.9, 0.1]], dtype=np.float32)
    np.testing.assert_array_equal(prune.boundary(weights, 0.3), np.float32([[1.0, 0, 0.3], [0, -0.9, 0]]))


def test_what_is_not_a_level_or_not_its_bytes_is_named() -> None:
    with pytest.raises(ValueError, match=r"level=14: must be from 0 to 13"):
        compress(matrix((3, 3)), 14)
    with pytest.raises(ValueError, match=r"10 bytes for a matrix \(3, 3\) at level 1"):
        decompress(bytes(10), (3, 3), 1)


def test_a_form_that_would_be_larger_is_the_one_before() -> None:
    shape = (16, 9)
    names = [LEVELS[effective(shape, level)].name for level in range(len(LEVELS))]
    sizes = [size_of(shape, level) for level in range(len(LEVELS))]
    assert names[5] == names[4] == LEVELS[4].name
    assert sizes[5] == sizes[4] < sizes[3]
