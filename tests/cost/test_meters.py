"""Meters read what is there."""

import mmap
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from cost import energy
from cost.energy import MeterError, Rapl, open_counter, proxy_joules
from cost.meters import EnergyMeter, FlopMeter, MemoryMeter, TimeMeter

MIB = 2**20
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.mark.usefixtures("clock")
def test_time_is_wall_time_and_beside_it_the_threads() -> None:
    with TimeMeter() as reading:
        time.sleep(0.05)
    assert reading.value == pytest.approx(0.05, abs=1e-5)
    assert reading.beside["thread"] == 0
    assert (reading.unit, reading.source) == ("s", "perf_counter")


def test_memory_peak_is_what_tensors_hold() -> None:
    with MemoryMeter() as reading:
        torch.ones(16 * MIB)
    assert reading.value == 64 * MIB
    assert (reading.unit, reading.source) == ("B", "tensors held")


def test_the_growth_of_the_process_stands_beside_it() -> None:
    with MemoryMeter():
        torch.ones(1)  # loads what torch loads at first use
    with MemoryMeter() as reading:  # pages of its own: the allocator would reuse what earlier tests have freed
        held = torch.frombuffer(mmap.mmap(-1, 64 * MIB), dtype=torch.float32).fill_(1.0)
    assert reading.beside["rss"] == pytest.approx(held.nbytes, rel=0.1)


def test_memory_held_before_is_not_counted_and_freed_memory_is_reused() -> None:
    held = torch.zeros(1_000_000)
    with MemoryMeter() as reading:
        result = held
        for _ in range(5):
            result = result * 2
        view = result.view(-1)[:10]
        del view
    assert reading.value == pytest.approx(8e6)


def test_flops_of_forward_and_backward() -> None:
    layer, inputs = nn.Linear(64, 32), torch.ones(10, 64, requires_grad=True)
    with FlopMeter() as reading:
        layer(inputs).sum().backward()
    assert reading.value == 3 * 2 * 10 * 64 * 32


def test_the_proxy_by_hand() -> None:
    layer, inputs = nn.Linear(64, 32, bias=False), torch.ones(10, 64)
    with torch.inference_mode(), EnergyMeter(source="proxy") as reading:
        layer(inputs)
    assert reading.value == pytest.approx(proxy_joules(2 * 10 * 64 * 32, 64 * 32 * 4, 10 * 32 * 4))
    assert reading.source.startswith("proxy")
    assert reading.unit == "J"


@pytest.mark.parametrize("vary", ["rows", "width"])
def test_the_proxy_is_linear_in_size(vary: str) -> None:
    sizes, joules = np.arange(32, 513, 32), []
    for size in sizes:
        rows, width = (size, 64) if vary == "rows" else (64, size)
        layer, inputs = nn.Linear(100, width), torch.ones(rows, 100)
        with torch.inference_mode(), EnergyMeter(source="proxy") as reading:
            layer(inputs)
        joules.append(reading.value)
    assert np.corrcoef(sizes, joules)[0, 1] ** 2 > 0.99


def test_meters_are_decorators() -> None:
    meter = MemoryMeter()

    @meter
    def work() -> torch.Tensor:
        return torch.zeros(250_000)

    for _ in range(2):
        work()
        assert meter.reading.value == 1e6


def test_an_error_inside_a_meter_passes_and_leaves_nothing_behind() -> None:
    for meter in (TimeMeter(), MemoryMeter(), FlopMeter(), EnergyMeter(source="proxy")):
        with pytest.raises(KeyError), meter:
            raise KeyError
    with MemoryMeter() as outer, MemoryMeter() as inner:
        torch.ones(1000)
    assert outer.value == inner.value == 4000
    meter = MemoryMeter()
    with meter:
        with pytest.raises(RuntimeError, match="one each"):
            meter.__enter__()
        torch.ones(10)
    assert meter.reading.value == 40


def test_sparse_tensors_are_passed_over() -> None:
    with MemoryMeter() as reading:
        (torch.eye(4).to_sparse() @ torch.ones(4, 2)).sum()
    assert reading.value > 0


def powercap(root: Path, microjoules: dict[str, int]) -> Path:
    for name, value in microjoules.items():
        (root / name).mkdir(parents=True, exist_ok=True)
        (root / name / "name").write_text(
            {"intel-rapl:0:0": "core\n", "intel-rapl:2": "psys\n"}.get(name, "package-0\n")
        )
        (root / name / "energy_uj").write_text(f"{value}\n")
        (root / name / "max_energy_range_uj").write_text("1000000\n")
    return root


def test_rapl_adds_packages_leaves_out_their_parts_and_wraps_round(tmp_path: Path) -> None:
    before = {"intel-rapl:0": 100_000, "intel-rapl:1": 900_000, "intel-rapl:0:0": 5, "intel-rapl:2": 7}
    counter = Rapl(powercap(tmp_path, before))
    powercap(
        tmp_path, {"intel-rapl:0": 600_000, "intel-rapl:1": 100_000, "intel-rapl:0:0": 999, "intel-rapl:2": 900_000}
    )
    assert counter.joules() == pytest.approx(0.5 + 0.2)
    assert counter.joules() == pytest.approx(0.7)
    (tmp_path / "intel-rapl:1" / "energy_uj").unlink()
    with pytest.raises(MeterError, match="chmod"):
        counter.joules()


def test_energy_by_a_counter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    powercap(tmp_path, {"intel-rapl:0": 0})
    monkeypatch.setattr(energy.Rapl.__init__, "__defaults__", (tmp_path,))
    with EnergyMeter() as reading:
        powercap(tmp_path, {"intel-rapl:0": 250_000})
    assert (reading.value, reading.source) == (0.25, "RAPL, all CPU packages")


def test_a_meter_that_cannot_measure_says_what_would_mend_it(tmp_path: Path) -> None:
    with pytest.raises(MeterError, match="source='proxy'"):
        Rapl(tmp_path)
    with pytest.raises(ValueError, match="nvml, rapl, proxy"):
        open_counter(source="solar")
    with pytest.raises(ValueError, match="'cuda:N'"):
        TimeMeter("gpu")
    assert open_counter(source="proxy") is None


@pytest.mark.skipif(torch.cuda.is_available(), reason="a CUDA device is there")
@pytest.mark.parametrize("meter", [TimeMeter, MemoryMeter, EnergyMeter])
def test_without_a_gpu_the_meters_say_so(meter: type[TimeMeter]) -> None:
    with pytest.raises(MeterError, match="device='cpu'"):
        meter("cuda")
    with pytest.raises(MeterError, match="NVIDIA driver"):
        open_counter("cuda", "nvml")
    assert open_counter("cuda") is None


@pytest.mark.gpu
@needs_cuda
def test_on_a_gpu() -> None:
    with MemoryMeter("cuda") as memory, TimeMeter("cuda") as seconds:
        held = torch.ones(16 * MIB, device="cuda")
    with EnergyMeter("cuda", "nvml") as joules:
        for _ in range(2000):
            held = held * 1.0001
    assert memory.value == pytest.approx(64 * MIB, rel=0.1)
    assert 0 < seconds.value < 1
    assert joules.value > 0
