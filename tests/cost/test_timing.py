"""A noisy host is noticed, measured again and said."""

import logging
import time

import numpy as np
import pytest
import torch

from cost import timing
from cost.timing import MAX_BLOCKS, Noise, Timed, time_steadily

QUIET = Noise(spread=0.1, drift=0.01, waited=0.001, others=0.05)


def test_bounds_and_their_words() -> None:
    assert QUIET.complaints() == []
    noisy = Noise(spread=0.9, drift=0.2, waited=0.3, others=0.65)
    assert [text.split()[0] for text in noisy.complaints()] == ["the", "times", "the", "other"]
    assert "65% of the CPUs (bound 20%)" in noisy.complaints()[3]
    assert QUIET.model_copy(update={"waited": None}).complaints() == []


@pytest.mark.usefixtures("clock")
def test_rounds_and_seconds_are_what_they_should_be() -> None:
    seconds, noise = time_steadily([Timed(lambda: time.sleep(0.002)), Timed(lambda: None)], 50)
    assert seconds.shape[0] == 2
    assert seconds.shape[1] >= 50
    slow, fast = np.median(seconds, axis=1)
    assert (slow, fast) == (pytest.approx(0.002, abs=1e-5), pytest.approx(0, abs=1e-5))
    assert noise.others >= 0


def test_runs_have_their_own_number_of_threads() -> None:
    seen: list[int] = []
    time_steadily([Timed(lambda: seen.append(torch.get_num_threads()), threads) for threads in (2, 1, 2)], 50)
    assert set(seen[:2]) == {2}
    assert torch.get_num_threads() == 1
    assert sorted(set(seen)) == [1, 2]


def test_a_disturbed_block_is_measured_again(monkeypatch: pytest.MonkeyPatch) -> None:
    noises = iter([QUIET.model_copy(update={"others": 0.9}), QUIET])
    blocks: list[np.ndarray] = []

    def block(runs: list[Timed], rounds: int, advance: object = None) -> tuple[np.ndarray, Noise]:
        blocks.append(np.full((1, rounds), 0.01 * len(blocks)))
        return blocks[-1], next(noises) if rounds > 1 else QUIET

    monkeypatch.setattr(timing, "_block", block)
    seconds, noise = time_steadily([Timed(lambda: None)], 50)
    assert noise == QUIET
    np.testing.assert_array_equal(seconds, blocks[-1])


def test_a_load_beside_is_noticed_and_said_with_its_figure(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(timing._Watch, "stop", lambda watch: (0.31, 0.65))
    with caplog.at_level(logging.WARNING, "cost"):
        seconds, noise = time_steadily([Timed(lambda: sum(range(1000)))], 50)
    assert (noise.waited, noise.others) == (0.31, 0.65)
    assert f"{MAX_BLOCKS} times over: " in caplog.text
    assert "waited for a CPU 31.0% of the time (bound 2%)" in caplog.text
    assert "other processes used 65% of the CPUs (bound 20%)" in caplog.text
    assert seconds.shape[1] >= 50 * MAX_BLOCKS


def test_what_others_use_is_what_is_busy_less_our_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing.psutil, "cpu_count", lambda: 2)
    readings = iter([(0.0, 1.0, 5.0, 2.0), (10.0, 1.5, 22.0, 12.0)])  # wall, delay, busy, own
    monkeypatch.setattr(timing._Watch, "_read", staticmethod(lambda: next(readings)))
    assert timing._Watch().stop() == (0.05, (17 - 10) / 10 / 2)
    readings = iter([(0.0, None, 5.0, 2.0), (10.0, None, 5.0, 4.0)])
    assert timing._Watch().stop() == (None, 0.0)


def test_the_system_is_really_read() -> None:
    watch = timing._Watch()
    until = time.perf_counter() + 0.2
    while time.perf_counter() < until:
        pass
    waited, others = watch.stop()
    assert 0 <= others <= 1
    assert waited is None or 0 <= waited <= 1
