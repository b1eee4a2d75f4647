"""Corrections of a gate's confidence: by hand, and on a real bundle."""

import numpy as np
import pytest

from experts import bundle
from experts.confidence import (
    Isotonic,
    confidence,
    expected_calibration_error,
    fit_temperature,
    gate_is_right,
    right_experts,
)


def test_calibration_error_by_hand() -> None:
    sure, right = np.array([0.95, 0.95, 0.55, 0.55]), np.array([True, False, True, True])
    assert expected_calibration_error(sure, right, bins=10) == pytest.approx((2 * 0.45 + 2 * 0.45) / 4)
    assert expected_calibration_error(np.ones(5), np.ones(5, dtype=np.bool_)) == 0


def test_who_is_right_by_hand() -> None:
    outputs = np.array([[[1.0, 2.0], [3.0, 0.0]], [[0.0, 1.0], [0.0, 1.0]]])
    right = right_experts(outputs, np.array([0, 0]))
    assert right.tolist() == [[False, True], [False, False]]
    assert gate_is_right(np.array([[0.0, 1.0], [1.0, 0.0]]), right).tolist() == [True, False]


def test_a_temperature_that_was_put_in_is_found() -> None:
    generator = np.random.default_rng(0)
    logits = generator.normal(size=(20_000, 4)) * 2
    odds = np.exp(logits)
    chosen = (odds / odds.sum(1, keepdims=True)).cumsum(1) > generator.random((len(logits), 1))
    right = np.eye(4, dtype=np.bool_)[chosen.argmax(1)]  # experts are right as often as the gate says
    assert fit_temperature(logits * 3, right) == pytest.approx(3, rel=0.05)


def test_isotonic_by_hand() -> None:
    fitted = Isotonic.fit(np.array([0.1, 0.2, 0.3, 0.3, 0.4]), np.array([False, True, False, False, True]))
    np.testing.assert_allclose(fitted(np.array([0.1, 0.2, 0.3, 0.4, 0.9])), [0, 1 / 3, 1 / 3, 1, 1])
    assert fitted(np.array([0.35]))[0] == pytest.approx(2 / 3)


def test_a_real_gate_is_corrected_on_validation_and_better_on_test() -> None:
    loaded = bundle.load("fashion-mnist")
    known, judged = loaded.split("validation"), loaded.split("test")
    right = [right_experts(split.logits, split.labels) for split in (known, judged)]
    temperature = fit_temperature(known.gate_logits, right[0])
    isotonic = Isotonic.fit(confidence(known.gate_logits), gate_is_right(known.gate_logits, right[0]))
    truth, plain = gate_is_right(judged.gate_logits, right[1]), confidence(judged.gate_logits)
    before = expected_calibration_error(plain, truth)
    by_temperature = expected_calibration_error(confidence(judged.gate_logits, temperature), truth)
    assert before > 0.1
    assert by_temperature < 0.8 * before
    assert expected_calibration_error(isotonic(plain), truth) < 0.03
