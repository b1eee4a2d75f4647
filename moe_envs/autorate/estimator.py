"""Where the best learning rate lies, estimated from what the steps after the last decisions show.

After each of decisions 2 to 20, a linear model of the signals estimates the logarithm of the rate over the best one;
the estimates are averaged by their precisions, with the range test as the first. Fitted on trainings at far too low to
far too high rates, by batches of 32 and of 128, whose best cosine is known (`references`).
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np

from cost.files import load_json, save_json
from experts.data import DataError
from moe_envs.autorate.signals import BOUND, FACTORS, PARTS, SIGNALS, RateSignals, got_worse, signals_of
from moe_envs.core.spaces import layout

PATH = Path(__file__).parent / "estimator.json"
UNUSED = ("progress", "horizon", "from_highest", "from_bad", "backs")  # what an agent did, not what the training shows
USED = tuple(name for name in SIGNALS if name not in UNUSED)
COLUMNS = np.concatenate([np.arange(SIGNALS[name].slice.start, SIGNALS[name].slice.stop) for name in USED])
MODELS = 4  # one for each of the first decisions, the last for all later ones
FIRST, LAST = 2, 20  # decisions that are learned from: the steps after the first one differ most between models
STUCK, LEARNT = 3, 0.05  # decisions without a better loss, and with what is not 5 % below the first
PRIOR, NO_PRIOR, LEAST_FAR = 0.5, 1.5, 0.5  # decades: deviation of a range test, of another start; a diverging rate's
WORSE, STEEPNESS = 1.3, 4.0  # the validation loss over the best one; of the ratings, per decade
LARGEST = 1e6  # number in the file
LAYOUT = layout((
    *PARTS,
    ("offset", 1, -BOUND, BOUND, "log10 of the rate over the estimated best one"),
    ("rating", len(FACTORS) + 1, -BOUND, 0.0, "score of an action: how near to it; of restoring 0 where it helps"),
))  # fmt: skip


class RateEstimator(NamedTuple):
    """Coefficients `[models, signals]`, intercepts and standard deviations of the errors `[models]`, in decades."""

    coefficients: np.ndarray
    intercepts: np.ndarray
    deviations: np.ndarray

    def __call__(self, observation: np.ndarray, decision: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """log10 of the rate over the best one and its standard deviation, `[n]` each, after so many decisions `[n]`."""
        model = np.clip(decision - 1, 0, MODELS - 1)
        used = observation[:, COLUMNS].astype(np.float64)
        offset = (used * self.coefficients[model]).sum(1) + self.intercepts[model]
        diverged = observation[:, SIGNALS["diverged"].slice.start] > 0
        return np.where(diverged, np.maximum(offset, LEAST_FAR), offset), self.deviations[model]


def update(
    best: np.ndarray, precision: np.ndarray, signals: np.ndarray, rates: np.ndarray, decision: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """The estimated log10 of the best rate and its precision, `[n]` each, after steps at `rates`, the `decision`-th of
    the training."""
    offset, deviation = load()(signals, decision)
    weight = np.where((decision >= FIRST) & (decision <= LAST), deviation**-2, 0.0)
    return (best * precision + (np.log10(rates) - offset) * weight) / (precision + weight), precision + weight


def observe(of: RateSignals, best: np.ndarray) -> np.ndarray:
    """Observations `[n, 30]` float32, laid out as `LAYOUT`: the signals, and what the estimated log10 of the best rate
    `[n]` advises."""
    found = signals_of(of)
    offset = np.log10(of.rate) - best
    worse = got_worse(of.losses[:, 1, 0] - of.first, of.best - of.first, WORSE)
    worse |= (of.since_best >= STUCK) & (of.losses[:, 1, 0] > of.first - LEARNT)  # as with dead units
    rated = ratings(offset, worse & ~of.diverged.astype(np.bool_))
    return np.column_stack([found, offset.clip(-BOUND, BOUND), rated]).astype(np.float32)


def ratings(offset: np.ndarray, worse: np.ndarray) -> np.ndarray:
    """Ratings of the actions `[n, 8]`, from -5 to 0: how close each brings the rate to the estimated best one, which is
    10 ** `offset` below; going back is rated highest where the training got `worse`, and lowest elsewhere."""
    close = -STEEPNESS * np.abs(np.log10(FACTORS) + offset[:, None])
    close -= close.max(1, keepdims=True)
    found = np.column_stack([close - worse[:, None], np.where(worse, 0.0, -BOUND)])
    return found.clip(-BOUND, 0)


@cache
def load() -> RateEstimator:
    """The shipped estimator; raises `DataError` if it is damaged."""
    content = load_json(PATH, DataError, "install moe-envs anew")
    try:
        found = RateEstimator(*(np.array(content[name], dtype=np.float64) for name in RateEstimator._fields))
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise DataError(f"{PATH} is of another version ({error}): install moe-envs anew") from error
    shapes = [each.shape for each in found]
    usable = all((np.abs(each) < LARGEST).all() for each in found) and bool((found.deviations > 0).all())
    if shapes != [(MODELS, len(COLUMNS)), (MODELS,), (MODELS,)] or not usable:
        raise DataError(f"{PATH} is of another version: install moe-envs anew")
    return found


def save(estimator: RateEstimator, path: Path = PATH) -> None:
    """Write an estimator; the shipped one is used from now on."""
    save_json(path, {name: getattr(estimator, name).tolist() for name in RateEstimator._fields})
    load.cache_clear()


def blank() -> RateEstimator:
    """An estimator that finds every rate right."""
    return RateEstimator(np.zeros((MODELS, len(COLUMNS))), np.zeros(MODELS), np.ones(MODELS))


def fit(observations: np.ndarray, offsets: np.ndarray, penalty: float = 30.0) -> RateEstimator:
    """Ridge regressions on observations `[decisions, n, size]` after each of the first decisions, and log10 of the rate
    over the best one, `[decisions, n]`."""
    coefficients, intercepts, deviations = [], [], []
    for model in range(MODELS):
        part = slice(model, model + 1 if model < MODELS - 1 else None)
        used = observations[part][:, :, COLUMNS].reshape(-1, len(COLUMNS)).astype(np.float64)
        wanted = offsets[part].ravel()
        mean, deviation = used.mean(0), used.std(0) + 1e-6
        scaled = (used - mean) / deviation
        solved = np.linalg.solve(
            scaled.T @ scaled + penalty * np.eye(len(COLUMNS)), scaled.T @ (wanted - wanted.mean())
        )
        coefficients.append(solved / deviation)
        intercepts.append(wanted.mean() - float((solved * mean / deviation).sum()))
        deviations.append(float((scaled @ solved + wanted.mean() - wanted).std()))
    return RateEstimator(np.array(coefficients), np.array(intercepts), np.array(deviations))
