"""The example scripts: short, and they run as they stand."""

import os
import runpy
import subprocess
import sys
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest

ROOT = Path(__file__).parents[1]
EXAMPLES = sorted((ROOT / "docs" / "examples").glob("*.py"))


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_it_runs(path: Path, tmp_path: Path) -> None:
    assert len(path.read_text().splitlines()) <= {"meta_optimizer": 40, "own_environment": 110}.get(path.stem, 30)
    steps = "12000" if path.stem in ("dqn", "qrdqn") else "4096"
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, str(path), steps], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "return" in done.stdout or "accuracy" in done.stdout


def test_the_environment_of_ones_own_keeps_the_contract(
    assert_same: Callable[[Any, Any], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["own_environment.py"])
    runpy.run_path(str(ROOT / "docs" / "examples" / "own_environment.py"))
    single, vector = gymnasium.make("Cascade-v0"), gymnasium.make_vec("Cascade-v0", 3, autoreset_mode="SameStep")
    kept: list[Any] = [vector.reset(seed=5)]
    copies, (seen, _) = deepcopy(kept), single.reset(seed=5)
    for _ in range(200):
        actions = vector.action_space.sample()
        kept.append(vector.step(actions))
        copies.append(deepcopy(kept[-1]))
        seen, reward, ended, _, _ = single.step(actions[0])
        seen = single.reset()[0] if ended else seen
        assert (kept[-1][1][0], kept[-1][2][0]) == (reward, ended)
        np.testing.assert_array_equal(kept[-1][0][0], seen)
    assert_same(kept, copies)


def test_the_front_of_mo_gymnasium_is_drawn(tmp_path: Path) -> None:
    script = ROOT / "docs" / "recipes" / "mo_gymnasium_front.py"
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, str(script), "2048", "10"], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("on test") == 4
    assert "hypervolume" in done.stdout
