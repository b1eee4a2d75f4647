"""Energy from hardware counters, or else from a proxy of FLOPs and bytes that is labelled as such."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

SOURCES = ("nvml", "rapl", "proxy")
# Horowitz, "Computing's energy problem", ISSCC 2014, 45 nm: a 32-bit multiply-add 4.6 pJ, 32 bits from DRAM 640 pJ, 64
# bits from a 32 KB cache 20 pJ. Weights come from DRAM, activations from the cache.
JOULES_PER_FLOP, JOULES_PER_WEIGHT_BYTE, JOULES_PER_ACTIVATION_BYTE = 2.3e-12, 160e-12, 2.5e-12
PROXY = "proxy: 2.3 pJ a FLOP, 160 pJ a byte of weights, 2.5 pJ a byte of activations (Horowitz 2014)"


class MeterError(RuntimeError):
    """A meter cannot measure on this machine; the message says how to fix it."""


class Counter(Protocol):
    """Cumulative energy in J; `window` is the shortest interval in s with a reliable difference."""

    source: str
    window: float

    def joules(self) -> float: ...


def proxy_joules(flops: float, weight_bytes: float, activation_bytes: float) -> float:
    """Proxy energy in J of one pass, from FLOPs, bytes of used weights and bytes of activations."""
    return (
        JOULES_PER_FLOP * flops + JOULES_PER_WEIGHT_BYTE * weight_bytes + JOULES_PER_ACTIVATION_BYTE * activation_bytes
    )


class Rapl:
    """RAPL counters of the CPU packages in Linux; they include everything that runs on the packages."""

    source, window = "RAPL, all CPU packages", 0.05

    def __init__(self, root: Path = Path("/sys/class/powercap")) -> None:
        names = {path.parent: path.read_text() for path in sorted(root.glob("intel-rapl:*/name"))}
        self._zones = [zone for zone, name in names.items() if name.startswith("package")]  # psys has them in it
        if not self._zones:
            raise MeterError(f"no RAPL counter in {root}: this machine or its container has none; source='proxy'")
        self._ranges = [self._read(zone / "max_energy_range_uj") for zone in self._zones]
        self._last = [self._read(zone / "energy_uj") for zone in self._zones]
        self._total = 0.0

    def joules(self) -> float:
        """Joules since this counter was opened; corrects one overflow between two calls."""
        now = [self._read(zone / "energy_uj") for zone in self._zones]
        for new, old, span in zip(now, self._last, self._ranges, strict=True):
            self._total += (new - old if new >= old else new - old + span) * 1e-6
        self._last = now
        return self._total

    @staticmethod
    def _read(path: Path) -> int:
        try:
            return int(path.read_text())
        except OSError as error:
            raise MeterError(
                f"{path} cannot be read ({error.strerror}): sudo chmod a+r {path}; or source='proxy'"
            ) from error


class Nvml:
    """NVML counter of a GPU (Volta and later); it includes everything that runs on the GPU."""

    source, window = "NVML, whole GPU", 0.5

    def __init__(self, device: str = "cuda") -> None:
        import pynvml
        import torch

        try:
            pynvml.nvmlInit()
            uuid = torch.cuda.get_device_properties(torch.device(device)).uuid
            self._handle = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}")
            self._read = pynvml.nvmlDeviceGetTotalEnergyConsumption
            self.joules()
        except (pynvml.NVMLError, RuntimeError, AssertionError) as error:
            raise MeterError(
                f"NVML gives no energy of {device} ({error}): it needs an NVIDIA driver, a GPU of Volta or later and a "
                "CUDA build of torch; or source='proxy'"
            ) from error

    def joules(self) -> float:
        """Joules since the driver was loaded."""
        return self._read(self._handle) * 1e-3


def open_counter(device: str = "cpu", source: str | None = None) -> Counter | None:
    """Open the counter of a device; None for the proxy.

    `source` is "nvml", "rapl" or "proxy"; by default the device's counter if there is one, else the proxy. Raises
    `MeterError` if the requested counter cannot be read, `ValueError` for an unknown source.
    """
    if source is not None and source not in SOURCES:
        raise ValueError(f"source={source!r} is not one of {', '.join(SOURCES)}")
    if source == "proxy":
        return None
    if source is not None:
        return Nvml(device) if source == "nvml" else Rapl()
    try:
        return Nvml(device) if device.startswith("cuda") else Rapl()
    except MeterError:
        return None
