"""Observations and actions of MoEMetaOpt-v0, for the environment and for other training loops."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from moe_envs.core.spaces import layout

GROUPS = ("gate", "experts")
FACTORS = np.array([0.5, 1.0, 2.0])
RATES = 1e-5, 0.3  # clamps
DECAYS = np.array([0.0, 1e-3, 1e-2, 0.1, 0.3, 1.0])
DIVERGED, LOSS_FLOOR, RATIO_FLOOR, ERROR_FLOOR = 20.0, 1e-4, 1e-8, 1e-3  # the first in nats of validation loss
BOUND = 5.0  # of the observation

LAYOUT = layout(
    (name, size, -BOUND, BOUND, meaning)
    for name, size, meaning in (
        ("rates", 2, "log10 of the learning rates of gate and experts, plus 2.5"),
        ("decays", 2, "places of their weight decays on the ladder 0, 0.001, 0.01, 0.1, 0.3, 1, less 2"),
        ("validation_loss", 1, "its log"),
        ("validation_change", 2, "its last two changes, newest first, times 5"),
        ("training_loss", 1, "log of the mean over the last optimiser steps"),
        ("training_change", 2, "its last two changes, times 5"),
        ("gap", 1, "log validation loss less log training loss"),
        ("distance", 1, "log of the validation error over the target's error"),
        ("gradients", 2, "log of the gradients' norms"),
        ("weights", 2, "log of the weights' norms over those at the start"),
        ("updates", 2, "half the log of the norms of update over weights, plus 2"),
        ("entropy", 1, "the gate's, over its largest possible value"),
        ("imbalance", 1, "deviation over mean of the experts' loads"),
        ("spread", 1, "deviation over mean of the losses in the last optimiser steps, times 5"),
        ("progress", 1, "share of the actions that are taken"),
        ("cost", 1, "so far, relative to a training that takes all actions"),
        ("undone", 1, "1 if the last steps diverged and were undone"),
    )
)


class Signals(NamedTuple):
    """Signals of n trainings, `[n]` unless stated otherwise."""

    rates: np.ndarray  # `[n, 2]`, of gate and experts
    ladder: np.ndarray  # `[n, 2]`, places in DECAYS
    losses: np.ndarray  # `[n, 2, 3]`, logs of training's and validation's, newest first
    distance: np.ndarray  # `distance` of them to the target
    gradients: np.ndarray  # `[n, 2]`, norms
    growth: np.ndarray  # `[n, 2]`, norms of the weights over those at the start
    ratio: np.ndarray  # `[n, 2]`, norms of the last update over those of the weights
    entropy: np.ndarray  # of the gate, from 0 to 1
    imbalance: np.ndarray
    spread: np.ndarray
    progress: np.ndarray
    cost: np.ndarray
    undone: np.ndarray


def distance(accuracy: np.ndarray, target: float) -> np.ndarray:
    """Log of the errors at validation over the error at the target; 0 at the target."""
    errors = np.maximum([1 - accuracy, np.full_like(accuracy, 1 - target)], ERROR_FLOOR)
    return np.log(errors[0] / errors[1])


def observe(of: Signals) -> np.ndarray:
    """Observations `[n, 24]` float32, laid out as `LAYOUT`."""
    changes = 5 * (of.losses[:, :, :2] - of.losses[:, :, 1:])
    training, validation = of.losses[:, 0, :1], of.losses[:, 1, :1]
    ratios = np.log(np.maximum(np.stack([of.gradients, of.growth, of.ratio]), RATIO_FLOOR))
    single = (of.entropy, of.imbalance, 5 * of.spread, of.progress, of.cost, of.undone)
    columns = (
        np.log10(np.maximum(of.rates, RATIO_FLOOR)) + 2.5, of.ladder - 2.0, validation, changes[:, 1], training,
        changes[:, 0], validation - training, of.distance[:, None], ratios[0], ratios[1], ratios[2] / 2 + 2,
        np.stack(single, axis=1),
    )  # fmt: skip
    return np.concatenate(columns, axis=1).clip(-BOUND, BOUND).astype(np.float32)


def apply(actions: np.ndarray, rates: np.ndarray, ladder: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Learning rates and places of the weight decays, `[n, 2]` each, after actions `[n, 4]`; what is changed is
    clamped."""
    factors = FACTORS[actions[:, :2]]
    after = np.where(factors == 1, rates, np.clip(rates * factors, *RATES))
    return after, np.clip(ladder + actions[:, 2:] - 1, 0, len(DECAYS) - 1)
