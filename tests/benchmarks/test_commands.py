"""The commands that no other test calls, small; most take minutes, and are run where MOE_ENVS_LONG is set."""

import os
from pathlib import Path

import pytest
from typer.testing import CliRunner

from benchmarks import metaopt_commands, speed  # noqa: F401, the first registers commands
from benchmarks.cli.benchmark import benchmark_app
from benchmarks.experiments import learners
from benchmarks.speed import jax_ppo

LONG = pytest.mark.skipif("MOE_ENVS_LONG" not in os.environ, reason="minutes")
ROUTING = "moe_envs:MoERouting-v0"


def said(*arguments: str) -> str:
    done = CliRunner().invoke(benchmark_app, arguments, catch_exceptions=False, env={"COLUMNS": "200"})
    assert done.exit_code == 0, done.output
    return done.output


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speed, "CASES", {8: (20, None)})
    monkeypatch.setattr(speed, "TRAININGS", {2: 5})
    monkeypatch.setattr(speed, "ROUNDS", 2)
    for module in (learners, jax_ppo):
        monkeypatch.setattr(module, "ROUNDS", 1)
        monkeypatch.setattr(module, "STEPS", 2048)
    monkeypatch.setattr(learners, "CASES", [(ROUTING, 8, 128, 256)])
    monkeypatch.setattr(jax_ppo, "CASES", [(8, 128, 64)])


@LONG
def test_those_that_train_and_judge(tmp_path: Path) -> None:
    shown = said("live", "--bundle", "digits", "--seeds", "1", "--timesteps", "4096", "--out", str(tmp_path / "live"))
    assert "profiled" in shown
    shown = said("hybrid", "--data", "digits", "--seeds", "2", "--epochs", "2", "--out", str(tmp_path / "hybrid"))
    assert "accuracy" in shown
    out = str(tmp_path / "routing")
    shown = said(
        "routing", "--cost-weights", "0.4", "--seeds", "1", "--bundle", "digits", "--timesteps", "4096", "--out", out
    )
    assert "PPO less the baseline best on validation" in shown


@LONG
def test_those_that_time() -> None:
    assert "CartPole-v1" in said("speed")
    assert ROUTING in said("learners", "--environments", "")
    pytest.importorskip("jax")
    assert "JAX" in said("jax")


def test_dacbench_wants_an_interpreter() -> None:
    refused = CliRunner().invoke(benchmark_app, ["dacbench", "/nowhere/python"])
    assert refused.exit_code == 2
    assert "does not exist" in refused.output


@LONG
def test_those_that_compare_trainings(tmp_path: Path) -> None:
    assert "hypervolume" in said("demo", "--timesteps", "4096", "--out", str(tmp_path / "demo"))
    assert "to beat" in said("race", "--seeds", "2", "--out", str(tmp_path / "race"))
