"""Tuned settings reach our learners, SB3 and RL Baselines3 Zoo alike."""

from pathlib import Path

import pytest

import agents
from agents import tuned

ZOO = Path(agents.__file__).parent / "rl_zoo"


def test_the_files_for_the_zoo_are_the_tuned_settings() -> None:
    assert {path.stem for path in ZOO.glob("*.yml")} == {"ppo", "a2c", "dqn", "qrdqn", "ppo_lstm"}
    for path in ZOO.glob("*.yml"):
        assert path.read_text() == tuned.rl_zoo(path.stem)


def test_the_zoos_files_are_yaml_that_says_the_same() -> None:
    yaml = pytest.importorskip("yaml")
    found = yaml.safe_load((ZOO / "ppo.yml").read_text())["MoERouting-v0"]
    wanted = tuned.settings("ppo", "MoERouting-v0", "sb3")
    assert "residual" not in wanted["policy_kwargs"]
    assert found["n_timesteps"] == wanted["total_timesteps"]
    assert found["learning_rate"] == "lin_1e-3"
    assert eval(found["policy_kwargs"], {"dict": dict}) == wanted["policy_kwargs"]
    assert {name: found[name] for name in ("n_envs", "n_steps", "gae_lambda")} == {
        name: wanted[name] for name in ("n_envs", "n_steps", "gae_lambda")
    }


def test_overrides_leave_the_table_alone() -> None:
    assert tuned.settings("ppo", "moe_envs:MoERouting-v0", "own", n_steps=7)["n_steps"] == 7
    assert tuned.settings("ppo", "MoERouting-v0")["n_steps"] == 32
    assert tuned.settings("reinforce", "CartPole-v1", "own") == {"n_envs": 8, "total_timesteps": 100_000}


def test_tuned_groups_divide_the_rows() -> None:
    found = [tuned.settings("ppo", "MoEExpertCache-v0", n_envs=rows)["group_size"] for rows in (256, 4, 3)]
    assert found == [8, 4, 1]
    assert tuned.settings("ppo", "MoEExpertCache-v0", n_envs=4, group_size=2)["group_size"] == 2
    assert "group_size" not in tuned.settings("ppo", "MoEExpertCache-v0", "sb3")
