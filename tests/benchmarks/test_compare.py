"""Curves of several runs."""

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from agents import runs
from benchmarks.cli import compare


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs")
    small = {"total_timesteps": 8192, "n_envs": 32}
    for weight in (0.1, 0.4):
        for seed in (0, 1):
            kwargs = {"bundle": "digits", "cost_weight": weight}
            name = out / f"{weight}-{seed}"
            runs.train("moe_envs:MoERouting-v0", "ppo", seed, name, kwargs, small, backend="own")
    return out


def test_runs_become_curves_with_bands_and_a_front(folder: Path, tmp_path: Path) -> None:
    result = compare.compare([folder], tmp_path, ["algo", "cost_weight"], 0.5)
    assert [(row["group"], row["seeds"]) for row in result["groups"]] == [("0.1", 2), ("0.4", 2)]
    assert json.loads((tmp_path / "compare.json").read_text())["groups"] == result["groups"]
    assert (tmp_path / "compare.png").read_bytes().startswith(b"\x89PNG")
    curves = pd.read_csv(tmp_path / "curves.csv")
    assert (curves["return low"] <= curves["return"]).all()
    assert len(curves) == 2 * compare.POINTS
    episodes = pd.read_csv(folder / "0.1-0" / "episodes.csv")
    last = episodes[episodes["timesteps"] >= 0.9 * episodes["timesteps"].max()]
    assert result["runs"][0]["return"] == pytest.approx(last["return"].mean())
    alone = compare.compare([folder / "0.1-0"], tmp_path, ["algo", "cost_weight"], 0.0)
    assert alone["groups"][0]["group"] == "ppo 0.1"


def test_a_band_by_hand() -> None:
    frames = [
        pd.DataFrame({"timesteps": [0, 10], **{name: [level, level] for name in compare.CURVES}})
        for level in (1.0, 3.0)
    ]
    found = compare.band(frames)
    assert np.allclose(found["return"], 2)
    assert found["return high"].iloc[0] == pytest.approx(2 + 12.706 * 1, abs=1e-3)


def test_nothing_to_compare_is_said(tmp_path: Path) -> None:
    with pytest.raises(runs.RunError, match="moe-train writes them"):
        compare.compare([tmp_path], tmp_path / "out", ["algo"], 0.5)
