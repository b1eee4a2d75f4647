"""The fingerprint of a machine: a profile is true only where it was measured."""

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path


def fingerprint() -> dict[str, str]:
    """CPU, cores, GPU, operating system and library versions."""
    return {
        "cpu": _cpu(),
        "cores": str(os.cpu_count()),
        "gpu": _gpu(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": _version("torch"),
        "numpy": _version("numpy"),
    }


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    facts = dict(line.split(":", 1) for line in lines if ":" in line)
    keys = ("model name", "cpu family", "model")
    found = {key.strip(): value.strip() for key, value in facts.items()}
    return " / ".join(found[key] for key in keys if key in found) or platform.machine()


def _gpu() -> str:
    import pynvml

    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return "none"
    count = pynvml.nvmlDeviceGetCount()
    return (
        ", ".join(str(pynvml.nvmlDeviceGetName(pynvml.nvmlDeviceGetHandleByIndex(i))) for i in range(count)) or "none"
    )


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "none"
