"""The experiment behind the demo, small: real trainings, real baselines, a result file and a picture."""

import json
from pathlib import Path

import numpy as np
import pytest

from benchmarks import references
from benchmarks.experiments import routing
from benchmarks.speed import environments


def test_the_experiment_writes_rows_summary_and_picture(tmp_path: Path) -> None:
    shares: list[float] = []
    result = routing.run(
        [0.3], [0, 1], tmp_path, bundle="digits", timesteps=8192, add_task=lambda description: shares.append
    )
    written = json.loads((tmp_path / "results.json").read_text())
    assert written == json.loads(json.dumps(result))
    assert {"rows", "summary", "commit", "fingerprint", "settings"} <= written.keys()
    keys = {"env", "cost_weight", "policy", "kind", "seed", "return", "quality", "cost", "ci95"}
    assert all(keys <= row.keys() for row in written["rows"])
    kinds = [row["kind"] for row in written["rows"]]
    assert (kinds.count("learned"), kinds.count("bound")) == (2, 1)
    (summary,) = written["summary"]
    chosen = [row for row in written["rows"] if row.get("chosen")]
    assert [row["policy"] for row in chosen] == [summary["best_baseline"]]
    ours = np.mean([row["return"] for row in written["rows"] if row["kind"] == "learned"])
    assert summary["difference"] == pytest.approx(ours - chosen[0]["return"])
    assert summary["ci95"][0] < summary["difference"] < summary["ci95"][1]
    way = summary["difference"] / (summary["bound"] - summary["best_baseline_return"])
    assert summary["share_of_way_to_bound"] == pytest.approx(way)
    assert (tmp_path / "pareto.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "ppo-0.3-seed1" / "policy.safetensors").exists()
    assert max(shares) == 1.0
    assert len(routing.tables(result)) == 4


def test_speed_is_measured_for_every_number_of_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environments, "CASES", {1: (40, 2.5), 8: (40, None)})
    monkeypatch.setattr(environments, "ROUNDS", 1)  # a median is the figure itself
    rows = environments.measure()
    assert [(row["rows"], row["floor"]) for row in rows] == [(1, 2.5), (8, None)]
    for row in rows:
        assert row["ratio"] == pytest.approx(row["routing"] / row["cartpole"])
    monkeypatch.setattr(environments, "TRAININGS", {2: 10})
    (row,) = environments.measure_trainings()
    assert row["trainings"] == 2
    assert row["ratio"] == pytest.approx(row["batched"] / row["torch"])
    assert row["env_overhead"] == pytest.approx(row["batched"] / row["env"] - 1)


def test_digits_are_rebuilt_from_their_data(tmp_path: Path) -> None:
    built = references.rebuild("digits", tmp_path)
    assert built.metadata["accuracy"]["test/top-2"] > 0.88
    assert built.profile is not None
    assert built.metadata["data"]["name"] == "digits"
