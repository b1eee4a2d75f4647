"""Reports of what a training costs."""

import json
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from typer.testing import CliRunner

from benchmarks.cli.profile import app
from benchmarks.experiments import monitor
from benchmarks.experiments.monitor import report
from benchmarks.results.statistics import median_interval
from cost.normalize import BOUND
from experts.data import load


@pytest.fixture(scope="module")
def logs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cost") / "monitor"
    monitor.train(monitor.Training(load("digits"), 0, batch_size=128), 8, folder, 1)
    return folder


def test_the_report_is_whole(logs: Path, tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["logs", str(logs), "--out", str(tmp_path), "--json", "-"], catch_exceptions=False)
    assert done.exit_code == 0
    result = json.loads((tmp_path / "results.json").read_text())
    assert json.loads(done.stdout)["epochs"] == result["epochs"]
    assert len(result["epochs"]) == 8
    assert result["epochs"][-1]["loss"] < result["epochs"][0]["loss"]
    assert result["energy_source"].startswith(("proxy", "RAPL"))
    assert {"commit", "fingerprint", "versions"} <= result.keys()
    text = (tmp_path / "report.md").read_text()
    for name in ("epochs", "efficiency", "distributions"):
        assert f"({name}.png)" in text
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    epoch = result["epochs"][3]
    assert epoch["accuracy_per_ms"] == pytest.approx(epoch["validation_accuracy"] / (epoch["total"] * 1e3))
    assert epoch["accuracy_per_joule"] == pytest.approx(epoch["validation_accuracy"] / epoch["energy"])


def test_pairs_are_of_epochs_with_and_without() -> None:
    found = monitor.pair(monitor.Training(load("digits"), 0, batch_size=128), 2, warm_up=1)
    assert [(row["every"], row["clock"]) for row in found["overhead"]] == [
        (10, "wall"), (10, "CPU"), (1, "wall"), (1, "CPU"),
    ]  # fmt: skip
    assert all(row["ci95"][0] <= row["median"] <= row["ci95"][1] for row in found["overhead"])


def test_no_normalised_value_is_beyond_three_sigma(logs: Path) -> None:
    batches, _, _ = report.read(logs)
    result = report.analyse(logs)
    assert [row["beyond 3"] for row in result["normalised"][1:]] == [0, 0, 0]
    for method in ("z-norm", "ema", "min-max"):
        values = report.normalise(batches, method)
        assert values.shape == (len(batches), 3)
        assert np.abs(values).max() <= BOUND
        assert values[:, 0].std() > 0


def test_a_batch_too_large_to_pair_is_refused() -> None:
    with pytest.raises(ValueError, match="no two batches of 1000"):
        monitor.pair(monitor.Training(load("digits"), 0, batch_size=1000), 1)


def test_broken_logs_are_refused(logs: Path, tmp_path: Path) -> None:
    result = report.write(logs, tmp_path)
    with pytest.raises(report.LogsError, match="Monitor writes them"):
        report.write(tmp_path / "nothing", tmp_path)
    cut = Path(shutil.copytree(logs, tmp_path / "cut"))
    lines = (cut / "batches.csv").read_text()
    (cut / "batches.csv").write_text(lines[:-90])
    assert report.write(cut, tmp_path)["batch"]["measured"] == result["batch"]["measured"] - 1
    for file, text in (("monitor.json", "{}"), ("monitor.json", '{"schema": 9}'), ("epochs.csv", "a,b\n1,2\n")):
        broken = Path(shutil.copytree(logs, tmp_path / "broken", dirs_exist_ok=True))
        (broken / file).write_text(text)
        with pytest.raises(report.LogsError):
            report.write(broken, tmp_path)


def test_a_monitored_training_is_the_same_training(tmp_path: Path) -> None:
    source = load("digits")
    for every in (1, 3):
        monitor.train(monitor.Training(source, 0, batch_size=128), 2, tmp_path / str(every), every)
    first, second = (pd.read_csv(tmp_path / name / "epochs.csv") for name in ("1", "3"))
    assert first["loss"].tolist() == second["loss"].tolist()
    assert first["validation_accuracy"].tolist() == second["validation_accuracy"].tolist()


def test_alerts_by_hand() -> None:
    batches = pd.DataFrame({"total": [1.0] * 18 + [5.0] * 2})
    epochs = pd.DataFrame(
        {"epoch": [0, 1, 2], "seconds": [1.0, 1.0, 1.6], "rss": [100, 110, 121], "accuracy": [0.9, 0.95, 0.92],
         "loss": [1.0, 0.5, np.nan], "finite": [True, True, False]}
    )  # fmt: skip
    found = report.alerts(batches, epochs)
    expected = [
        "epoch 2 took 1.6",
        "5.0 times its median",
        "grew by 21%",
        "ended 0.030 below",
        "accuracy of epoch 2 is not finite",
    ]
    assert len(found) == len(expected)
    assert all(part in text for part, text in zip(expected, found, strict=True))
    assert report.alerts(pd.DataFrame({"total": [1.0] * 20}), epochs.iloc[:2]) == []


def test_look_ups_are_timed() -> None:
    found = monitor.look_up(repeats=1000)
    assert set(found) == {"profile.cost", "in a step"}


def test_the_interval_of_a_median_holds_it() -> None:
    values = np.random.default_rng(0).standard_normal(100)
    low, high = median_interval(values)
    assert low < np.median(values) < high
    assert high - low == pytest.approx(2 * 1.96 * 1.2533 / 10, rel=0.5)
