"""Observations of MoERouting-v0: what a policy sees of an input and of its batch."""

from typing import NamedTuple

import numpy as np

from experts.bundle import FEATURE_BOUND, Split

OBSERVATIONS = ("estimates", "features")
GATE_BOUND = 10.0
BATCH_SCALE = 3.0  # brings the mean features of topical batches to a spread of about 1


Described = tuple[str, int, float, float, str]  # a part of an observation: name, size, bounds, meaning


class View(NamedTuple):
    """What is seen of inputs `[n, k]` and averaged over a batch `[n, m]`, float32, and the parts of an observation."""

    seen: np.ndarray
    averaged: np.ndarray
    of_input: list[Described]
    of_batch: list[Described]


def view(observation: str, split: Split) -> View:
    """What is seen of the inputs of a split."""
    gate = np.clip(split.gate_logits - split.gate_logits.mean(1, keepdims=True), -GATE_BOUND, GATE_BOUND)
    odds, experts = np.exp(gate), gate.shape[1]
    probabilities = odds / odds.sum(1, keepdims=True)
    batch_gate = "batch_gate", experts, 0, experts, "mean gate probability over the whole batch, times E: 1 if even"
    if observation == "estimates":
        estimates = split.estimates.astype(np.float32)
        return View(
            np.hstack([estimates, probabilities]).astype(np.float32),
            np.hstack([estimates, probabilities * experts]).astype(np.float32),
            [
                ("estimates", experts, 0, 1, "estimated P(correct) of each expert for the present input"),
                ("gate", experts, 0, 1, "the gate's probabilities for it"),
            ],
            [("batch_estimates", experts, 0, 1, "mean estimates over the whole batch"), batch_gate],
        )
    features, count = split.features.astype(np.float32), split.features.shape[1]
    bound = FEATURE_BOUND * BATCH_SCALE
    return View(
        np.hstack([features, gate]).astype(np.float32),
        np.hstack([probabilities * experts, features * BATCH_SCALE]).astype(np.float32),
        [
            ("features", count, -FEATURE_BOUND, FEATURE_BOUND, "principal components of the present input"),
            ("gate_logits", experts, -GATE_BOUND, GATE_BOUND, "the gate's logits for it, less their mean"),
        ],
        [batch_gate, ("batch_features", count, -bound, bound, "mean features over the whole batch, times 3")],
    )
