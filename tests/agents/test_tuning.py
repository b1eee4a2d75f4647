"""The search of settings: real trials, kept, gone on with, judged on validation."""

import json
from pathlib import Path
from typing import Any

import pytest

from agents import tuned
from agents import tuning as tune
from agents.rollouts import NotFiniteError

ENV = "moe_envs:MoERouting-v0"
ARGUMENTS: dict[str, Any] = {"env_id": ENV, "env_kwargs": {"bundle": "digits"}, "timesteps": 20_000}


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
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


def test_a_search_that_was_interrupted_goes_on_as_it_would_have(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried: list[dict[str, Any]] = []

    def train(*arguments: Any) -> float:
        tried.append(arguments[5])
        if len(tried) == 3:
            raise NotFiniteError("diverged")
        return -abs(float(arguments[5]["learning_rate"].split()[1]) - 2e-3)

    monkeypatch.setattr(tune, "train", train)
    found = []
    for name, cuts in (("whole", (5,)), ("cut", (2, 3, 5))):
        tried.clear()
        for trials in cuts:
            tune.search(algo="ppo", backend="own", trials=trials, folder=tmp_path / name, **ARGUMENTS)
        assert len({each["learning_rate"] for each in tried}) == 6  # one of them failed
        found.append(tried.copy())
    assert found[0] == found[1]
