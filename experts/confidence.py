"""Calibration of gates: correct the logits on validation data so that confidence matches accuracy.

A gate is right about an input when the expert that it takes answers correctly. Shape legend: B inputs, E experts, C
classes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from scipy.optimize import isotonic_regression, minimize_scalar

BINS = 15


def right_experts(outputs_BEC: np.ndarray, labels_B: np.ndarray) -> np.ndarray:
    """Experts that are correct on their own, boolean `[B, E]`, from their class logits."""
    return np.asarray(outputs_BEC.argmax(-1) == labels_B[:, None])


def confidence(gate_logits_BE: np.ndarray, temperature: float = 1.0) -> np.ndarray:
    """Largest gate probability, `[B]`."""
    return np.asarray(softmax(gate_logits_BE / temperature).max(1))


def gate_is_right(gate_logits_BE: np.ndarray, right_BE: np.ndarray) -> np.ndarray:
    """Whether the top-1 expert is correct, boolean `[B]`."""
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


class Reliability(NamedTuple):
    """Of equally wide bins of confidence: how many inputs each has, their mean confidence, and the share that is right;
    0 where there is none."""

    counts: np.ndarray
    confidence: np.ndarray
    right: np.ndarray

    @property
    def gaps(self) -> np.ndarray:
        """How far confidence is from the share right, `[bins]`."""
        return np.abs(self.confidence - self.right)


def reliability(confidence_B: np.ndarray, right_B: np.ndarray, bins: int = BINS) -> Reliability:
    """How often what is sure to some degree is right."""
    place_B = np.minimum((confidence_B * bins).astype(np.int64), bins - 1)
    counts = np.bincount(place_B, minlength=bins)
    sums = (np.bincount(place_B, weights=each, minlength=bins) for each in (confidence_B, right_B))
    return Reliability(counts, *(each / np.maximum(counts, 1) for each in sums))


def expected_calibration_error(confidence_B: np.ndarray, right_B: np.ndarray, bins: int = BINS) -> float:
    """The mean gap over the bins, weighted by their inputs (Naeini et al. 2015)."""
    found = reliability(confidence_B, right_B, bins)
    return float(found.gaps @ found.counts / len(confidence_B))


def maximum_calibration_error(confidence_B: np.ndarray, right_B: np.ndarray, bins: int = BINS, least: int = 1) -> float:
    """The largest gap of a bin that has at least so many inputs (Naeini et al. 2015)."""
    found = reliability(confidence_B, right_B, bins)
    return float(found.gaps[found.counts >= least].max(initial=0.0))


def softmax(logits: np.ndarray) -> np.ndarray:
    """Probabilities of logits `[..., C]`."""
    odds = np.exp(logits - logits.max(-1, keepdims=True))
    return np.asarray(odds / odds.sum(-1, keepdims=True))
