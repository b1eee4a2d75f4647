"""The comparison of our learners with SB3's: small, but real."""

import json
from pathlib import Path

import pandas as pd
import pytest

from benchmarks.experiments import learners


def test_trainings_are_kept_and_compared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small = {"n_envs": 4, "total_timesteps": 256, "n_steps": 16, "batch_size": 64, "n_epochs": 1}
    monkeypatch.setitem(learners.SETTINGS, "CartPole-v1", small)
    monkeypatch.setattr(learners, "EPISODES", 8)
    row = learners.train("CartPole-v1", "own", 0)
    assert row["return"] >= 8
    assert row["seconds"] > 0
    rows = [
        {**row, "return": 20 + seed, "backend": backend, "seed": seed} for backend in ("own", "sb3") for seed in (0, 1)
    ]
    (tmp_path / "raw.jsonl").write_text("".join(json.dumps(each) + "\n" for each in rows))
    monkeypatch.setattr(learners, "CASES", [("CartPole-v1", 4, 16, 64)])
    monkeypatch.setattr(learners, "STEPS", 64)
    result = learners.run(2, tmp_path, 1, ["CartPole-v1"], lambda name: lambda share: None)
    assert result["learning"][0]["difference"] == 0
    (speed,) = result["speed"]
    assert speed["ratio"] == pytest.approx(speed["own"] / speed["sb3"], rel=0.5)
    assert json.loads((tmp_path / "results.json").read_text())["commit"] == result["commit"]


def test_the_interval_of_a_difference_by_hand() -> None:
    frame = pd.DataFrame(
        {"env": "x", "backend": ["own"] * 3 + ["sb3"] * 3, "return": [1.0, 2, 3, 0, 1, 2], "seconds": 1.0}
    )
    (row,) = learners.compare(frame)
    assert row["difference"] == 1
    assert row["ci95"] == pytest.approx([1 - 2.776 * (2 / 3) ** 0.5, 1 + 2.776 * (2 / 3) ** 0.5], abs=1e-3)
