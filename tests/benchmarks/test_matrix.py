"""Matrices: what is wrong in one is told before anything runs."""

import importlib
from pathlib import Path

import pytest

from benchmarks.runner.experiments import RunnerError
from benchmarks.runner.matrix import Matrix, jobs_of, load_matrix


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("experiment: models\nseed: [1]", "seed: Extra inputs"),
        ("experiment: [", "neither YAML nor JSON"),
        ("- 1", "Input should be a valid dictionary"),
        ("experiment: models\nseeds: []", "seeds: List should have at least 1"),
        (
            "experiment: nothing",
            "no experiment 'nothing'; there are autorate, autoscaling, continual, continual-headroom, cooperation",
        ),
        ("experiment: no.such", "No module named 'no'"),
        ("experiment: benchmarks.results.pareto", "it has no Setup, SETTINGS"),
        ("experiment: models\nseeds: [-1]", "seeds.0: Input should be greater"),
        ("experiment: models\nsetups: {a: {k: 1}, a: {k: 2}}", "'a' is named twice"),
        ("experiment: models\nsplits: [shift-3]", "splits must have test"),
        ("experiment: models\nsetups: {a: {}, b: {data: digits}}", "setups of different data, digits, fashion-mnist"),
        ("experiment: models\nsplits: [train]", "no split 'train' in models; there are test, gaussian-noise-1"),
        ("experiment: models\nseeds: [1, 1]", "1 is named twice"),
        ("experiment: models\nsetups: {mine: {kind: top-9}}", "setup 'mine': kind: Input should be 'top-k'"),
        ("experiment: models\nsettings: {colour: red}", "colour: Extra inputs"),
        ("experiment: models\nsetups: {a: {kind: compressed, level: int5}}", "no level 'int5'; there are float32"),
    ],
)
def test_a_wrong_matrix_is_told_before_anything_runs(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "matrix.yaml"
    path.write_text(content)
    with pytest.raises(RunnerError, match=message):
        jobs_of(load_matrix(path))


def test_the_example_is_a_matrix() -> None:
    example = load_matrix(Path(__file__).parents[2] / "docs" / "examples" / "models.yaml")
    assert len(jobs_of(example)) == 4 * 3 * 8


def test_an_import_that_fails_in_an_own_experiment_is_named(tiny: Path) -> None:
    (tiny / "other").mkdir()
    (tiny / "other" / "broken.py").write_text("import no_such_module\n")
    importlib.invalidate_caches()
    with pytest.raises(RunnerError, match="experiment 'other.broken': No module named 'no_such_module'"):
        jobs_of(Matrix(experiment="other.broken"))
