"""The commands, as a person calls them."""

import json
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from agents import runs
from benchmarks.cli import main, terminal
from benchmarks.experiments import router
from cost.files import load_json, save_json
from tests.processes import running, wait_until


def command(name: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    code = f"import sys; sys.argv[0] = 'moe'; from benchmarks.cli.main import {name}; {name}()"
    return subprocess.run([sys.executable, "-W", "error", "-c", code, *arguments], capture_output=True, text=True)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "short"
    done = command(
        "train", "--env", "MoERouting-v0", "--backend", "sb3", "--seed", "3", "--timesteps", "4096",
        "--out", str(folder), "--no-baselines", "--sb3-zip",
        "-k", "bundle=digits", "-k", "cost_weight=0.3", "--json", str(folder / "out.json"),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return folder


def test_a_run_folder_says_all_about_the_run(run: Path) -> None:
    config = load_json(run / "run.json", ValueError, "")
    assert config == json.loads((run / "out.json").read_text())
    assert config["env"] == "moe_envs:MoERouting-v0"
    assert config["env_kwargs"] == {"bundle": "digits", "cost_weight": 0.3}
    assert (config["algo"], config["seed"], config["settings"]["total_timesteps"]) == ("ppo", 3, 4096)
    assert {"commit", "fingerprint", "versions", "weights_sha256"} <= config.keys()
    assert (run / "episodes.csv").read_text().count("\n") == 4096 / 32 + 1
    assert list(run.glob("tensorboard/*/events*"))


def test_evaluation_loads_the_run_and_writes_rows(run: Path, tmp_path: Path) -> None:
    done = command("evaluate", str(run), "--split", "test", "--episodes", "50", "--json", str(tmp_path / "e.json"))
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "e.json").read_text())
    (row,) = result["rows"]
    assert (row["policy"], row["kind"], row["split"], row["cost_weight"]) == ("ppo", "learned", "test", 0.3)
    assert row["ci95"][0] < row["return"] < row["ci95"][1]
    assert row["return"] == pytest.approx(row["quality"] - 0.3 * row["cost"])
    assert f"{row['return']:.4f}" in done.stdout


def test_the_router_of_a_run_is_measured(run: Path, tmp_path: Path) -> None:
    setup = router.RouterSetup(run=str(run), episodes=20, repeats=3)
    metrics, measured = router.measure(setup, 0, "all", tmp_path)
    assert metrics["decisions_equal"] >= 0.999
    assert set(metrics["accuracy"]) == set(measured["times"])
    assert metrics["accuracy"]["top-2 gate"] > 0.9 < metrics["accuracy"][router.PLAN]
    assert all(0 < router < whole for each in measured["times"].values() for whole, router in (each["32"], each["512"]))


def test_a_router_on_features_is_measured_without_the_plan(tmp_path: Path) -> None:
    kwargs = {"bundle": "digits", "observation": "features"}
    short = {"total_timesteps": 512, "n_envs": 4, "n_steps": 32, "batch_size": 128, "n_epochs": 1}
    runs.train("moe_envs:MoERouting-v0", "ppo", 3, tmp_path / "run", kwargs, short)
    setup = router.RouterSetup(run=str(tmp_path / "run"), episodes=20, repeats=3)
    metrics, _ = router.measure(setup, 0, "all", tmp_path)
    assert metrics["decisions_equal"] >= 0.999
    assert router.PLAN not in metrics["accuracy"]
    assert metrics["accuracy"][router.PPO] == metrics["accuracy"][f"{router.PPO}, all points"]


def test_the_routers_table_by_hand() -> None:
    def row(seed: int, right: float) -> dict[str, Any]:
        times = {"top-2 gate": (0.010, 0.001), router.PPO: (0.006 + seed / 1000, 0.002 + seed / 1000)}
        return {
            "setup": "wide", "seed": seed, "decisions_equal": 1.0, "weight": 0.5,
            "accuracy": {"top-2 gate": 0.9, router.PPO: right},
            "times": {name: {"32": each, "512": each} for name, each in times.items()},
        }  # fmt: skip

    tables = router.score(pd.DataFrame([row(0, 0.88), row(1, 0.86)]))["tables"]
    top_2, learned = tables["wide, batches of 32"]
    assert top_2["return"] == pytest.approx(0.4)
    assert learned["return"] == pytest.approx(0.87 - 0.5 * 0.65)
    assert top_2["PPO's minus this"] == pytest.approx(0.145)
    assert learned["pays from, ms"] == pytest.approx(2.5 / 0.6)


def test_sb3s_zip_is_loaded_where_it_is_trusted(run: Path) -> None:
    arguments = [str(run / "sb3.zip"), "--env", "MoERouting-v0", "-k", "bundle=digits", "-k", "cost_weight=0.3"]
    refused = command("evaluate", *arguments)
    assert "--trust loads a file you made yourself" in refused.stderr
    done = command("evaluate", *arguments, "--trust", "--episodes", "50", "--json", "-")
    assert done.returncode == 0, done.stderr
    ours = command("evaluate", str(run), "--episodes", "50", "--json", "-")
    returns = [json.loads(each.stdout)["rows"][0]["return"] for each in (done, ours)]
    assert all(-1 < value < 1 for value in returns)


def test_default_names_hold_what_was_given() -> None:
    name = runs.default_name("moe_envs:MoERouting-v0", "ppo", "own", {"cost_weight": 0.4, "bundle": "a/b"}, 3)
    assert re.fullmatch("MoERouting-v0-ppo-bundle=ab-cost_weight=0.4-seed3-[0-9a-f]{8}", name)  # a/b is not ab
    one, text = (runs.default_name("MoERouting-v0", "ppo", "own", {"bundle": value}, 3) for value in (1, "1"))
    assert one != text
    plain = runs.default_name("moe_envs:MoERouting-v0", "ppo", "own", {"cost_weight": 0.4, "bundle": "ab"}, 3)
    assert plain == "MoERouting-v0-ppo-bundle=ab-cost_weight=0.4-seed3"
    long = runs.default_name("moe_envs:MoERouting-v0", "ppo", "own", {"bundle": "x" * 5000}, 3)
    assert len(long) < 200


def test_weights_survive_the_folder_bit_for_bit(run: Path) -> None:
    model: Any
    again: Any
    model, config = runs.load(run)
    again, _ = runs.load(run)
    ours, theirs = model.policy.state_dict(), again.policy.state_dict()
    assert all(bool((ours[name] == theirs[name]).all()) for name in ours)
    assert config["algo"] == "ppo"


def test_a_finished_run_is_not_overwritten_unasked(run: Path) -> None:
    done = command("train", "--out", str(run))
    assert done.returncode == 1
    assert "--overwrite" in done.stderr


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("train", ["--env", "MoERoutnig-v0"], "did you mean MoERouting-v0"),
        ("train", ["--algo", "sac", "--out", "x"], "own: ppo, reinforce; sb3: ppo, a2c, dqn, qrdqn"),
        ("train", ["--backend", "rllib", "--out", "x"], "own: ppo"),
        ("train", ["--resume", "nowhere"], "nowhere is no run folder"),
        ("train", ["-k", "cost_weight", "--out", "x"], "name=value"),
        ("train", ["-k", "splot=test", "--out", "x"], "did you mean 'split'"),
        ("train", ["-k", "split=test", "--out", "x"], "rl_train"),
        ("train", ["-k", "batch_size=abc", "--out", "x"], "batch_size"),
        ("evaluate", ["[/nowhere]"], "[/nowhere] holds no finished run"),
        ("profile", ["bundle", "nothing"], "there are digits, fashion-mnist"),
        ("bundle", ["rebuild", "cifar"], "not a reference bundle"),
    ],
)
def test_mistakes_are_one_line_that_says_what_to_do(
    name: str, arguments: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))
    done = command(name, *arguments)
    assert done.returncode == 1
    assert message in done.stderr
    assert "Traceback" not in done.stderr


OWN = ("--backend", "own", "--no-baselines", "-k", "bundle=digits", "-k", "cost_weight=0.3", "--timesteps", "60000")


def looks_of(run: Path) -> int:
    """Number of validation results of a run; the first one is before the training."""
    return (run / "validation.json").read_text().count("score") if (run / "validation.json").exists() else 0


def test_an_own_run_that_is_stopped_resumes_as_if_it_had_not_been(tmp_path: Path) -> None:
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    assert command("train", *OWN, "--out", str(whole)).returncode == 0
    arguments = [sys.executable, "-c", "from benchmarks.cli.main import train; train()", *OWN, "--out", str(stopped)]
    with running(arguments, stderr=subprocess.PIPE) as process:
        wait_until(lambda: looks_of(stopped) > 1, process)
        process.send_signal(signal.SIGINT)
        assert f"moe-train --resume {stopped}" in process.communicate()[1]
    assert process.returncode == 130
    assert not (stopped / "run.json").exists()
    done = command("train", "--resume", str(stopped), "--no-baselines")
    assert done.returncode == 0, done.stderr
    first: Any
    second: Any
    (first, config), (second, _) = runs.load(whole), runs.load(stopped)
    assert all((first.network.weights[name] == second.network.weights[name]).all() for name in first.network.weights)
    assert (whole / "episodes.csv").read_bytes() == (stopped / "episodes.csv").read_bytes()
    assert (config["backend"], config["algo"], config["cost_weight"]) == ("own", "ppo", 0.3)
    evaluated = command("evaluate", str(stopped), "--episodes", "50")
    assert evaluated.returncode == 0, evaluated.stderr
    again = command("train", "--resume", str(stopped))
    assert "holds a finished run" in again.stderr
    manifest = stopped / "best" / "manifest.json"
    manifest.write_bytes(manifest.read_bytes()[:-1])
    with pytest.raises(runs.RunError, match="manifest.json is damaged"):
        runs.load(stopped)


def test_a_run_killed_before_its_first_checkpoint_resumes(tmp_path: Path) -> None:
    arguments = [
        sys.executable,
        "-c",
        "from benchmarks.cli.main import train; train()",
        *OWN,
        "--out",
        str(tmp_path / "run"),
    ]
    with running(arguments) as process:
        wait_until((tmp_path / "run" / "started.json").exists, process)
        process.kill()
    again = command("train", *OWN, "--out", str(tmp_path / "run"))
    assert "holds an interrupted run" in again.stderr
    beside = command("train", "--resume", str(tmp_path / "run"), "--seed", "3")
    assert "--seed beside --resume" in beside.stderr
    (tmp_path / "run" / "episodes.csv").write_text("timesteps,return\n")  # they are written before a checkpoint
    done = command("train", "--resume", str(tmp_path / "run"), "--no-baselines")
    assert done.returncode == 0, done.stderr
    runs.load(tmp_path / "run")


def test_files_that_are_not_of_a_run_are_never_deleted(tmp_path: Path) -> None:
    weights = tmp_path / "checkpoint-500" / "model.safetensors"
    weights.parent.mkdir()
    weights.write_text("mine")
    (tmp_path / "episodes.csv").write_text("mine")
    for option in ((), ("--overwrite",)):
        done = command("train", *OWN, "--out", str(tmp_path), *option)
        assert "is not of a run of moe-train and would be lost" in done.stderr
    assert weights.read_text() == (tmp_path / "episodes.csv").read_text() == "mine"


def test_validation_is_on_tensorboard_at_its_step(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    settings: Any = {"total_timesteps": 5_000, "n_envs": 16, "n_steps": 32}
    kwargs = {"bundle": "digits"}
    runs.train("moe_envs:MoERouting-v0", "ppo", 0, tmp_path / "run", kwargs, settings, backend="own")
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard" / "PPO_1")).Reload().Scalars("eval/mean_reward")
    assert [event.step for event in events][-1] >= 5_000
    assert len(events) == len({event.step for event in events}) == 10


@pytest.mark.parametrize("name", ["train", "evaluate", "profile", "bundle", "benchmark", "compare", "compress"])
def test_help_and_version(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")  # narrow tables cut the names of options
    done = command(name, "--help")
    assert done.returncode == 0
    assert "Usage" in done.stdout
    assert "--install-completion" in done.stdout
    assert command(name, "--version").stdout.startswith("moe-envs ")


def test_damaged_runs_are_refused(run: Path, tmp_path: Path) -> None:
    import shutil

    copy = Path(shutil.copytree(run, tmp_path / "copy"))
    weights = copy / "policy.safetensors"
    raw = bytearray(weights.read_bytes())
    raw[-1] ^= 1
    weights.write_bytes(raw)
    with pytest.raises(runs.RunError, match=r"policy.safetensors is damaged"):
        runs.load(copy)
    weights.unlink()
    with pytest.raises(runs.RunError, match="cannot be read"):
        runs.load(copy)
    (copy / "run.json").write_text("{}")
    with pytest.raises(runs.RunError, match="damaged or foreign"):
        runs.load(copy)
    save_json(copy / "run.json", {"format": 7})
    with pytest.raises(runs.RunError, match="format 7"):
        runs.load(copy)


def test_a_run_of_before_is_read_with_a_warning(run: Path, tmp_path: Path) -> None:
    import shutil

    copy = Path(shutil.copytree(run, tmp_path / "copy"))
    config = load_json(copy / "run.json", ValueError, "")
    config |= {"format": 1, "sha256": config.pop("weights_sha256")}
    config.pop("episodes_sha256")
    (copy / "run.json").write_text(json.dumps(config))
    with pytest.warns(UserWarning, match="is of format 1, which has no hash"):
        policy, read = runs.load(copy)
    assert hasattr(policy, "predict")
    assert read["env_kwargs"] == {"bundle": "digits", "cost_weight": 0.3}


def test_bundles_are_listed_and_checked() -> None:
    assert "fashion-mnist" in command("bundle", "list").stdout
    assert "whole" in command("bundle", "check", "digits").stdout


def test_a_foreign_agents_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    import agents

    monkeypatch.delattr(agents, "DISTRIBUTION")
    with pytest.raises(ValueError, match="openai-agents"):
        main._require_our_agents()


def test_env_kwargs_are_json_or_text() -> None:
    expected: dict[str, Any] = {"a": 1, "b": 0.5, "c": "text", "d": True, "e": "x=y"}
    assert terminal.pairs(["a=1", "b=0.5", "c=text", "d=true", "e=x=y"], "-k") == expected
