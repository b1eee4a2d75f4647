"""The commands about compression, on the digits and with few steps."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from agents import PPO
from agents.baselines import compression as rules
from agents.evaluate import evaluate
from benchmarks.cli.compress import app
from benchmarks.experiments import experts, methods, tau
from experts import data, reference_models
from experts.compression.pieces import pieces
from experts.compression.plan import Plan, load_compressed

ID, MODEL = "moe_envs:MoECompression-v0", "digits-mlp"
runner = CliRunner()


def bench() -> methods.MethodBench:
    return methods.MethodBench(reference_models.load(MODEL), MODEL, steps=3)


def accuracy(model: Any) -> float:
    inputs, labels = (torch.from_numpy(each) for each in data.load("digits")["test"])
    with torch.no_grad():
        return float((model(inputs).argmax(1) == labels).float().mean())


def row(method: str) -> dict[str, Any]:
    setup = methods.MethodSetup(method=method, model=MODEL, steps=3, evaluations=3)
    return methods.measure(setup, 0, "all", Path())[0] | {"method": method, "model": MODEL}


def test_rows_say_what_the_files_have(tmp_path: Path) -> None:
    rows = [row(method) for method in ("float32", "int8", "int4", "half the experts' neurons")]
    assert rows[0]["accuracy"] == pytest.approx(accuracy(reference_models.load(MODEL)))
    assert rows[1]["bytes"] == Plan.of(reference_models.load(MODEL), 1).bytes < rows[0]["bytes"] / 3
    assert [each["applies"] for each in rows] == [True, True, True, False]
    frame = pd.DataFrame(rows)
    result = methods.score(frame)
    (shown,) = result["tables"].values()
    assert [each["bytes"] for each in shown] == sorted(each["bytes"] for each in rows)
    assert methods.plot(frame, result, tmp_path) == ["pareto.png"]
    plans = {path.stem: Plan.load(path).bytes for path in (tmp_path / "plans").iterdir()}
    assert plans == {each["method"]: each["bytes"] for each in rows[:3]}
    assert np.asarray(Image.open(tmp_path / "pareto.png")).std() > 10


def test_the_smallest_near_the_best_is_chosen() -> None:
    values = ((0.920, 700), (0.916, 500), (0.912, 300), (0.908, 200), (0.95, 2**21))
    rows = [{"method": f"of {size}", "model": MODEL, "validation": v, "accuracy": v, "bytes": size, "applies": True,
             "trained": False, "time_us": 1.0} for v, size in values]  # fmt: skip
    assert methods.score(pd.DataFrame(rows))["best"] == "of 500"
    assert methods.score(pd.DataFrame(rows[-1:]))["best"] is None


def test_a_plan_is_applied_to_a_checkpoint(tmp_path: Path) -> None:
    plan, checkpoint, out = (tmp_path / name for name in ("plan.json", "model.safetensors", "small.safetensors"))
    Plan.of(reference_models.load(MODEL), 3).save(plan)
    assert runner.invoke(app, ["export", "--model", MODEL, "--out", str(checkpoint)]).exit_code == 0
    for more, trained in ([], False), (["--steps", "2"], True):
        done = runner.invoke(app, ["apply", str(plan), str(checkpoint), "--out", str(out), "--json", "-", *more])
        assert done.exit_code == 0, done.output
        rows = json.loads(done.stdout)["rows"]
        assert [row["method"] for row in rows] == ["float32", "plan"]
        assert rows[1]["bytes"] == out.stat().st_size == Plan.load(plan).bytes
        assert rows[1]["finetuned"] is trained
        assert accuracy(load_compressed(out, reference_models.load(MODEL))) == pytest.approx(rows[1]["accuracy"])
    before = out.read_bytes()
    done = runner.invoke(app, ["apply", str(plan), str(checkpoint), "--out", str(out), "--limit", "9"])
    assert "more than the limit of 9" in str(done.exception)
    done = runner.invoke(app, ["apply", str(plan), str(checkpoint), "--out", str(checkpoint)])
    assert "would replace what is read" in str(done.exception)
    checkpoint.write_bytes(b"x" * 200)
    done = runner.invoke(app, ["apply", str(plan), str(checkpoint), "--out", str(out)])
    assert isinstance(done.exception, data.DataError)
    assert out.read_bytes() == before


def test_a_plan_of_another_shape_is_not_applied(tmp_path: Path) -> None:
    plan, checkpoint, out = (tmp_path / name for name in ("plan.json", "model.safetensors", "small.safetensors"))
    methods.structured(bench()).plan.save(plan)
    reference_models.save(reference_models.load(MODEL), MODEL, checkpoint)
    done = runner.invoke(app, ["apply", str(plan), str(checkpoint), "--out", str(out)])
    assert "of another model" in str(done.exception)
    assert not out.exists()


def test_one_threshold_over_all_matrices() -> None:
    model = reference_models.load(MODEL)
    levels = methods.magnitude_plan(model, 0.5)
    for name, piece in pieces(model).items():
        piece.write(piece.read() * (100 if name == "gate" else 0.001 if name == "experts.0.in" else 1))
    moved = methods.magnitude_plan(model, 0.5)
    assert set(levels.values()) <= {1, 2, 6, 10}
    assert (moved["gate"], moved["experts.0.in"]) == (1, 10)


def test_half_the_neurons_are_gone() -> None:
    made = methods.structured(bench())
    assert made.model.experts.widths == (32,) * 8  # type: ignore[union-attr]
    assert accuracy(made.model) > 0.95


def test_a_policy_s_plan_fits_its_budget(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"n_envs": 2, "n_steps": 18, "batch_size": 36}
    PPO("MlpPolicy", "moe_envs:MoECompression-v0", env_kwargs={"model": [MODEL]}, **settings).save(tmp_path / "ppo")
    plan = tmp_path / "plan.json"
    arguments = ["plan", str(tmp_path / "ppo"), "--model", MODEL, "--budget", "20000", "--out", str(plan)]
    assert runner.invoke(app, arguments).exit_code == 0
    assert Plan.load(plan).bytes <= 20_000


def test_small_weights_are_cut_by_tau() -> None:
    taus = (0.0, 0.1, 0.2, 0.3)
    rows = [tau.measure(tau.TauSetup(model=MODEL, tau=each), 0, "all", Path())[0] | {"tau": each} for each in taus]
    model = reference_models.load(MODEL)
    weights = [piece.read() for piece in pieces(model).values()]
    assert rows[0]["kept"] == 1
    assert rows[0]["accuracy"] == pytest.approx(accuracy(model))
    total = sum(each.size for each in weights)
    for row in rows[1:]:
        kept = [int((np.abs(each) >= row["tau"] * np.abs(each).max()).sum()) for each in weights]
        assert row["kept"] == sum(kept) / total
        stored = sum(min(4 * each.size, -(-each.size // 8) + 4 * n) for each, n in zip(weights, kept, strict=True))
        biases = sum(parameter.numel() for parameter in model.parameters()) - total
        assert row["bytes"] == stored + 4 * biases
    assert [row["accuracy"] for row in rows] == sorted((row["accuracy"] for row in rows), reverse=True)


def test_cores_and_ranks_at_equal_parameters(tmp_path: Path) -> None:
    rows = {}
    for kind in ("independent", "upcycled"):
        setup = experts.ExpertsSetup(kind=kind, rank=4, model=MODEL, steps=100)
        found = experts.measure(setup, 0, "all", tmp_path)[0]["rows"]
        rows |= {(kind, each["way"]): each for each in found}
        core, low, mean = (rows[kind, way] for way in ("core", "SVD", "mean"))
        assert 0.9 * core["parameters"] < low["parameters"] <= core["parameters"]
        assert core["error"] < mean["error"]
    assert rows["upcycled", "mean"]["error"] < rows["independent", "mean"]["error"]


def test_nothing_is_ahead_of_the_best_of_all_plans() -> None:
    kwargs: dict[str, Any] = {"model": MODEL, "granularity": "layer", "budget": 20_000, "split": "train"}
    policies = rules.baselines(ID, evaluations=20, **kwargs)
    best = rules.bound(ID, **kwargs)
    assert best is not None
    returns = {name: evaluate(policy, ID, 2, **kwargs)["return"].mean() for name, policy in policies.items()}
    assert set(returns) == set(rules.RULES)
    top = evaluate(best, ID, 2, **kwargs)["return"].mean()
    assert all(value <= top + 1e-9 for value in returns.values())
    assert returns["uniform"] < top - 0.5
    assert rules.bound(ID, model="digits-mlp") is None  # too many plans
