"""The commands about compression, on the digits and with few steps."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from benchmarks.cli.benchmark import benchmark_app
from benchmarks.cli.compress import compress_app
from benchmarks.experiments import boundary_pruning, compression, compression_methods, shared_core
from experts import data, reference_models
from experts.compression.pieces import pieces
from experts.compression.plan import Plan, load_compressed

MODEL = "digits-mlp"
runner = CliRunner()


def bench() -> compression_methods.Bench:
    return compression_methods.Bench(reference_models.load(MODEL), MODEL, steps=3, evaluations=3)


def accuracy(model: Any) -> float:
    inputs, labels = (torch.from_numpy(each) for each in data.load("digits")["test"])
    with torch.no_grad():
        return float((model(inputs).argmax(1) == labels).float().mean())


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    out = tmp_path_factory.mktemp("run")
    arguments = ["run", "--model", MODEL, "--out", str(out), "--steps", "3", "--evaluations", "3", "--json"]
    done = runner.invoke(compress_app, arguments)
    assert done.exit_code == 0, done.output
    return out, json.loads(done.stdout)["rows"]


def test_rows_say_what_the_files_have(result: tuple[Path, list[dict[str, Any]]]) -> None:
    out, rows = result
    assert rows[0]["method"] == "float32"
    assert rows[0]["accuracy"] == pytest.approx(accuracy(reference_models.load(MODEL)))
    assert set(rows[0]) == {"method", "bytes", "accuracy", "time_s", "finetuned"}
    content = json.loads((out / "results.json").read_text())
    best = next(row for row in rows if row["method"] == content["best"])
    assert (out / "best.safetensors").stat().st_size == best["bytes"] < rows[0]["bytes"] / 4
    plans = {path.stem: Plan.load(path).bytes for path in (out / "plans").iterdir()}
    restored = load_compressed(out / "best.safetensors", reference_models.load(MODEL))
    assert accuracy(restored) == pytest.approx(best["accuracy"])
    assert Plan.load(out / "best.plan.json").bytes == best["bytes"]
    others = {"half the experts' neurons", "half pruned, then low rank", "low rank, then half pruned"}
    assert len(plans) == len(rows) - len(others | {"int8, activations too"})
    assert plans["int8"] == next(row["bytes"] for row in rows if row["method"] == "int8")
    for name in ("pareto.png", "heatmap.png"):
        assert np.asarray(Image.open(out / name)).std() > 10
    assert all(row["method"] in (out / "report.md").read_text() for row in rows)


def test_a_limit_that_nothing_fits_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compression_methods, "methods", lambda bench: {"float32": lambda: bench.compress(0)})
    (tmp_path / "best.safetensors").write_bytes(b"of an earlier run")
    arguments = ["run", "--model", MODEL, "--out", str(tmp_path), "--limit", "1000"]
    done = runner.invoke(compress_app, arguments)
    assert isinstance(done.exception, ValueError)
    assert "under 1,000 bytes" in str(done.exception)
    assert not (tmp_path / "best.safetensors").exists()


def test_a_plan_is_applied_to_a_checkpoint(tmp_path: Path) -> None:
    plan, checkpoint, out = (tmp_path / name for name in ("plan.json", "model.safetensors", "small.safetensors"))
    Plan.of(reference_models.load(MODEL), 3).save(plan)
    assert runner.invoke(compress_app, ["export", "--model", MODEL, "--out", str(checkpoint)]).exit_code == 0
    for more, trained in ([], False), (["--steps", "2"], True):
        done = runner.invoke(compress_app, ["apply", str(plan), str(checkpoint), "--out", str(out), "--json", *more])
        assert done.exit_code == 0, done.output
        rows = json.loads(done.stdout)["rows"]
        assert [row["method"] for row in rows] == ["float32", "plan"]
        assert rows[1]["bytes"] == out.stat().st_size == Plan.load(plan).bytes
        assert rows[1]["finetuned"] is trained
        assert accuracy(load_compressed(out, reference_models.load(MODEL))) == pytest.approx(rows[1]["accuracy"])
    before = out.read_bytes()
    done = runner.invoke(compress_app, ["apply", str(plan), str(checkpoint), "--out", str(out), "--limit", "9"])
    assert "more than the limit of 9" in str(done.exception)
    done = runner.invoke(compress_app, ["apply", str(plan), str(checkpoint), "--out", str(checkpoint)])
    assert "would replace what is read" in str(done.exception)
    checkpoint.write_bytes(b"x" * 200)
    done = runner.invoke(compress_app, ["apply", str(plan), str(checkpoint), "--out", str(out)])
    assert isinstance(done.exception, data.DataError)
    assert out.read_bytes() == before


def test_the_smallest_near_the_best_is_chosen() -> None:
    rows = [{"validation": v, "bytes": b} for v, b in ((0.920, 700), (0.916, 500), (0.912, 300), (0.908, 200))]
    made = bench().compress(0)
    found = compression_methods.smallest([(row, made) for row in rows])
    assert found is not None
    assert found[0]["bytes"] == 500
    assert compression_methods.smallest([]) is None


def test_a_plan_of_another_shape_is_not_applied(tmp_path: Path) -> None:
    plan, checkpoint, out = (tmp_path / name for name in ("plan.json", "model.safetensors", "small.safetensors"))
    compression_methods.structured(bench()).plan.save(plan)
    reference_models.save(reference_models.load(MODEL), MODEL, checkpoint)
    done = runner.invoke(compress_app, ["apply", str(plan), str(checkpoint), "--out", str(out)])
    assert "of another model" in str(done.exception)
    assert not out.exists()


def test_one_threshold_over_all_matrices() -> None:
    model = reference_models.load(MODEL)
    levels = compression_methods.magnitude_plan(model, 0.5)
    for name, piece in pieces(model).items():
        piece.write(piece.read() * (100 if name == "gate" else 0.001 if name == "experts.0.in" else 1))
    moved = compression_methods.magnitude_plan(model, 0.5)
    assert set(levels.values()) <= {1, 2, 6, 10}
    assert (moved["gate"], moved["experts.0.in"]) == (1, 10)


def test_half_the_neurons_are_gone() -> None:
    made = compression_methods.structured(bench())
    assert made.model.experts.widths == (32,) * 8  # type: ignore[union-attr]
    assert accuracy(made.model) > 0.95


def test_a_learned_policy_beside_searches(tmp_path: Path) -> None:
    arguments = ["--model", MODEL, "--held-out", f"{MODEL}-1", "--seeds", "2", "--timesteps", "400"]
    arguments += ["--evaluations", "3", "--jobs", "1", "--out", str(tmp_path), "--ablations", "1", "--searches", "2"]
    done = runner.invoke(benchmark_app, ["compression", *arguments])
    assert done.exit_code == 0, done.output
    content = json.loads((tmp_path / "results.json").read_text())
    rows = {(row["kind"], row["budget"], row["policy"]): row for row in content["rows"]}
    budgets = compression.budgets_of(MODEL)
    assert {key[2] for key in rows} == {*compression.VARIANTS, "PPO, best of 3", *compression.BASELINES}
    assert {key[:2] for key in rows} == {(kind, budget) for kind in ("known", "held out") for budget in budgets}
    assert rows["known", budgets[0], "greedy"]["points"] > rows["known", budgets[0], "uniform"]["points"]
    plan = tmp_path / "plan.json"
    arguments = [str(tmp_path / "policies" / "ppo-0"), "--model", MODEL, "--budget", "20000", "--out", str(plan)]
    assert runner.invoke(compress_app, ["plan", *arguments]).exit_code == 0
    assert Plan.load(plan).bytes <= 20_000


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", MODEL, "--held-out", f"{MODEL}-0"], "named twice"),
        (["--model", MODEL, "--held-out", "fashion-mnist-conv-3"], "several recipes"),
    ],
)
def test_what_is_held_out_is_another_model_of_the_recipe(arguments: list[str], message: str) -> None:
    done = runner.invoke(benchmark_app, ["compression", *arguments])
    assert message in str(done.exception)


def test_small_weights_are_cut_by_tau() -> None:
    done = runner.invoke(compress_app, ["tau", "--model", MODEL])
    assert done.exit_code == 0, done.output
    rows = boundary_pruning.run([MODEL], lambda share: None)["rows"]
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


def test_cores_and_ranks_at_equal_parameters(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = reference_models.RECIPES[MODEL]
    monkeypatch.setitem(reference_models.RECIPES, MODEL, dataclasses.replace(recipe, epochs=8))
    monkeypatch.setattr(shared_core, "RANKS", (4,))
    file = tmp_path / "result.json"
    arguments = ["experts", "--model", MODEL, "--jobs", "1", "--out", str(tmp_path), "--json", str(file)]
    assert runner.invoke(compress_app, arguments).exit_code == 0
    rows = {(row["experts"], row["way"]): row for row in json.loads(file.read_text())["rows"]}
    for kind in ("independent", "upcycled"):
        core, low, mean = (rows[kind, way] for way in ("core", "SVD", "mean"))
        assert 0.9 * core["parameters"] < low["parameters"] <= core["parameters"]
        assert core["error"] < mean["error"]
    assert rows["upcycled", "mean"]["error"] < rows["independent", "mean"]["error"]
    again = shared_core.run(MODEL, tmp_path, 1, lambda share: None)  # all of it from files
    assert again["rows"] == list(rows.values())
    other = shared_core.run(f"{MODEL}-1", tmp_path, 1, lambda share: None)  # and none of them of another model
    assert {(row["experts"], row["way"]): row["error"] for row in other["rows"]}["independent", "core"] < 0.9


@pytest.mark.needs_data
def test_nothing_is_ahead_of_the_best_of_all_plans(tmp_path: Path) -> None:
    arguments = ["bound", "--seeds", "2", "--timesteps", "2000", "--evaluations", "20", "--out", str(tmp_path)]
    done = runner.invoke(compress_app, arguments)
    assert done.exit_code == 0, done.output
    content = json.loads((tmp_path / "results.json").read_text())
    rows = content["rows"]
    assert content["plans"] == 14 * 10 * 14 * 11
    assert len({row["budget"] for row in rows}) == 6
    assert all(row["most"] >= row["behind"] > -1e-9 for row in rows)
    assert all(row["behind"] == 0 for row in rows if row["policy"] == "best of all")
    assert any(row["behind"] > 1 for row in rows if row["policy"] == "uniform")
    refused = runner.invoke(compress_app, ["bound", "--model", "fashion-mnist-conv", "--out", str(tmp_path)])
    assert "2,140,320 plans" in str(refused.exception)
