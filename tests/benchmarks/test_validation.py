"""Submitted rows: the same are the same, others are named, foreign ones refused."""

import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks.runner import runner
from benchmarks.runner.experiments import RunnerError
from benchmarks.runner.matrix import Matrix
from benchmarks.runner.rows import Row, read
from benchmarks.runner.validate import validate

pytestmark = pytest.mark.usefixtures("tiny")


def other(row: Row, **more: Any) -> bytes:
    """A row with other content under its own seals."""
    changed = row.model_copy(update=more)
    return Row.made(**changed.model_dump(exclude={"format", "sha256", "config_hash"}), config_hash=changed.job.key).line


def test_a_submitted_file_is_run_again(tmp_path: Path) -> None:
    runner.run(Matrix(experiment="small.tiny", seeds=[1, 2]), tmp_path)
    path = tmp_path / "raw.jsonl"
    imported = sys.modules.pop("small.tiny")
    with pytest.raises(RunnerError, match="names 'small.tiny': importing 'small.tiny' would run its code"):
        validate(path, 8, 0, 1e-6)
    sys.modules["small.tiny"] = imported
    assert [each["differing"] for each in validate(path, 8, 0, 1e-6, trust=["small.tiny"])] == [[]] * 8
    rows = read(path)
    path.write_text(path.read_text().replace('"value": 6', '"value": 6.1'))
    with pytest.raises(RunnerError, match="it was altered"):
        validate(path, 8, 0, 1e-6)
    values = [6.1 if row.metrics["value"] == 6 else row.metrics["value"] for row in rows]
    lines = [other(row, metrics=row.metrics | {"value": value}) for row, value in zip(rows, values, strict=True)]
    path.write_bytes(b"".join(lines))
    found = [each for each in validate(path, 8, 0, 1e-6, trust=["small.tiny"]) if each["differing"]]
    assert [(each["setup"], each["seed"]) for each in found] == [("three", 2)] * 2
    assert found[0]["differing"] == [{"metric": "value", "submitted": 6.1, "here": 6}]
    assert not any(each["differing"] for each in validate(path, 8, 0, 0.1, trust=["small.tiny"]))


def test_a_row_that_the_experiment_cannot_have_made_is_told(tmp_path: Path) -> None:
    with pytest.raises(RunnerError, match="is not there"):
        validate(tmp_path / "raw.jsonl", 1, 0, 1e-6, trust=["small.tiny"])
    runner.run(Matrix(experiment="small.tiny", seeds=[1, 2]), tmp_path)
    row = read(tmp_path / "raw.jsonl")[0]
    for more, message in (({"split": "none"}, "no split 'none'"), ({"arguments": {"colour": 1}}, "colour: Extra inpu")):
        path = tmp_path / "other.jsonl"
        path.write_bytes(other(row, **more))
        with pytest.raises(RunnerError, match=f"a row of setup 'one' is none of small.tiny: {message}"):
            validate(path, 1, 0, 1e-6, trust=["small.tiny"])
