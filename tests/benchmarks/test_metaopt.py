"""The experiment on MoEMetaOpt-v0, small: searched, trained, judged on the same contexts, drawn."""

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from typer.testing import CliRunner

from agents.baselines.metaopt import Round
from benchmarks.cli.metaopt import benchmark_app
from benchmarks.experiments import metaopt


class Here(ThreadPoolExecutor):
    """Jobs in this process, where what is patched is seen."""

    def __init__(self, processes: int) -> None:
        super().__init__(1)


def test_all_are_judged_on_the_same_contexts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metaopt, "ROUNDS", (Round(2, 2),))
    monkeypatch.setattr(metaopt, "GROUP_ROUNDS", (Round(2, 2),))
    monkeypatch.setattr(metaopt.jobs, "pool", Here)
    monkeypatch.setattr(metaopt, "SEARCHED_CONTEXTS", 2)
    monkeypatch.setattr(metaopt, "SHOWN", 3)
    monkeypatch.setattr(metaopt, "BEAM", 1)
    result = metaopt.run("digits", 2, 3, 1024, True, 2, tmp_path, lambda name: lambda share: None)
    frame = pd.read_csv(tmp_path / "trainings.csv")
    assert set(frame["policy"]) == {
        *(
            "PPO",
            "constant",
            "linear",
            "cosine",
            "one-cycle",
            "plateau",
            "random actions",
            "rules",
            "constant, by group",
        ),
    }
    assert len(frame[frame["policy"] == "PPO"]) == 2 * 2 * 3
    assert (frame["arrived"] == (frame["steps"] <= 30)).all()
    assert json.loads((tmp_path / "results.json").read_text())["rows"] == json.loads(json.dumps(result["rows"]))
    for start in ("random rate", "tuned rate"):
        assert result["searched"][start]["searched"] <= result["searched"][start]["ppo"]
    lines = pd.read_csv(tmp_path / "timelines.csv")
    shown = lines[(lines["policy"] == "constant") & (lines["start"] == "random rate")]
    assert (shown.groupby("episode")["gate_rate"].nunique() == 1).all()
    assert set(shown["episode"]) == {0, 1, 2}
    assert lines[lines["policy"] == "linear"].groupby(["episode", "start"])["gate_rate"].is_monotonic_decreasing.all()
    assert {"steps.png", "timelines.png"} <= {path.name for path in tmp_path.iterdir()}
    monkeypatch.setattr(metaopt, "run", lambda *arguments: result)
    printed = CliRunner().invoke(benchmark_app, ["metaopt", "--out", str(tmp_path)], env={"COLUMNS": "200"}).stdout
    for row in result["rows"]:
        assert f"{row['steps']:.2f}" in printed
    assert "searched with the future known" in printed
    assert "judged at" not in printed
    result["policies"][0]["commit"] = "of yesterday"
    printed = CliRunner().invoke(benchmark_app, ["metaopt", "--out", str(tmp_path)], env={"COLUMNS": "200"}).stdout
    assert "policies trained at of yesterday, judged at" in printed


def test_differences_by_hand() -> None:
    rows: list[dict[str, Any]] = [
        {"start": "s", "policy": policy, "seed": seed, "episode": episode, "steps": steps, "arrived": steps < 31}
        for policy, seed, table in (("PPO", 0, [4, 6]), ("PPO", 1, [6, 8]), ("constant", 0, [10, 31]))
        for episode, steps in enumerate(table)
    ]
    ours, theirs = metaopt.summarise(pd.DataFrame(rows))
    assert (ours["steps"], ours["arrived"], ours["seeds"]) == (6, 1, 2)
    assert (theirs["steps"], theirs["arrived"]) == (20.5, 0.5)
    assert theirs["ppo_less"] == np.mean([-6, -25, -4, -23])
    assert theirs["share"] == theirs["ppo_less"] / 20.5
