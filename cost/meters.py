"""Meters: `with TimeMeter() as reading: ...`, then `reading.value`; also as decorators, then `meter.reading`.

A meter that cannot measure on this machine raises `MeterError`, whose message says how to fix it.
"""

from __future__ import annotations

import time
from contextlib import ContextDecorator, ExitStack
from dataclasses import dataclass, field
from typing import Any

from cost.energy import PROXY, MeterError, open_counter, proxy_joules

__all__ = ["EnergyMeter", "FlopMeter", "MemoryMeter", "MeterError", "Reading", "TimeMeter"]


@dataclass
class Reading:
    """Result of a meter: value, unit, source, and secondary values in the same unit."""

    value: float
    unit: str
    source: str
    beside: dict[str, float] = field(default_factory=dict)


class Meter(ContextDecorator):
    """Base class of meters. A meter measures one block at a time; nested blocks need separate meters."""

    reading: Reading

    def __init__(self, device: str = "cpu") -> None:
        self.device, self._running = str(device), False
        require_device(self.device)

    def __enter__(self) -> Reading:
        if self._running:
            raise RuntimeError(f"this {type(self).__name__} is reading a block already: nested blocks need one each")
        self._begin()
        self._running = True
        return self.reading

    def __exit__(self, *error: Any) -> None:
        self._running = False
        self._end(*error)

    def _begin(self) -> None:
        raise NotImplementedError

    def _end(self, *error: Any) -> None:
        raise NotImplementedError


class TimeMeter(Meter):
    """Wall time in s, with the CPU time of the calling thread as secondary value `thread`.

    On a CUDA device it is the time between two events; the end of the block synchronises.
    """

    def _begin(self) -> None:
        on_gpu = self.device.startswith("cuda")
        self.reading = Reading(0.0, "s", "CUDA events" if on_gpu else "perf_counter")
        self._events = _events(self.device) if on_gpu else None
        self._thread, self._start = time.thread_time_ns(), time.perf_counter_ns()

    def _end(self, *error: Any) -> None:
        nanoseconds = time.perf_counter_ns() - self._start
        self.reading.beside["thread"] = (time.thread_time_ns() - self._thread) * 1e-9
        self.reading.value = nanoseconds * 1e-9
        if self._events is not None:
            start, end, stream = self._events
            end.record(stream)
            end.synchronize()
            self.reading.value = start.elapsed_time(end) * 1e-3


class MemoryMeter(Meter):
    """Peak bytes of the tensors created inside the block, with the growth of the process as secondary value `rss`.

    On the CPU, every tensor returned by a torch operation counts while it is alive, but scratch space inside an
    operation does not. On a CUDA device, it is the peak of the allocator above its value at the start.
    """

    def _begin(self) -> None:
        import torch

        from cost.tensors import StorageTracker

        if self.device.startswith("cuda"):
            self.reading = Reading(0.0, "B", "CUDA allocator")
            torch.cuda.reset_peak_memory_stats(self.device)
            self._held = torch.cuda.memory_allocated(self.device)
        else:
            self.reading = Reading(0.0, "B", "tensors held")
            self._stack = ExitStack()
            self._tracker = self._stack.enter_context(StorageTracker())
        self._rss = _rss()

    def _end(self, *error: Any) -> None:
        import torch

        if self.device.startswith("cuda"):
            self.reading.value = float(torch.cuda.max_memory_allocated(self.device) - self._held)
        else:
            self._stack.__exit__(*error)
            self.reading.value = float(self._tracker.peak)
        self.reading.beside["rss"] = float(_rss() - self._rss)


class FlopMeter(Meter):
    """FLOPs of matrix products, convolutions and attention inside the block, counted by torch."""

    def _begin(self) -> None:
        from torch.utils.flop_counter import FlopCounterMode

        self.reading = Reading(0.0, "FLOP", "torch.utils.flop_counter")
        self._counter = FlopCounterMode(display=False)
        self._counter.__enter__()

    def _end(self, *error: Any) -> None:
        self._counter.__exit__(*error)
        self.reading.value = float(self._counter.get_total_flops())


class EnergyMeter(Meter):
    """Energy in J by `source`: "nvml", "rapl", or "proxy"; by default the device's counter if there is one.

    A counter includes everything that runs on the device and needs blocks of 0.05 s (RAPL) or 0.5 s (NVML). The proxy
    treats a block as one pass: its FLOPs, the parameters used, counted once, and the peak of the created tensors. Meter
    a block of many passes pass by pass. `reading.source` names the proxy.
    """

    def __init__(self, device: str = "cpu", source: str | None = None) -> None:
        super().__init__(device)
        self._counter = open_counter(self.device, source)

    def _begin(self) -> None:
        from cost.tensors import StorageTracker

        self.reading = Reading(0.0, "J", self._counter.source if self._counter else PROXY)
        if self._counter is not None:
            _synchronize(self.device)
            self._start = self._counter.joules()
            return
        self._stack = ExitStack()
        self._tracker = self._stack.enter_context(StorageTracker())
        self._flops = self._stack.enter_context(FlopMeter())

    def _end(self, *error: Any) -> None:
        if self._counter is not None:
            _synchronize(self.device)
            self.reading.value = self._counter.joules() - self._start
            return
        self._stack.__exit__(*error)
        self.reading.value = proxy_joules(self._flops.value, self._tracker.weights, self._tracker.peak)


def require_device(device: str) -> None:
    """Raise `ValueError` for a device other than CPU or CUDA, `MeterError` if there is no CUDA device."""
    if device == "cpu":
        return
    if not device.startswith("cuda"):
        raise ValueError(f"device={device!r} is not 'cpu', 'cuda' or 'cuda:N'")
    import torch

    if not torch.cuda.is_available():
        raise MeterError(f"no CUDA device for device={device!r}: use device='cpu', or install a CUDA build of torch")


def _events(device: str) -> tuple[Any, Any, Any]:
    import torch

    stream = torch.cuda.current_stream(torch.device(device))
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record(stream)
    return start, end, stream


def _synchronize(device: str) -> None:
    if device.startswith("cuda"):
        import torch

        torch.cuda.synchronize(device)


def _rss() -> int:
    import psutil

    return int(psutil.Process().memory_info().rss)
