"""The command moe-export."""

import json
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from agents import runs
from benchmarks.cli.export import app
from experts.serving.control import RequestClass
from experts.serving.export import ExportError, add_tuned_rule, load_exported
from experts.serving.rules import Fixed, SlackFit, tuned_rule_of
from experts.serving.server import Limits, Server

pytest.importorskip("onnxruntime")
runner = CliRunner()


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


def test_the_rule_of_its_server_is_tuned(tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = runner.invoke(app, ["digits", "--out", str(out), "--measured", "--deadline", "0.02", "--tries", "1"])
    assert done.exit_code == 0, done.output
    found = load_exported(out).manifest
    assert found["recommended"]["single"]["batch"] == 1
    tuned = found["tuned_rule"]
    assert tuned["rule"] in done.output.replace("\n", "")
    assert (tuned["deadline"], tuned["seconds"]) == (0.02, 0.08)
    assert -2 < tuned["test_return"] < 0
    limits = Limits(classes=(RequestClass(deadline=0.02),))
    assert Server(out, limits=limits).rule == f"{tuned['rule']} (tuned at the export)"


def test_a_tuned_rule_decides_where_it_was_tuned_for(tmp_path: Path) -> None:
    assert runner.invoke(app, ["digits", "--out", str(tmp_path)]).exit_code == 0
    files = load_exported(tmp_path).manifest["files"]
    add_tuned_rule(tmp_path, files, {"rule": "fixed:cap=8", "deadline": 0.2})
    with pytest.raises(ExportError, match="exported again"):
        add_tuned_rule(tmp_path, files | {"model.onnx": "0"}, {"rule": "slackfit", "deadline": 0.2})
    controller = Server(tmp_path, limits=Limits(classes=(RequestClass(deadline=0.2),))).controller
    assert isinstance(controller, Fixed)
    assert controller.cap == 8
    for others in ((RequestClass(deadline=0.3),), (RequestClass(deadline=0.2, size=4),)):
        assert isinstance(Server(tmp_path, limits=Limits(classes=others)).controller, SlackFit)
    elsewhere = json.loads((tmp_path / "manifest.json").read_text()) | {"fingerprint": {"cpu": "another"}}
    assert tuned_rule_of(elsewhere, (RequestClass(deadline=0.2),)) is None


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
