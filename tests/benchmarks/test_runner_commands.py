"""The subcommands run, report and validate, as a person calls them."""

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from benchmarks.cli.benchmark import app
from benchmarks.runner import runner
from benchmarks.runner.experiments import RunnerError
from benchmarks.runner.matrix import Matrix
from benchmarks.runner.rows import Row, read

pytestmark = pytest.mark.usefixtures("tiny")


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "matrix.yaml"
    path.write_text(json.dumps({"experiment": "small.tiny", "seeds": [1, 2]}))
    return path


def call(*arguments: object) -> Any:
    trust = () if arguments[0] == "validate" else ("--trust", "small.tiny")
    return CliRunner().invoke(app, [*map(str, arguments), *trust], terminal_width=200)


def test_the_command_makes_a_matrix_in_parts(tmp_path: Path, file: Path) -> None:
    out = tmp_path / "out"
    said = call("run", file, "--out", out, "--dry-run").output
    assert "8 of 8 runs to do" in said
    assert not out.exists()
    for part in range(3):
        assert (
            "when all parts are through: moe-benchmark report"
            in call("run", file, "--out", out, "--part", f"{part}/3").output
        )
    assert "0 of 8 runs to do" in call("run", file, "--out", out, "--dry-run").output
    assert call("report", out).exit_code == 0
    assert (out / "report.md").read_text().startswith("mean 3")
    assert "nothing to do" in call("run", file, "--out", out).output
    assert isinstance(call("run", file, "--out", out, "--part", "3/3").exception, ValueError)


def test_a_slurm_script_is_of_the_whole_matrix(tmp_path: Path, file: Path) -> None:
    script = tmp_path / "job.sh"
    assert call("run", file, "--out", tmp_path / "out", "--slurm", script, "--jobs", 4).exit_code == 0
    assert "--array=0-3" in script.read_text()
    assert (tmp_path / "out" / "matrix.json").exists()
    before = (tmp_path / "out" / "matrix.json").read_bytes()
    other = tmp_path / "other.json"
    for content, message in (({"experiment": "models"}, "is a folder of small.tiny"),
                             ({"experiment": "small.tiny", "splits": ["none"]}, "no split 'none'")):  # fmt: skip
        other.write_text(json.dumps(content))
        refused = call("run", other, "--out", tmp_path / "out", "--slurm", script)
        assert message in str(refused.exception)
        assert (tmp_path / "out" / "matrix.json").read_bytes() == before
    for more in (("--only", "one"), ("--part", "1/2"), ("--dry-run",)):
        refused = call("run", file, "--out", tmp_path / "out", "--slurm", script, *more)
        assert "--slurm writes a script of the whole matrix" in str(refused.exception)


def test_what_did_not_fail_is_reported(tmp_path: Path, file: Path) -> None:
    setups = {"fails": {"factor": 77, "fails": 99}} | {f"well {number}": {"factor": number} for number in range(20)}
    file.write_text(json.dumps({"experiment": "small.tiny", "seeds": [1], "splits": ["test"], "setups": setups}))
    assert isinstance(call("run", file, "--out", tmp_path / "out", "--jobs", 2).exception, RunnerError)
    assert "20 of 21 runs" in (tmp_path / "out" / "report.md").read_text()


def test_validate_ends_with_1_where_a_metric_differs(tmp_path: Path) -> None:
    runner.run(Matrix(experiment="small.tiny"), tmp_path)
    path = tmp_path / "raw.jsonl"
    assert call("validate", path, "--trust", "small.tiny").exit_code == 0
    content = read(path)[0].model_dump(exclude={"format", "sha256"})
    path.write_bytes(Row.made(**content | {"metrics": {"value": 9, "of": "test"}, "commit": "x"}).line)
    said = call("validate", path, "--trust", "small.tiny")
    assert said.exit_code == 1
    assert "made with another commit" in said.output
