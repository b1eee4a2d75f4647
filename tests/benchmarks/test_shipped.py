"""What is shipped for MoEAutoRate-v0 is what its makers make."""

from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from benchmarks import shipped
from benchmarks.cli import bundle
from experts.data import DataError
from moe_envs.autorate import estimator
from moe_envs.autorate.signals import BACK, KEEP, SIGNALS, RateSignals


def test_the_estimator_knows_what_is_too_high_and_too_low(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shipped, "TRAINED_ON", {"task": ["digits"], "steps_per_action": [10]})
    monkeypatch.setattr(shipped, "DECISIONS", 4)
    observations, offsets = shipped._decisions(5, task="digits", steps_per_action=10)
    offset, deviation = estimator.load()(observations[0], np.ones(len(offsets[0]), dtype=int))
    assert np.corrcoef(offset, offsets[0])[0, 1] > 0.8
    assert np.sqrt(np.mean((offset - offsets[0]) ** 2)) < 1.3 * deviation[0]
    made = shipped.estimated(seeds=(0,))
    again, _ = made(observations[0], np.ones(len(offsets[0]), dtype=int))
    assert np.corrcoef(again, offset)[0, 1] > 0.95


def test_estimates_are_averaged_by_their_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    size = len(estimator.COLUMNS)
    two = estimator.RateEstimator(np.zeros((4, size)), np.array([1.0, 1, 1, 1]), np.full(4, 0.5))
    monkeypatch.setattr(estimator, "load", lambda: two)
    signals = np.zeros((2, SIGNALS["diverged"].slice.stop), dtype=np.float32)
    best, precision = estimator.update(
        np.zeros(2), np.full(2, 4.0), signals, np.ones(2), np.array([2, estimator.LAST + 1])
    )
    np.testing.assert_allclose(best, [-0.5, 0.0])  # half of the evidence says a decade lower; the late one is not heard
    np.testing.assert_allclose(precision, [8.0, 4.0])


def test_ratings_by_hand() -> None:
    rated = estimator.ratings(np.array([0.0, 1.0, -1.0, 0.0]), np.array([False, False, False, True]))
    assert rated.argmax(1).tolist() == [KEEP, 0, 6, BACK]
    assert rated[:3].max(1).tolist() == [0, 0, 0]
    assert rated[0, BACK] == -5


def test_a_network_that_died_goes_back() -> None:
    def rated(loss: float, since_best: int) -> int:
        logs, one = np.full((1, 2, 3), np.log(loss)), np.ones(1)
        signals = RateSignals(
            one, one, logs, one, one, np.log([2.3]), np.log([2.0]), np.array([since_best]), *[one] * 6, 0 * one, one,
            0 * one,
        )  # fmt: skip
        return int(estimator.observe(signals, np.zeros(1))[0, estimator.LAYOUT["rating"].slice].argmax())

    assert rated(2.29, estimator.STUCK) == BACK
    assert rated(2.29, estimator.STUCK - 1) == KEEP
    assert rated(2.1, estimator.STUCK) == KEEP


def test_damage_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "estimator.json").write_text(estimator.PATH.read_text().replace("1", "2", 1))
    monkeypatch.setattr(estimator, "PATH", tmp_path / "estimator.json")
    with pytest.raises(DataError, match="install moe-envs anew"):
        estimator.load.__wrapped__()


def test_what_is_shipped_is_made_by_one_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved: list[str] = []
    monkeypatch.setattr(shipped.references, "save", lambda task, steps, batch_size, path: saved.append(path.name))
    monkeypatch.setattr(shipped.estimator, "save", lambda estimator: saved.append(type(estimator).__name__))
    monkeypatch.setattr(shipped, "TRAINED_ON", {"task": ["digits"]})
    monkeypatch.setattr(shipped, "DECISIONS", 4)
    done = CliRunner().invoke(bundle.app, ["autorate"])
    assert done.exit_code == 0, done.output
    names = [f"{name}.autorate-10-32.safetensors" for name in ("digits", "fashion-mnist")]
    assert saved == [*names, "RateEstimator", "RateEstimator"]
