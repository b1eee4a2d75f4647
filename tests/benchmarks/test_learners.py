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

    origin = {"settings": small, "commit": provenance()["commit"]}
    stale = {**rows[0], "return": 99} | origin | {"commit": "another"}
    lines = [json.dumps(each | origin) + "\n" for each in rows] + [json.dumps(stale) + "\n", '{"env": "cut']
    (tmp_path / "raw.jsonl").write_text("".join(lines))
    monkeypatch.setattr(learners, "CASES", [("CartPole-v1", 4, 16, 64)])
    rates = iter([4, 2, 6, 2, 5, 1])
    monkeypatch.setattr(learners.backends, "rate", lambda agent, steps: next(rates))
    result = learners.run(2, tmp_path, 1, ["CartPole-v1"], lambda name: lambda share: None)
    assert result["learning"][0]["difference"] == 0
    assert result["learning"][0]["own"] == 20.5
    assert len((tmp_path / "raw.jsonl").read_text().splitlines()) == 5
    (speed,) = result["speed"]
    assert (speed["own"], speed["sb3"], speed["ratio"]) == (5, 2, 3)  # medians, of rates and of their ratios
    assert json.loads((tmp_path / "results.json").read_text())["commit"] == result["commit"]


def test_the_interval_of_a_difference_by_hand() -> None:
    frame = pd.DataFrame(
        {"env": "x", "backend": ["own"] * 3 + ["sb3"] * 3, "return": [1.0, 2, 3, 0, 1, 2], "seconds": 1.0}
    )
    (row,) = learners.compare(frame)
    assert row["difference"] == 1
    assert row["ci95"] == pytest.approx([1 - 2.776 * (2 / 3) ** 0.5, 1 + 2.776 * (2 / 3) ** 0.5], abs=1e-3)


def test_both_gates_are_trained_and_judged(tmp_path: Path) -> None:
    from benchmarks.experiments import hybrid
    from experts.hybrid import HybridSettings

    result = hybrid.run("digits", 2, HybridSettings(epochs=6), tmp_path, lambda share: None)
    frame = hybrid.summary(result)
    assert frame["gate"].tolist() == [
        "cross-entropy",
        "none, one expert",
        "policy gradient",
        "policy gradient, confidence",
    ]
    assert frame["experts"][1] == 1
    alone, chance = [row for row in result["rows"] if row["gate"] == "none, one expert"], 0.1
    assert all(row["accuracy"] > 2 * chance for row in alone)
    assert (frame["low"] <= frame["return"]).all()
    for row in result["rows"]:
        assert row["return"] == pytest.approx(row["accuracy"] - 0.2 * row["cost"])
    assert len(result["logs"]) == 12
    assert json.loads((tmp_path / "hybrid.json").read_text())["trends"] == result["trends"]
    assert (tmp_path / "hybrid.png").exists()
