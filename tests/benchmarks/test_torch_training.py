"""Transfer and the plain torch loop, small: all judged on the same seeds, differences by hand, timelines."""

import json
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from benchmarks.cli.metaopt import benchmark_app
from typer.testing import CliRunner

from agents import PPO
from agents.baselines.metaopt import Round
from benchmarks import torch_training
from benchmarks.experiments import torch_loop, transfer
from benchmarks.runner import processes as jobs
from benchmarks.speed import dacbench as sgd_env
from experts import tasks

SMALL: dict[str, Any] = {"n_envs": 4, "n_steps": 8, "batch_size": 32}


class Here(ThreadPoolExecutor):
    """Jobs in this process, where what is patched is seen."""

    def __init__(self, processes: int) -> None:
        super().__init__(1)


@pytest.fixture(autouse=True)
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transfer.jobs, "pool", Here)


@pytest.fixture
def problem() -> torch_training.Problem:
    return torch_training.small("digits")


def policy(folder: Path) -> Path:
    PPO("MlpPolicy", "moe_envs:MoEMetaOpt-v0", seed=1, **SMALL).save(folder / "policy")
    return folder / "policy"


def test_policies_and_schedules_meet_the_same_trainings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transfer, "ROUNDS", (Round(2, 2),))
    cases = [(*case[:2], case[2] | {"max_actions": 5}) for case in (transfer.CASES[2], transfer.CASES[4])]
    monkeypatch.setattr(transfer, "CASES", cases)
    small = torch_training.small("digits")._replace(max_actions=5)
    monkeypatch.setattr(torch_training, "small", lambda name: small)
    monkeypatch.setattr(transfer, "SMALL", ("digits",))
    monkeypatch.setattr(transfer, "SEARCH", ((2, 1),))
    mixed = {"digits, fashion-mnist": (("digits", "fashion-mnist"), transfer.MIXED)}
    mixed["fashion-mnist, breast-cancer"] = (("fashion-mnist", "digits"), transfer.MIXED)
    monkeypatch.setattr(transfer, "TRAINED_ON", mixed)
    result = transfer.run(2, 16, 1024, 1, tmp_path, lambda name: lambda share: None)
    frame = pd.read_csv(tmp_path / "trainings.csv")
    assert set(frame["kind"]) == {"unseen data", "wider model", "SGD, momentum 0.9", "LAMB"}
    sizes = frame.groupby(["kind", "judged_on", "start", "policy", "seed"]).size()
    assert (sizes == 16).sum() == 2 * (7 + 7)
    assert (sizes == 2).sum() == 2 * 2 * (3 + 2)
    assert len(result["rows"]) == 2 * (6 + 6) + 2 * 2 * 4
    saved = sorted(path.name for path in (tmp_path / "policies").iterdir() if path.is_dir())
    assert saved == [
        f"{name}-{seed}" for name in ("digits+fashion-mnist", "fashion-mnist+breast-cancer") for seed in (0, 1)
    ]
    before = [path.stat().st_mtime_ns for path in (tmp_path / "policies").iterdir()]
    again = transfer.learn("digits, fashion-mnist", 0, 1024, tmp_path)
    assert again == result["policies"][0]
    assert before == [path.stat().st_mtime_ns for path in (tmp_path / "policies").iterdir()]
    with pytest.raises(ValueError, match="holds a policy of other settings"):
        transfer.learn("digits, fashion-mnist", 0, 2048, tmp_path)
    monkeypatch.setattr(transfer, "run", lambda *arguments: result)
    printed = CliRunner().invoke(benchmark_app, ["transfer", "--out", str(tmp_path)], env={"COLUMNS": "200"}).stdout
    for row in result["rows"]:
        assert row["policy"] != "PPO" or f"{row['steps']:.2f}" in printed
    assert "LAMB" in printed


def test_a_loop_is_the_same_for_the_same_seed_and_follows_its_scheduler(problem: torch_training.Problem) -> None:
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


def test_the_loop_experiment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, problem: torch_training.Problem) -> None:
    monkeypatch.setattr(torch_loop, "fashion_images", lambda: problem._replace(max_actions=5, target=0.85))
    monkeypatch.setattr(torch_loop, "SEARCH", ((2, 1),))
    result = torch_loop.run([policy(tmp_path)], 2, 4, 1, tmp_path / "out", lambda name: lambda share: None)
    rows = pd.read_csv(tmp_path / "out" / "trainings.csv")
    assert len(rows) == 2 * (3 + 3 + 1 + 1)
    tuned = [row for row in result["rows"] if row["start"] == "tuned rate"]
    ours, others = tuned[-1], tuned[:-1]
    assert (ours["policy"], len(others)) == ("PPO", 3)
    for row in others:
        assert row["ppo_less"] == pytest.approx(ours["steps"] - row["steps"])
    assert result["overhead"]["pairs"] == 4
    lines = pd.read_csv(tmp_path / "out" / "timelines.csv")
    assert (lines["beta1"] == 0.9).all()
    written = json.loads((tmp_path / "out" / "results.json").read_text())
    assert written["rows"] == json.loads(json.dumps(result["rows"]))
    assert (tmp_path / "out" / "curves.png").stat().st_size > 10_000
    monkeypatch.setattr(torch_loop, "run", lambda *arguments: result)
    printed = CliRunner().invoke(benchmark_app, ["loop", str(tmp_path / "policy")], env={"COLUMNS": "200"}).stdout
    for row in result["rows"]:
        assert f"{row['epochs']:.2f}" in printed
    assert f"{result['overhead']['overhead']:+.2%}" in printed


def test_a_policy_drives_lamb(tmp_path: Path, problem: torch_training.Problem) -> None:
    make = transfer.optimizers()["LAMB"]
    few = problem._replace(max_actions=6, target=1.1)
    drive = torch_training.by_policy(PPO.load(policy(tmp_path)))
    found = torch_training.train(few, make(0.02, 0.01), drive, 0)
    rates = [row["experts_rate"] for row in found["timeline"]]
    assert len(set(rates)) > 1
    assert all(np.isfinite(row["validation_loss"]) for row in found["timeline"])


def test_dacbench_is_asked_for_where_it_is_absent() -> None:
    with pytest.raises(ValueError, match="does not run DACBench: .*dacbench"):
        sgd_env.compare(sys.executable, lambda share: None)


def test_policies_of_different_tasks_are_refused(tmp_path: Path) -> None:
    one = policy(tmp_path)
    PPO("MlpPolicy", "moe_envs:MoEMetaOpt-v0", env_kwargs={"task": "fashion-mnist"}, **SMALL).save(tmp_path / "other")
    for several in ([one, one], [one, tmp_path / "other"]):
        with pytest.raises(ValueError, match="different ones, trained on the same tasks"):
            torch_loop.run(several, 2, 4, 1, tmp_path / "out", lambda name: lambda share: None)


def test_the_first_error_ends_what_waits() -> None:
    done = []
    with Here(1) as pool:
        futures = [pool.submit(lambda: 1 // 0), *(pool.submit(done.append, number) for number in range(1000))]
        with pytest.raises(ZeroDivisionError):
            jobs.gather(futures, lambda share: None)
        assert futures[-1].cancelled() or len(done) == 1000


def test_dacbench_gets_our_data_as_tensors_and_as_images(tmp_path: Path) -> None:
    sgd_env._pack(tmp_path)
    tensors = sgd_env.Inputs(str(tmp_path), train=True)
    images = sgd_env.Inputs(str(tmp_path), train=True, transform=np.asarray)
    task = tasks.load("digits")
    assert len(tensors) == len(images) == sgd_env.EPOCH * sgd_env.BATCH + len(task.validation_labels)
    for place, of in ((3, task.inputs[3]), (sgd_env.EPOCH * sgd_env.BATCH, task.validation_inputs[0])):
        np.testing.assert_array_equal(tensors[place][0], of)
        pixels = (images[place][0].astype(np.float32).ravel() - 128) / 63
        np.testing.assert_allclose(pixels, of.clip(-2, 2), atol=1 / 63)
        assert tensors[place][1] == images[place][1]
