"""The example scripts: short, and they run as they stand."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
EXAMPLES = sorted((ROOT / "docs" / "examples").glob("*.py"))


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_it_runs(path: Path, tmp_path: Path) -> None:
    assert len(path.read_text().splitlines()) <= {"meta_optimizer": 40, "own_environment": 105}.get(path.stem, 30)
    steps = "12000" if path.stem in ("dqn", "qrdqn") else "4096"
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, str(path), steps], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "return" in done.stdout or "accuracy" in done.stdout
