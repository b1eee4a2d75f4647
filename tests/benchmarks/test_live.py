"""The study of live costs: its arithmetic by hand, and its play for real."""

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from benchmarks.experiments import live


class First:
    def predict(self, observation: np.ndarray, state: Any = None, **_: Any) -> tuple[np.ndarray, Any]:
        return np.zeros(len(observation), dtype=np.int64), state


def frame() -> pd.DataFrame:
    rows = []
    for name, kind, seed, gain in (
        ("PPO", "learned", 0, 0.1),
        ("PPO", "learned", 1, 0.3),
        ("rule", "baseline", 0, 0.0),
    ):
        for costs, less, factor in (("machine", 0.0, 1.0), ("live", 0.05, 1.5)):
            for episode in range(4):
                value = 0.5 + gain - less + 0.01 * episode
                rows.append({"policy": name, "kind": kind, "seed": seed, "costs": costs, "return": value,
                             "quality": 0.9, "cost": 1.0, "cost/time": factor * (1 + episode)})  # fmt: skip
    return pd.DataFrame(rows)


def test_summary_by_hand() -> None:
    ppo, rule = live.summarise(frame())
    assert (ppo["policy"], rule["policy"]) == ("PPO", "rule")
    assert ppo["machine"] == pytest.approx(0.5 + 0.2 + 0.015)
    assert ppo["difference"] == pytest.approx(-0.05)
    assert ppo["time_ratio_of_means"] == pytest.approx(1.5)
    assert rule["live"] == pytest.approx(0.465)
    found = live.compare(frame(), "rule")
    assert found["live"]["difference"] == pytest.approx(0.2)
    assert found["machine"]["ci95"][0] < 0.2 < found["machine"]["ci95"][1]


def test_played_for_real(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(live, "BLOCKS", 2)
    monkeypatch.setattr(live, "EPISODES_A_BLOCK", 5)
    played = live._play(
        [("first", "baseline", 0, First())], {"bundle": "digits", "cost_weight": 0.2}, lambda share: None
    )
    assert len(played) == 2 * 2 * 5
    by_costs = {costs: rows.reset_index() for costs, rows in played.groupby("costs")}
    np.testing.assert_array_equal(by_costs["live"]["quality"], by_costs["machine"]["quality"])
    assert (by_costs["live"]["cost/time"] != by_costs["machine"]["cost/time"]).all()
    (row,) = live.summarise(played)
    assert row["time_ratio_median"] > 0
    result = {"rows": [row], "cost_weight": 0.2, "ppo_less_best_baseline": live.compare(frame(), "rule")}
    assert "PPO less rule, live: +0.2000" in live.tables(result)[-1]
    live.plot(pd.concat([played, frame()]), tmp_path / "live.png")
    assert (tmp_path / "live.png").read_bytes().startswith(b"\x89PNG")
