"""The experiment on MoEMetaOpt-v0, small: searched, trained, judged on the same contexts, drawn."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from agents.yardsticks.metaopt import Round
from benchmarks.experiments import metaopt


def test_all_are_judged_on_the_same_contexts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metaopt, "ROUNDS", (Round(2, 2),))
    monkeypatch.setattr(metaopt, "GROUP_ROUNDS", (Round(2, 2),))
    result = metaopt.run("digits", 2, 3, 1024, 2, tmp_path, lambda name: lambda share: None)
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
    assert (tmp_path / "steps.png").exists()


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
