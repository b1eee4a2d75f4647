"""The command moe-export."""

import json
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from agents import runs
from agents.baselines import serving as rules
from benchmarks.cli.export import app
from benchmarks.programs import controller
from experts.serving.control import Choices, MakeController, RequestClass, Service, default, recommended, rule_of
from experts.serving.export import load_exported

pytest.importorskip("onnxruntime")
runner = CliRunner()
SERVICE = Service(("onnx",), (1, 64), np.array([[0.001, 0.01]]), np.ones(1), np.zeros((1, 2)))
CLASSES, OTHERS = (RequestClass(deadline=0.2),), (RequestClass(deadline=0.3),)


def test_a_bundle_and_its_manifest(tmp_path: Path) -> None:
    words = ["digits", "--out", str(tmp_path / "out"), "--model-version", "2.0.0", "--json", str(tmp_path / "m.json")]
    done = runner.invoke(app, words)
    assert done.exit_code == 0, done.output
    assert "100.00% as PyTorch's" in done.output.replace("\n", " ")
    assert json.loads((tmp_path / "m.json").read_text())["version"] == "2.0.0"
    assert load_exported(tmp_path / "out").manifest["source"]["name"] == "digits"


def test_a_policy_routes_its_bundle(tmp_path: Path) -> None:
    settings = {"n_envs": 2, "n_steps": 8, "batch_size": 16, "total_timesteps": 16, "policy_kwargs": {"net_arch": [8]}}
    kwargs = {"bundle": "digits", "batch_size": 8}
    runs.train("moe_envs:MoERouting-v0", "ppo", 0, tmp_path / "run", kwargs, settings)
    done = runner.invoke(app, [str(tmp_path / "run"), "--out", str(tmp_path / "out")])
    assert done.exit_code == 0, done.output
    exported = load_exported(tmp_path / "out")
    assert exported.manifest["input"]["shape"] == [8, 64]
    assert exported.run(np.zeros((8, 64), dtype=np.float32)).shape == (8, 10)


def test_the_rule_of_its_server_is_tuned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rules, "TUNED", 2)
    monkeypatch.setattr(controller, "EPISODE", 0.1)
    monkeypatch.setattr(controller, "SECONDS", 0.3)
    out = tmp_path / "out"
    done = runner.invoke(app, ["digits", "--out", str(out), "--measured", "--deadline", "0.2", "--tries", "1"])
    assert done.exit_code == 0, done.output
    found = load_exported(out).manifest
    assert found["recommended"]["single"]["batch"] == 1
    tuned = found["controller"]
    assert tuned["http_s"] > 0
    assert tuned["controller"] in done.output.replace("\n", "")
    assert tuned["test"] == pytest.approx(tuned["slackfit_test"], abs=0.2)

    def decides(make: MakeController, classes: tuple[RequestClass]) -> type:
        return type(make(Choices(1, 1), SERVICE, classes))

    assert decides(recommended(found, CLASSES), CLASSES) is decides(rule_of(tuned["controller"]), CLASSES)
    assert decides(recommended(found, OTHERS), OTHERS) is decides(default, OTHERS)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["nothing"], "no model 'nothing'; there are digits, fashion-mnist"),
        (["digits", "--format", "x"], "format='x' is not one of onnx"),
        (["digits", "--format", "huggingface"], "for language models"),
        (["digits", "--model-version", "new"], "is not a semantic version"),
    ],
)
def test_wrong_words_are_told(words: list[str], message: str, tmp_path: Path) -> None:
    done = runner.invoke(app, [*words, "--out", str(tmp_path / "out")])
    assert done.exit_code == 1
    assert message in str(done.exception)
