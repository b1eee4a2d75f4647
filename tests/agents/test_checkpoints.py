"""Checkpoints: whole or refused, whatever happens to their bytes or to the process that writes them."""

import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest

from agents import PPO, REINFORCE, checkpoints
from agents.checkpoints import MANIFEST, CheckpointError
from tests.processes import running

DIGITS: dict[str, Any] = {
    "env": "moe_envs:MoERouting-v0", "n_envs": 4, "n_steps": 32, "env_kwargs": {"bundle": "digits"},
}  # fmt: skip
CONTENT: dict[str, Any] = {
    "floats": np.arange(6, dtype=np.float32).reshape(2, 3),
    "nested": {"bits": np.array([True, False]), "list": [1, 2.5, "three", None, {"array": np.zeros(0)}]},
    "records": np.array([b"twelve bytes"], dtype="V12"),
    "scalar": np.float64(0.1),
    "zero-dimensional": np.array(3),
    "large": 2**100,
}
WRITER = """
import sys
from pathlib import Path
from agents import PPO
agent = PPO("MlpPolicy", "moe_envs:MoERouting-v0", n_envs=4, n_steps=4, env_kwargs={"bundle": "digits"})
print("ready", flush=True)
say = lambda agent: print(agent.num_timesteps, flush=True)
agent.learn(10**9, say, checkpoint_path=sys.argv[1], checkpoint_every=1)
"""


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    checkpoints.save(tmp_path / "saved", CONTENT)
    return tmp_path / "saved"


def test_what_is_saved_comes_back(saved: Path) -> None:
    found = checkpoints.load(saved)
    assert found["floats"].dtype == np.float32
    assert np.array_equal(found["floats"], CONTENT["floats"])
    assert found["nested"]["list"][:4] == [1, 2.5, "three", None]
    assert found["nested"]["list"][4]["array"].shape == (0,)
    assert found["records"].tobytes() == CONTENT["records"].tobytes()
    assert found["large"] == 2**100
    assert found["scalar"] == 0.1
    assert found["zero-dimensional"].shape == ()
    checkpoints.save(saved, {"other": 1})
    assert checkpoints.load(saved) == {"other": 1}
    assert sorted(path.name for path in saved.parent.iterdir()) == ["saved"]


@pytest.mark.parametrize("pattern", ["arrays-*.safetensors", MANIFEST])
def test_no_flipped_bit_and_no_truncation_loads(saved: Path, pattern: str) -> None:
    (name,) = (path.name for path in saved.glob(pattern))
    raw, generator = (saved / name).read_bytes(), np.random.default_rng(0)
    for place in generator.integers(8 * len(raw), size=1000).tolist():
        flipped = bytearray(raw)
        flipped[place // 8] ^= 1 << place % 8
        (saved / name).write_bytes(flipped)
        with pytest.raises(CheckpointError, match=name):
            checkpoints.load(saved)
    for length in range(len(raw)):
        (saved / name).write_bytes(raw[:length])
        with pytest.raises(CheckpointError):
            checkpoints.load(saved)
    (saved / name).unlink()
    with pytest.raises(CheckpointError, match="holds no checkpoint"):
        checkpoints.load(saved)
    (saved / name).write_bytes(raw)
    checkpoints.load(saved)


def test_a_run_falls_back_on_the_newest_whole_checkpoint(tmp_path: Path) -> None:
    for number in (1, 2, 3):
        checkpoints.save(checkpoints.numbered(tmp_path, number), {"number": number})
    checkpoints.prune(tmp_path)
    assert len(list(tmp_path.iterdir())) == 2
    assert checkpoints.find(tmp_path) == {"number": 3}
    (checkpoints.numbered(tmp_path, 3) / MANIFEST).write_text("{}")
    with pytest.warns(UserWarning, match="0003.* is damaged .*0002 is taken"):
        assert checkpoints.find(tmp_path) == {"number": 2}
    shutil.rmtree(checkpoints.numbered(tmp_path, 2))
    with pytest.raises(CheckpointError, match="damaged or foreign"):
        checkpoints.find(tmp_path)
    with pytest.raises(CheckpointError, match="holds no checkpoint"):
        checkpoints.find(tmp_path / "nothing")


def test_another_algorithms_checkpoint_is_refused(tmp_path: Path) -> None:
    REINFORCE("MlpPolicy", "CartPole-v1", n_envs=1).save(tmp_path / "agent")
    with pytest.raises(CheckpointError, match="REINFORCE, not of PPO"):
        PPO.load(tmp_path / "agent")


def test_a_save_that_fails_leaves_the_old_one(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.fsync", lambda descriptor: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        checkpoints.save(saved, {"new": 1})
    assert "floats" in checkpoints.load(saved)
    assert len(list(saved.iterdir())) == 2


def test_nothing_else_is_ever_deleted(saved: Path) -> None:
    (saved / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="not a checkpoint"):
        checkpoints.save(saved, {"new": 1})
    with pytest.raises(ValueError, match="not a checkpoint"):
        checkpoints.save(saved / "notes.txt", {"new": 1})
    assert "floats" in checkpoints.load(saved)
    mine = saved.parent / "checkpoint-mine"
    mine.mkdir()
    (mine / "notes.txt").write_text("mine")
    checkpoints.prune(saved.parent)
    assert (mine / "notes.txt").exists()


def test_a_run_is_one_trainings(tmp_path: Path) -> None:
    run = tmp_path / "run"
    agent = PPO("MlpPolicy", **DIGITS).learn(256, checkpoint_path=run)
    (run / "checkpoint-notes.txt").write_text("mine")
    before = sorted(run.rglob("*"))
    for another in (PPO("MlpPolicy", **DIGITS), PPO.load(run), PPO.resume(run / "checkpoint-000000000256")):
        with pytest.raises(ValueError, match="another training"):
            another.learn(128, checkpoint_path=run)
    assert sorted(run.rglob("*")) == before
    agent.learn(256, checkpoint_path=tmp_path / "second")
    assert len((tmp_path / "second" / "episodes.csv").read_text().splitlines()) == 1 + 16
    PPO.resume(run).learn(128, checkpoint_path=run)
    assert len((run / "episodes.csv").read_text().splitlines()) == 1 + 12
    (run / "episodes.csv").unlink()
    with pytest.raises(CheckpointError, match=r"episodes.csv had \d+ bytes and has 0"):
        PPO.resume(run).learn(128, checkpoint_path=run)


def test_two_learners_do_not_write_one_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = tmp_path / "run"
    first = PPO("MlpPolicy", **DIGITS).learn(128, checkpoint_path=run)
    monkeypatch.chdir(tmp_path)
    second = PPO.resume("run").learn(256, checkpoint_path=run)
    episodes = (run / "episodes.csv").read_bytes()
    with pytest.raises(ValueError, match="another training"):
        first.learn(128, checkpoint_path=run)
    assert (run / "episodes.csv").read_bytes() == episodes
    second.learn(128, checkpoint_path=run.relative_to(tmp_path))
    mine = tmp_path / "mine" / "episodes.csv"
    mine.parent.mkdir()
    mine.write_text("not yours")
    with pytest.raises(ValueError, match=r"another training wrote \(episodes.csv\)"):
        PPO("MlpPolicy", **DIGITS).learn(128, checkpoint_path=mine.parent)
    assert mine.read_text() == "not yours"


def test_a_loaded_learner_begins_new_episodes(tmp_path: Path) -> None:
    agent = PPO("MlpPolicy", "CartPole-v1", n_envs=2, n_steps=16, temperature="linear 2 1", normalize_rewards=True)
    agent.learn(32)
    agent.save(tmp_path / "agent")
    for again in (PPO.load(tmp_path / "agent"), PPO.resume(tmp_path / "agent")):
        assert again.episodes.carry["length"].sum() == 0
        assert again.reward_scale.discounted.sum() == 0
        assert again._temperature == agent._temperature
        again.learn(2000)
        frame = again.episodes.frame()
        assert (frame["length"] == frame["return"]).all()


def test_a_process_killed_while_it_saves_leaves_a_run_that_resumes(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    for trial in range(4):
        run = tmp_path / str(trial)
        with running([sys.executable, "-c", WRITER, str(run)], stdout=subprocess.PIPE) as process:
            assert process.stdout is not None
            for _ in range(int(generator.integers(3, 8))):
                finished = process.stdout.readline()
            time.sleep(float(generator.uniform(0, 0.02)))
            process.kill()
        agent = PPO.resume(run)
        assert agent.num_timesteps >= int(finished) - 16  # the checkpoint before that callback was finished
        agent.learn(64, checkpoint_path=run)


def test_ctrl_c_saves_and_says_how_to_go_on(tmp_path: Path) -> None:
    run = tmp_path / "run"
    command = [sys.executable, "-c", WRITER.replace("checkpoint_every=1", "checkpoint_every=10**8"), str(run)]
    with running(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        for _ in range(3):
            process.stdout.readline()
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate()
    assert f"PPO.resume({str(run)!r}).learn() goes on" in errors
    assert PPO.resume(run).num_timesteps >= 32


def test_a_learner_of_an_environment_object_is_saved_and_goes_on_bit_for_bit(tmp_path: Path) -> None:
    def env() -> Any:
        mode = {"autoreset_mode": "SameStep", "vectorization_mode": "vector_entry_point"}
        return gymnasium.make_vec("moe_envs:MoERouting-v0", 4, bundle="digits", **mode)

    settings: dict[str, Any] = {"n_steps": 16, "batch_size": 32, "n_epochs": 1, "seed": 3}
    whole = PPO("MlpPolicy", env(), **settings).learn(256)
    half = PPO("MlpPolicy", env(), **settings)
    half.learn(256, lambda agent: agent.num_timesteps < 128)
    half.save(tmp_path / "half")
    with pytest.raises(ValueError, match="give env="):
        PPO.load(tmp_path / "half")
    resumed = PPO.resume(tmp_path / "half", env=env()).learn()
    assert resumed.num_timesteps == whole.num_timesteps == 256
    assert np.array_equal(resumed.network.flat.numpy(), whole.network.flat.numpy())
    other = gymnasium.make_vec("CartPole-v1", 4)
    with pytest.raises(CheckpointError, match="does not fit env"):
        PPO.load(tmp_path / "half", env=other)
