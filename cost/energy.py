"""Energy: counters of the hardware where there are any, else a proxy of FLOPs and bytes that is always called one."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

SOURCES = ("nvml", "rapl", "proxy")
# Horowitz, "Computing's energy problem", ISSCC 2014, 45 nm: a 32-bit multiply-add 4.6 pJ, 32 bits from DRAM 640 pJ, 64
# bits from a 32 KB cache 20 pJ. Weights come from DRAM, activations from the cache.
JOULES_PER_FLOP, JOULES_PER_WEIGHT_BYTE, JOULES_PER_ACTIVATION_BYTE = 2.3e-12, 160e-12, 2.5e-12
PROXY = "proxy: 2.3 pJ a FLOP, 160 pJ a byte of weights, 2.5 pJ a byte of activations (Horowitz 2014)"


class MeterError(RuntimeError):
    """A meter cannot measure here; the message says what would mend it."""


class Counter(Protocol):
    """Joules used since some moment; `window` is the number of seconds over which a difference is worth reading."""

    source: str
    window: float

    def joules(self) -> float: ...


def proxy_joules(flops: float, weight_bytes: float, activation_bytes: float) -> float:
    """The proxy's energy in J of one pass: weights that are used and activations that are held, in B."""
    return (
        JOULES_PER_FLOP * flops + JOULES_PER_WEIGHT_BYTE * weight_bytes + JOULES_PER_ACTIVATION_BYTE * activation_bytes
    )


class Rapl:
    """The CPU packages' own counters, as Linux shows them; everything that runs on the packages is in them."""

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
        """Joules since this counter was opened; a counter that has wrapped round once between two calls is mended."""
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
    """A GPU's own counter (Volta and later); everything that runs on the GPU is in it."""

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
    """The counter of a device, or None for the proxy.

    `source` is "nvml", "rapl" or "proxy"; by default the device's counter where there is one, else the proxy. Raises
    `MeterError` where the counter that was asked for cannot be read, `ValueError` for an unknown source.
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
