"""The search of settings: real trials, kept, gone on with, judged on validation."""

import json
from pathlib import Path
from typing import Any

import pytest

from agents import tuned
from benchmarks import tune

ENV = "moe_envs:MoERouting-v0"
ARGUMENTS: dict[str, Any] = {"env_id": ENV, "env_kwargs": {"bundle": "digits"}, "timesteps": 20_000}


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tune, "EPISODES", 50)
    monkeypatch.setitem(tune.CHOICES, "n_steps", [32])


@pytest.mark.filterwarnings("ignore::optuna.exceptions.ExperimentalWarning")
@pytest.mark.parametrize(("algo", "backend"), [("ppo", "own"), ("a2c", "sb3")])
def test_a_search_finds_no_worse_than_it_began_with(
    algo: str, backend: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = tune.search(algo=algo, backend=backend, trials=3, folder=tmp_path, **ARGUMENTS)
    content = json.loads((tmp_path / tune.BEST).read_text())
    assert content["settings"] == found
    start = tuned.settings(algo, ENV, backend) | {"total_timesteps": 20_000, "n_steps": 32}
    assert content["validation"] >= tune.train(ENV, algo, backend, {"bundle": "digits"}, 0, start) - 1e-9
    monkeypatch.delattr(tune, "train")  # nothing is trained again
    again = tune.search(algo=algo, backend=backend, trials=3, folder=tmp_path, **ARGUMENTS)
    assert again == found
