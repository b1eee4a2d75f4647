"""The replay: what it keeps, in how many bytes, and how images are stored."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from experts.continual import (
    Replay,
    Stream,
)
from experts.continual.buffer import Buffer
from experts.continual.inputs import Encoding, shifted
from experts.continual.learner import StreamLearner
from tests.experts.continual.conftest import QUICK, SMALL


def filled(kind: Any, size: int, labels: list[int], seed: int = 0, parts: int = 3) -> Buffer:
    buffer, random = Buffer(Replay(kind, size), 10), np.random.default_rng(seed)
    for part in np.array_split(np.arange(len(labels)), parts):
        rows = part.astype(np.float32)[:, None]
        buffer.add(rows, np.array(labels)[part], 0, random)
    return buffer


def test_fifo_keeps_the_last() -> None:
    buffer = filled("fifo", 4, [0] * 11)
    assert sorted(buffer.rows[:, 0].tolist()) == [7, 8, 9, 10]


def test_a_reservoir_is_a_uniform_sample() -> None:
    kept = np.zeros(40)
    for seed in range(600):
        kept[filled("reservoir", 8, [0] * 40, seed).rows[:, 0].astype(int)] += 1
    expected = 600 * 8 / 40
    assert abs(kept - expected).max() < 5 * (expected * 0.8) ** 0.5
    statistic = ((kept - expected) ** 2 / (expected * 0.8)).sum()
    assert statistic < 80  # chi-square of 39 degrees of freedom: 73 is the 0.1 % point


@given(st.lists(st.integers(0, 9), min_size=1, max_size=120), st.integers(1, 20), st.integers(0, 5))
def test_a_balanced_replay_keeps_classes_even(labels: list[int], size: int, seed: int) -> None:
    buffer = filled("balanced", size, labels, seed)
    assert len(buffer) == min(size, len(labels))
    kept, there = (np.bincount(each, minlength=10) for each in (buffer.labels[: len(buffer)], labels))
    assert (kept <= there).all()
    assert (np.array(labels)[buffer.rows[: len(buffer), 0].astype(int)] == buffer.labels[: len(buffer)]).all()
    wanting = kept < there  # a class with inputs left over has as many places as any other, but for one
    assert not wanting.any() or kept[wanting].min() >= kept.max() - 1


@pytest.mark.parametrize("kind", ["fifo", "reservoir", "balanced"])
def test_a_restored_buffer_goes_on_as_the_first(kind: Any) -> None:
    random = [np.random.default_rng(3), np.random.default_rng(3)]
    settings = Replay(kind, 7, logits=1.0)
    whole, again = Buffer(settings, 10), Buffer(settings, 10)
    labels, drawn = np.random.default_rng(0).integers(10, size=60), np.random.default_rng(1)
    for part in np.array_split(np.arange(60), 9):
        rows, logits = part.astype(np.float32)[:, None], drawn.random((len(part), 10), np.float32)
        for buffer, own in zip((whole, again), random, strict=True):
            buffer.add(rows, labels[part], 0, own, logits)
        fresh = Buffer(settings, 10)
        fresh.restore(again.state())
        again = fresh
    for name in Buffer.ARRAYS:
        np.testing.assert_array_equal(getattr(again, name)[: len(again)], getattr(whole, name)[: len(whole)])


def test_bytes_are_those_of_the_arrays() -> None:
    buffer = Buffer(Replay("fifo", 5, logits=1.0), 10)
    rows = Encoding((1, 28, 28), side=14, bits=4).encode(np.zeros((7, 1, 28, 28), np.uint8))
    buffer.add(rows, np.zeros(7, int), 2, np.random.default_rng(0), np.ones((7, 4), np.float32))
    assert buffer.nbytes == 5 * (98 + 2 + 2 + 4 * 10)
    assert np.isnan(buffer.logits[:, 4:]).all()
    assert (buffer.logits[:, :4] == 1).all()


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_images_are_stored_with_few_bits(bits: int) -> None:
    images = np.random.default_rng(0).integers(256, size=(5, 3, 9, 9), dtype=np.uint8)
    encoding = Encoding((3, 9, 9), bits=bits)
    rows = encoding.encode(images)
    assert rows.shape == (5, -(-3 * 81 * bits // 8))
    error = np.abs(encoding.decode(rows).numpy() - images / 255).max()
    assert error <= 0.5 / (2**bits - 1) + 1e-3


def test_a_shift_moves_images_whole() -> None:
    x = torch.zeros(200, 1, 5, 5)
    x[:, :, 2, 2] = 1
    moved = shifted(x, 1, np.random.default_rng(0))
    assert (moved.sum((1, 2, 3)) == 1).all()
    assert (moved.sum(0)[0] > 0).sum() == 9


def test_a_small_task_is_kept_whole() -> None:
    random = np.random.default_rng(0)
    task = {
        split: (random.random((23, 3), dtype=np.float32), np.arange(23) % 2)
        for split in ("train", "validation", "test")
    }
    stream = Stream.of_arrays("small", [task, task])
    learner = StreamLearner(stream, replace(QUICK, replay=Replay("balanced", None, only=True)), 0, SMALL)
    learner.run(lambda share, text: None, lambda: None, 1000)
    assert learner.buffer is not None
    assert len(learner.buffer) == 46
