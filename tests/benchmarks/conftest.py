"""A small experiment of a user's own, which the runner's tests run."""

from pathlib import Path

import pytest

TINY = """
import os, time
from pathlib import Path
from pydantic import BaseModel, ConfigDict

class Setup(BaseModel):
    model_config = ConfigDict(extra="forbid")
    factor: int = 1
    seconds: float = 0.0
    fails: int = 0
    dies: int = 0

SETTINGS = {"one": {}, "three": {"factor": 3}}
SPLITS = ("test", "other")

def measure(setup, seed, split, folder):
    time.sleep(setup.seconds)
    folder.mkdir(parents=True, exist_ok=True)
    tried = folder / f"{setup.factor}-{seed}-{split}"
    times = len(tried.read_text()) if tried.exists() else 0
    tried.write_text("x" * (times + 1))
    if times < setup.dies:
        os._exit(9)
    if times < setup.fails:
        raise ValueError(f"try {times}")
    return {"value": setup.factor * seed, "of": split}, {"at": time.time()}

def score(frame):
    return {"mean": float(frame["value"].mean()), "tables": {}}

def plot(frame, result, out):
    (out / "drawn.png").write_bytes(b"png")
    return ["drawn.png"]

def text(result):
    return f"mean {result['mean']:g}"
"""


@pytest.fixture
def tiny(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    package = tmp_path / "own" / "small"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    (package / "tiny.py").write_text(TINY)
    monkeypatch.syspath_prepend(tmp_path / "own")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "own"))
    return tmp_path / "own"
