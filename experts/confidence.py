"""How sure a gate may be: its logits corrected on validation data so that its confidence is how often it is right.

A gate is right about an input when the expert that it takes answers correctly. Shape legend: B inputs, E experts, C
classes.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.optimize import isotonic_regression, minimize_scalar

BINS = 15


def right_experts(outputs_BEC: np.ndarray, labels_B: np.ndarray) -> np.ndarray:
    """Which experts alone answer correctly, boolean `[B, E]`, of their class logits."""
    return np.asarray(outputs_BEC.argmax(-1) == labels_B[:, None])


def confidence(gate_logits_BE: np.ndarray, temperature: float = 1.0) -> np.ndarray:
    """The gate's largest probability, `[B]`."""
    return np.asarray(_softmax(gate_logits_BE / temperature).max(1))


def gate_is_right(gate_logits_BE: np.ndarray, right_BE: np.ndarray) -> np.ndarray:
    """Whether the expert of largest logit is right, boolean `[B]`."""
    return np.asarray(np.take_along_axis(right_BE, gate_logits_BE.argmax(1)[:, None], axis=1)[:, 0])


def fit_temperature(gate_logits_BE: np.ndarray, right_BE: np.ndarray) -> float:
    """What gate logits are to be divided by so that the confidence predicts best whether the gate is right: least
    cross-entropy of the two (Guo et al. 2017, with the gate's expert in the place of the class), from 0.01 to 100.

    Class logits and one-hot labels give the temperature of a classifier."""
    right_B = gate_is_right(gate_logits_BE, right_BE)

    def loss(log_temperature: float) -> float:
        sure_B = confidence(gate_logits_BE, float(np.exp(log_temperature))).clip(1e-7, 1 - 1e-7)
        return -float(np.where(right_B, np.log(sure_B), np.log1p(-sure_B)).mean())

    return float(np.exp(minimize_scalar(loss, bounds=(np.log(0.01), np.log(100)), method="bounded").x))


@dataclass(frozen=True)
class Isotonic:
    """A rising step function from confidence to the share that is right (Zadrozny & Elkan 2002): `values` at the sorted
    `confidences` of the data it was fitted on, straight lines between."""

    confidences: np.ndarray
    values: np.ndarray

    @classmethod
    def fit(cls, confidence_B: np.ndarray, right_B: np.ndarray) -> Isotonic:
        """By the pool of adjacent violators; of equal confidences the mean counts."""
        known, place_B, counts = np.unique(confidence_B, return_inverse=True, return_counts=True)
        means = np.bincount(place_B, weights=right_B.astype(np.float64)) / counts
        return cls(known, np.asarray(isotonic_regression(means, weights=counts).x))

    def __call__(self, confidence_B: np.ndarray) -> np.ndarray:
        """The share that is right at these confidences, `[B]`."""
        return np.asarray(np.interp(confidence_B, self.confidences, self.values))


def expected_calibration_error(confidence_B: np.ndarray, right_B: np.ndarray, bins: int = BINS) -> float:
    """The mean distance of confidence and share right over equally wide bins, weighted by their inputs (Naeini et al.
    2015)."""
    place_B = np.minimum((confidence_B * bins).astype(np.int64), bins - 1)
    gaps = np.bincount(place_B, weights=confidence_B - right_B, minlength=bins)
    return float(np.abs(gaps).sum() / len(confidence_B))


def _softmax(logits: np.ndarray) -> np.ndarray:
    odds = np.exp(logits - logits.max(1, keepdims=True))
    return np.asarray(odds / odds.sum(1, keepdims=True))
