"""Observations and actions of MoEAutoRate-v0, for the environment and for other training loops.

All signals are losses and norms of weights, so that they can be computed for any model under any optimiser, and mean
the same at any scale of the weights.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from moe_envs.core.spaces import layout

FACTORS = np.array([0.1, 0.33, 0.7, 1.0, 1.4, 3.0, 10.0])
KEEP, CLIMB, BACK = 3, 5, len(FACTORS)  # actions: keep the rate, three times the rate, go back to the best state
BACK_FACTOR, FLOOR = 0.3, 0.01  # of the rate after going back; of the cosine at the end
RATES = 1e-7, 10.0  # clamps
DIVERGED = 2.0  # log of validation loss over that before the training
SWEEP_RATES = 1e-6, 10.0  # of a range test
SWEEP_STEPS, SMOOTHING, RISE, SWEEP_SHARE = 60, 0.8, 2.0, 0.15
NOISE = 0.03  # of the loss before the training
TINY, LOSS_FLOOR, BOUND = 1e-12, 1e-4, 5.0

PARTS = tuple(
    (name, size, -BOUND, BOUND, meaning)
    for name, size, meaning in (
        ("progress", 1, "share of the decisions that are taken"),
        ("horizon", 1, "log2 of the number of decisions, minus 5"),
        ("validation_change", 2, "last two changes of the log validation loss, newest first, times 5"),
        ("training_change", 2, "last two changes of the log of the mean training loss, newest first, times 5"),
        ("slope", 1, "log of the second half's over the first half's mean training loss of the last steps, times 5"),
        ("spread", 1, "standard deviation over mean of the training losses since the last decision, times 5"),
        ("gap", 1, "log validation loss minus log training loss"),
        ("over_best", 1, "log of the validation loss over the best one, times 5"),
        ("over_first", 1, "log of the validation loss over that before the training"),
        ("best_over_first", 1, "log of the best validation loss over that before the training"),
        ("since_best", 1, "decisions since the best validation loss, or since restoring its state, over 5"),
        ("step_size", 1, "log10 of the norm of the last step over that of the weights, plus 3"),
        ("straightness", 1, "log of the distance that the weights moved over that of a random walk with as many steps"),
        ("turn", 1, "cosine between the last two displacements of the weights"),
        ("growth", 1, "log of the norm of the weights over that before the training"),
        ("from_highest", 1, "log10 of the rate over the highest one so far"),
        ("from_bad", 1, "log10 of the rate over that at the last restore, 0 if there was none"),
        ("backs", 1, "log2 of one plus the number of restores"),
        ("diverged", 1, "1 if the last steps diverged and were undone"),
    )
)  # fmt: skip
SIGNALS = layout(PARTS)


class RateSignals(NamedTuple):
    """RateSignals of n trainings, `[n]` unless stated otherwise."""

    progress: np.ndarray
    decisions: np.ndarray  # in the whole training
    losses: np.ndarray  # `[n, 2, 3]`, logs of mean training and of validation losses, newest first
    slope: np.ndarray
    spread: np.ndarray
    first: np.ndarray  # log validation loss before the training
    best: np.ndarray  # log validation loss of the best state
    since_best: np.ndarray
    step_size: np.ndarray  # norm of the last step over that of the weights
    straightness: np.ndarray  # norm of the way over norm of the last step and root of the number of steps
    turn: np.ndarray
    growth: np.ndarray
    rate: np.ndarray
    highest: np.ndarray
    bad: np.ndarray  # 0 where there is none
    backs: np.ndarray
    diverged: np.ndarray


def signals_of(of: RateSignals) -> np.ndarray:
    """Signals `[n, 21]` float32, laid out as `SIGNALS`."""
    changes = 5 * (of.losses[:, :, :2] - of.losses[:, :, 1:])
    training, validation = of.losses[:, 0, 0], of.losses[:, 1, 0]
    bad = np.where(of.bad > 0, of.bad, of.rate)
    growth = np.where(np.isfinite(of.growth), np.maximum(of.growth, TINY), 1.0)
    columns = (
        of.progress, np.log2(of.decisions) - 5, changes[:, 1], changes[:, 0], 5 * of.slope, 5 * of.spread,
        validation - training, 5 * (validation - of.best), validation - of.first, of.best - of.first,
        of.since_best / 5, np.log10(np.maximum(of.step_size, TINY)) + 3, np.log(np.maximum(of.straightness, TINY)),
        of.turn, np.log(growth), np.log10(of.rate / of.highest), np.log10(of.rate / bad),
        np.log2(1 + of.backs), of.diverged,
    )  # fmt: skip
    return np.column_stack(columns).clip(-BOUND, BOUND).astype(np.float32)


def of_window(losses: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Log of the mean, slope and spread of training losses `[n, steps]` between two decisions, `[n]` each."""
    half = losses.shape[1] // 2
    mean = np.maximum(losses.mean(1), LOSS_FLOOR)
    if half == 0:
        return np.log(mean), np.zeros(len(losses)), np.zeros(len(losses))
    early, late = np.maximum([losses[:, :half].mean(1), losses[:, half:].mean(1)], LOSS_FLOOR)
    return np.log(mean), np.log(late / early), losses.std(1) / mean


def changed(actions: np.ndarray, rates: np.ndarray) -> np.ndarray:
    """Rates `[n]` after actions `[n]`, without the cosine."""
    factors = np.append(FACTORS, BACK_FACTOR)[actions]
    return np.where(factors == 1, rates, np.clip(rates * factors, *RATES))


def got_worse(loss: np.ndarray, best: np.ndarray, times: np.ndarray | float) -> np.ndarray:
    """Whether a validation loss `[n]` is so many times the best one, and above it by more than the noise of a low loss;
    both are logarithms, less that of the loss before the training."""
    found: np.ndarray = (loss - best > np.log(times)) & (np.exp(loss) - np.exp(best) > NOISE)
    return found


def cosine(progress: np.ndarray) -> np.ndarray:
    """Factor of the rates, from 1 to `FLOOR`."""
    found: np.ndarray = FLOOR + (1 - FLOOR) * (1 + np.cos(np.pi * progress)) / 2
    return found


def sweep_rates(steps: int = SWEEP_STEPS) -> np.ndarray:
    """Learning rates of a range test (Smith 2017), `[steps]`."""
    return np.geomspace(*SWEEP_RATES, steps)


def found_rate(losses: np.ndarray) -> np.ndarray:
    """Learning rate to start from, `[n]`, by the training losses `[n, steps]` of a range test.

    It is 0.15 of the rate at which the smoothed loss was lowest, before it rose to twice that.
    """
    losses = np.where(np.isfinite(losses), np.minimum(losses, 1e6), 1e6)
    smooth, mean = np.empty_like(losses, dtype=np.float64), np.zeros(len(losses))
    for step in range(losses.shape[1]):
        mean = SMOOTHING * mean + (1 - SMOOTHING) * losses[:, step]
        smooth[:, step] = mean / (1 - SMOOTHING ** (step + 1))
    left = np.cumsum(smooth > RISE * np.minimum.accumulate(smooth, axis=1), axis=1) > 0
    place = np.where(left, np.inf, smooth).argmin(1)
    return np.maximum(sweep_rates(losses.shape[1])[place] * SWEEP_SHARE, RATES[0])
