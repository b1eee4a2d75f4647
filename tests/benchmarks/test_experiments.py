"""Every experiment, small: it runs, its metrics repeat, its report has its tables; none is skipped by a list."""

import json
import os
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from benchmarks.runner import runner
from benchmarks.runner.experiments import find, shipped
from benchmarks.runner.matrix import jobs_of, named
from benchmarks.runner.rows import read
from tests.processes import Here

SLOW = {"serving", "load", "layertopk", "expertcache", "unseen", "transfer", "live"}  # repeat in `make test-long`
EXTRA = {"jax": "jax", "layer": "transformers"}


@pytest.mark.parametrize("name", sorted(set(shipped()) - {"dacbench"}))
def test_it_runs_small_and_is_reported(name: str, tmp_path: Path) -> None:
    if name in EXTRA and find_spec(EXTRA[name]) is None:
        pytest.skip(f"{EXTRA[name]} is not installed")
    matrix, experiment = named(name, quick=True), find(name)
    jobs = jobs_of(matrix)
    assert runner.run(matrix, tmp_path, executor=Here) == len(jobs)
    assert runner.rebuild(tmp_path)
    result = json.loads((tmp_path / "results.json").read_text())
    assert result["tables"]
    assert all(rows for rows in result["tables"].values())
    text = (tmp_path / "report.md").read_text()
    assert all(f"![{picture.name}]" in text for picture in tmp_path.glob("*.png"))
    assert runner.run(matrix, tmp_path, executor=Here) == 0
    assert experiment.question.rstrip(".").count(" ") > 4
    if name not in SLOW or "MOE_ENVS_LONG" in os.environ:
        row = min(read(tmp_path / "raw.jsonl"), key=lambda row: row.measured["cpu_s"])
        metrics, _ = runner.measure(row.job, tmp_path / "again")
        assert json.loads(json.dumps(metrics)) == row.metrics


def test_dacbench_is_asked_for() -> None:
    with pytest.raises(runner.RunnerError, match="--set python=PATH"):
        jobs_of(named("dacbench"))


def test_a_difference_of_learners_by_hand() -> None:
    rows = {"env": "x", "backend": ["own"] * 3 + ["sb3"] * 3, "return": [1.0, 2, 3, 0, 1, 2], "train_s": 1.0}
    (row,) = find("learners").score(pd.DataFrame(rows))["tables"]["Returns of final policies"]
    assert row["difference"] == 1
    assert row["95 %"] == pytest.approx([1 - 2.776 * (2 / 3) ** 0.5, 1 + 2.776 * (2 / 3) ** 0.5], abs=1e-3)


def test_live_returns_by_hand() -> None:
    def played(gain: float) -> dict[str, Any]:
        machine = {"return": [0.5 + gain, 0.51 + gain], "quality": [0.9, 0.9], "time": [1.0, 2.0]}
        live = {"return": [0.45 + gain, 0.46 + gain], "quality": [0.9, 0.9], "time": [1.5, 3.0]}
        return {"machine": machine, "live": live}

    frame = pd.DataFrame({"played": [{"PPO": played(0.1)}, {"PPO": played(0.3)}, {"rule": played(0.0)}]})
    tables = find("live").score(frame)["tables"]
    ppo, rule = tables.pop("Returns on test")
    assert (ppo["policy"], rule["policy"]) == ("PPO", "rule")
    assert ppo["profiled"] == pytest.approx(0.705)
    assert ppo["live less profiled"] == pytest.approx(-0.05)
    assert ppo["time, live / profiled"] == pytest.approx(1.5)
    (gains,) = tables.values()
    assert [row["difference"] for row in gains] == pytest.approx([0.2, 0.2])
