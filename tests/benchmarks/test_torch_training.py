"""Plain torch trainings: the same for the same seed, after their scheduler, driven by a policy."""

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from agents import PPO
from benchmarks import torch_training
from benchmarks.experiments import loop, transfer
from benchmarks.programs import dacbench as program
from benchmarks.speed import dacbench
from experts import tasks

SMALL: dict[str, Any] = {"n_envs": 4, "n_steps": 8, "batch_size": 32}


@pytest.fixture
def problem() -> torch_training.LoopTask:
    return torch_training.small("digits")


def policy(folder: Path) -> Path:
    PPO("MlpPolicy", "moe_envs:MoEMetaOpt-v0", seed=1, **SMALL).save(folder / "policy")
    return folder / "policy"


def test_a_loop_is_the_same_for_the_same_seed_and_follows_its_scheduler(problem: torch_training.LoopTask) -> None:
    torch.set_num_threads(1)
    few = problem._replace(max_actions=8, target=1.1)
    first, second = (
        torch_training.train(few, torch_training.adamw(0.01, 0.1), torch_training.by_cosine, 3) for _ in range(2)
    )
    rates = [row["gate_rate"] for row in first["timeline"]]
    np.testing.assert_allclose(rates, [0.005 * (1 + np.cos(np.pi * step / 8)) for step in range(8)])
    assert [row["validation_loss"] for row in first["timeline"]] == [
        row["validation_loss"] for row in second["timeline"]
    ]
    assert (first["steps"], first["arrived"]) == (9, False)
    easy = problem._replace(target=0.5)
    arrived = torch_training.train(easy, torch_training.adamw(0.02, 0.0), torch_training.constant, 3)
    assert arrived["arrived"]
    assert arrived["steps"] == len(arrived["timeline"]) < 30


def test_a_policy_drives_lamb(tmp_path: Path, problem: torch_training.LoopTask) -> None:
    make = transfer.optimizers()["LAMB"]
    few = problem._replace(max_actions=6, target=1.1)
    drive = torch_training.by_policy(PPO.load(policy(tmp_path)))
    found = torch_training.train(few, make(0.02, 0.01), drive, 0)
    rates = [row["experts_rate"] for row in found["timeline"]]
    assert len(set(rates)) > 1
    assert all(np.isfinite(row["validation_loss"]) for row in found["timeline"])


def test_dacbench_is_asked_for_where_it_is_absent(tmp_path: Path) -> None:
    setup = dacbench.DacbenchSpeed(steps=1, images=False, python=sys.executable)
    with pytest.raises(ValueError, match="does not run DACBench: .*dacbench"):
        dacbench.measure(setup, 0, "all", tmp_path)


def test_policies_of_different_tasks_are_refused(tmp_path: Path) -> None:
    one, other = policy(tmp_path), tmp_path / "other"
    PPO("MlpPolicy", "moe_envs:MoEMetaOpt-v0", env_kwargs={"task": "fashion-mnist"}, **SMALL).save(other)
    for several in ([one, one], [one, other]):
        setup = loop.LoopSetup(
            policy="PPO", start="random rate", data="digits", policies=[str(each) for each in several]
        )
        with pytest.raises(ValueError, match="different ones, trained on the same tasks"):
            loop.measure(setup, 0, "all", tmp_path)


def test_dacbench_gets_our_data_as_tensors_and_as_images(tmp_path: Path) -> None:
    dacbench._pack(tmp_path)
    tensors = program.Inputs(str(tmp_path), train=True)
    images = program.Inputs(str(tmp_path), train=True, transform=np.asarray)
    task = tasks.load("digits")
    assert len(tensors) == len(images) == program.EPOCH * program.BATCH + len(task.validation_labels)
    for place, of in ((3, task.inputs[3]), (program.EPOCH * program.BATCH, task.validation_inputs[0])):
        np.testing.assert_array_equal(tensors[place][0], of)
        pixels = (images[place][0].astype(np.float32).ravel() - 128) / 63
        np.testing.assert_allclose(pixels, of.clip(-2, 2), atol=1 / 63)
        assert tensors[place][1] == images[place][1]
