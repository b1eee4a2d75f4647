"""The comparison of graphs, routers and regularisers, on the digits and with few steps."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from benchmarks.cli.benchmark import benchmark_app
from benchmarks.experiments import cooperation
from benchmarks.results.statistics import seeds_interval
from benchmarks.speed import layer as moe_layer
from experts import data
from experts.checkpoints import load_model
from experts.network import MoENetwork

NAMES = ["flat, k=2, no graph", "flat, k=2, random", "switch", "drift stabiliser"]
runner = CliRunner()


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cooperation")
    only = [argument for name in NAMES for argument in ("--only", name)]
    arguments = ["cooperation", "--seeds", "2", "--epochs", "2", "--jobs", "1", *only, "--out", str(folder)]
    done = runner.invoke(benchmark_app, arguments)
    assert done.exit_code == 0, done.output
    return folder


def test_rows_are_what_the_networks_do(out: Path) -> None:
    content = json.loads((out / "results.json").read_text())
    rows = {row["name"]: row for row in content["rows"]}
    assert list(rows) == NAMES
    inputs, labels = data.load("digits")["test"]
    right = []
    for seed in (0, 1):
        network = load_model(out / "networks" / f"switch-{seed}.safetensors", MoENetwork)
        with torch.inference_mode():
            right.append(float((network(torch.from_numpy(inputs))[0].argmax(1).numpy() == labels).mean()))
    assert rows["switch"]["accuracy"] == pytest.approx(np.mean(right))
    assert rows["switch"]["experts_per_input"] <= 1
    assert rows["switch"]["points"] < -1  # one expert for each input, after two epochs
    assert len(rows["flat, k=2, random"]["sparsity"]) == len(rows["flat, k=2, random"]["utilisation"]) == 2
    assert rows["flat, k=2, no graph"]["sparsity"] == []
    assert content["best"]["name"] in NAMES
    load_model(out / "best.safetensors", MoENetwork)


def test_the_report_has_all_rows_and_pictures(out: Path) -> None:
    report = (out / "report.md").read_text()
    assert all(name in report for name in NAMES)
    for name in ("accuracy", "edges", "routing", "landscape", "confidence"):
        assert f"({name}.png)" in report
        assert np.asarray(Image.open(out / f"{name}.png")).std() > 10
    assert (out / "runs.csv").read_text().count("\n") == 1 + 2 * len(NAMES)


def test_trainings_that_are_there_are_not_run_again(out: Path) -> None:
    record = out / "networks" / "switch-0.json"
    before = record.stat().st_mtime_ns
    path = record.with_suffix(".safetensors")
    assert cooperation.train_one("digits", "switch", 0, 2, path)["name"] == "switch"
    assert record.stat().st_mtime_ns == before
    with pytest.raises(ValueError, match="of another training"):
        cooperation.train_one("digits", "switch", 0, 3, path)


def test_unknown_names_are_refused() -> None:
    done = runner.invoke(benchmark_app, ["cooperation", "--only", "nothing"])
    assert "there are flat, k=1, no graph" in str(done.exception)


def test_an_interval_over_seeds_by_hand() -> None:
    low, high = seeds_interval(np.array([1.0, 2.0, 3.0]))  # t(.975, 2) = 4.3027
    assert (low, high) == (pytest.approx(2 - 4.3027 / 3**0.5, abs=1e-3), pytest.approx(2 + 4.3027 / 3**0.5, abs=1e-3))
    assert np.isnan(seeds_interval(np.array([1.0]))).all()


def test_layers_are_timed_beside_hugging_face_and_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("transformers", reason="pip install moe-envs[hf]")
    monkeypatch.setattr(moe_layer, "TOKENS", {3: (1, 1)})
    done = runner.invoke(benchmark_app, ["layer"])
    assert done.exit_code == 0, done.output
    assert "block / ours" in done.output
    (row,) = moe_layer.measure()["rows"]
    assert row["difference"] < 1e-4
    assert row["backward_ratio"] == pytest.approx(row["block_backward_ms"] / row["ours_backward_ms"])
