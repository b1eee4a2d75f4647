"""The example scripts: short, and they run as they stand."""

import json
import os
import re
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env as check_gymnasium
from stable_baselines3.common.env_checker import check_env as check_sb3

ROOT = Path(__file__).parents[1]
EXAMPLES = sorted((ROOT / "docs" / "examples").glob("*.py"))


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_it_runs(path: Path, tmp_path: Path) -> None:
    assert len(path.read_text().splitlines()) <= {"meta_optimizer": 40, "own_environment": 130}.get(path.stem, 30)
    steps = "12000" if path.stem in ("dqn", "qrdqn") else "4096"
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, str(path), steps], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "return" in done.stdout or "accuracy" in done.stdout


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder outside the package with the environment of one's own, one file, on the path of Python."""
    shutil.copy(ROOT / "docs" / "examples" / "own_environment.py", tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_one_file_outside_the_package_is_trained_evaluated_and_compared(elsewhere: Path) -> None:
    def command(name: str, *arguments: str, says: str = "") -> Any:
        code = f"from benchmarks.cli.main import {name}; {name}()"
        done = subprocess.run([sys.executable, "-W", "error", "-c", code, *arguments], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert re.search(says, done.stderr)
        return json.loads(done.stdout)

    env_id = "own_environment:Cascade-v0"
    beside = r"mean return on validation: ppo -?[\d.]+, best baseline -?[\d.]+ \(confidence below"
    command("train", "--env", env_id, "--timesteps", "2048", "--out", "run", "--json", "-", says=beside)
    rows = command("evaluate", "run", "--trust", "--baselines", "--episodes", "200", "--json", "-")["rows"]
    returns = {row["kind"]: row["return"] for row in rows}
    assert returns["learned"] < returns["bound"]
    assert returns["baseline"] < returns["bound"]
    board = command("benchmark", "leaderboard", env_id, "--quick", "--jobs", "1", "--set", "timesteps=512", "--set",
                    "episodes=100", "--out", "board", "--json", "-")  # fmt: skip
    assert {row["policy"] for row in board["rows"]} == {"PPO", "REINFORCE", "SB3 PPO"}
    assert board["tasks"][0]["best_baseline"].startswith("confidence below")


def test_one_file_outside_the_package_passes_both_checkers(
    elsewhere: Path, assert_same: Callable[[Any, Any], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(elsewhere)
    env_id = "own_environment:Cascade-v0"
    with warnings.catch_warnings(record=True) as caught:
        check_gymnasium(gymnasium.make(env_id).unwrapped, skip_render_check=True)
        check_sb3(gymnasium.make(env_id))
    assert [str(warning.message) for warning in caught] == []
    single, vector = gymnasium.make(env_id), gymnasium.make_vec(env_id, 3, autoreset_mode="SameStep")
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
