"""Provenance of results: machine, commit and library versions. A profile is valid on its machine only."""

import os
import platform
import subprocess
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

TRIES = 3  # of git
PACKAGES = ("moe-envs", "gymnasium", "stable-baselines3", "torch", "numpy")


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


def provenance() -> dict[str, Any]:
    """Commit (None outside a git checkout), machine fingerprint and versions of the main libraries."""
    versions = {package: _version(package) for package in PACKAGES}
    return {"commit": source_commit(), "fingerprint": fingerprint(), "versions": versions}


def source_commit() -> str | None:
    """Commit of this code, with `-dirty` if a Python file was modified; None outside its own checkout."""
    root = Path(__file__).resolve().parents[1]

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(root), *arguments]
        for _ in range(TRIES):  # a busy machine may have no process left, or kill one
            try:
                done = subprocess.run(command, capture_output=True, text=True)
            except BlockingIOError:
                done = None
            if done is not None and done.returncode >= 0:
                done.check_returncode()
                return done.stdout.strip()
            time.sleep(0.2)
        raise OSError(f"git does not answer in {root}")

    try:
        if Path(git("rev-parse", "--show-toplevel")) != root:
            return None
        return git("rev-parse", "HEAD") + ("-dirty" if git("status", "--porcelain", "--", "*.py") else "")
    except (OSError, subprocess.CalledProcessError):
        return None
