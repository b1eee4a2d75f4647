"""Meters read what is there."""

import time

import pytest
import torch

from cost.meters import Clock, TensorMemory


def test_clock_reads_wall_time_and_thread_time() -> None:
    with Clock() as wall, Clock(thread=True) as thread:
        time.sleep(0.05)
    assert wall.value == pytest.approx(0.05, abs=0.01)
    assert thread.value < 0.01
    assert wall.unit == "s"


@pytest.mark.parametrize("megabytes", [1, 10, 40])
def test_memory_peak_is_what_tensors_hold(megabytes: int) -> None:
    with TensorMemory() as reading:
        first = torch.zeros(megabytes * 250_000)
        second = first + 1
        view = second.view(-1)[:10]
        del first, second, view
        torch.zeros(10)
    assert reading.value == pytest.approx(2 * megabytes * 1e6, rel=0.01)
    assert reading.unit == "B"


def test_memory_held_before_is_not_counted_and_freed_memory_is_reused() -> None:
    held = torch.zeros(1_000_000)

    meter = TensorMemory()
    with meter as reading:
        result = held
        for _ in range(5):
            result = result * 2
    assert reading.value == pytest.approx(8e6)


def test_meters_are_decorators() -> None:
    meter = TensorMemory()

    @meter
    def work() -> torch.Tensor:
        return torch.zeros(250_000)

    work()
    assert meter.reading.value == pytest.approx(1e6)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a CUDA device is there")
def test_a_meter_that_cannot_measure_says_what_would_mend_it() -> None:
    with pytest.raises(RuntimeError, match="TensorMemory\\('cpu'\\)"), TensorMemory("cuda"):
        pass


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_peak() -> None:
    with TensorMemory("cuda") as reading:
        torch.zeros(1_000_000, device="cuda")
    assert reading.value == pytest.approx(4e6, rel=0.1)
