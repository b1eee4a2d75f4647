"""Interquartile means with stratified bootstrap as in rliable (Agarwal et al. 2021), normalised scores, and 95 %
intervals of means."""

from collections.abc import Callable, Hashable, Sequence

import numpy as np
from scipy import stats

RESAMPLES = 2000


def iqm(scores: np.ndarray) -> float:
    """Interquartile mean over all runs and tasks."""
    return float(stats.trim_mean(np.ravel(scores), 0.25))


def bootstrap_interval(
    scores: np.ndarray,
    statistic: Callable[[np.ndarray], float] = iqm,
    seed: int = 0,
    resamples: int = RESAMPLES,
    trainings: Sequence[Hashable] | None = None,
) -> tuple[float, float]:
    """95 % percentile interval of a statistic of scores `[runs, tasks]` by stratified bootstrap over runs.

    `trainings [tasks]` labels the training of each task; runs are resampled jointly for tasks of one training. The
    interval is NaN for a single run and too narrow for a few runs. Raises `ValueError` for another shape.
    """
    scores = np.asarray(scores)
    if scores.ndim != 2:
        raise ValueError(f"scores must be [runs, tasks], got the shape {scores.shape}")
    runs, tasks = scores.shape
    if runs < 2:
        return float("nan"), float("nan")
    labels = list(range(tasks) if trainings is None else trainings)
    of_task = [labels.index(label) for label in labels]
    drawn = np.random.default_rng(seed).integers(runs, size=(resamples, runs, tasks))[:, :, of_task]
    low, high = np.percentile([statistic(scores[rows, np.arange(tasks)]) for rows in drawn], [2.5, 97.5])
    return float(low), float(high)


def probability_of_improvement(ours: np.ndarray, theirs: np.ndarray) -> float:
    """Probability that a run of ours `[runs, tasks]` scores higher than one of theirs `[runs, tasks]`, averaged over
    tasks; ties count half (Mann-Whitney)."""
    apart = ours[:, None] - theirs[None]
    return float(((apart > 0) + 0.5 * (apart == 0)).mean())


def normalized_score(value: np.ndarray | float, baseline: float, bound: float) -> np.ndarray:
    """Score scaled to 0 for the best baseline and 1 for the bound; NaN if the bound does not exceed the baseline."""
    gap = bound - baseline
    return np.asarray((np.asarray(value) - baseline) / gap if gap > 0 else np.full(np.shape(value), np.nan))


def mean_interval(values: np.ndarray, seed: int = 0, resamples: int = 2000) -> tuple[float, float]:
    """95 % interval of the mean of values `[episodes]`, or of values `[runs, episodes]` on common episodes.

    One run: percentile bootstrap over episodes, which does not cover other training seeds. Several runs: Student's t
    with runs - 1 degrees of freedom and the sum of the variances over runs and over episodes, since a bootstrap over
    five runs would be too narrow. Raises `ValueError` for fewer than two episodes.
    """
    table = np.atleast_2d(values)
    runs, episodes = table.shape
    if episodes < 2:
        raise ValueError(f"an interval needs at least 2 episodes, got {episodes}")
    if runs > 1:
        error = np.sqrt(table.mean(1).var(ddof=1) / runs + table.mean(0).var(ddof=1) / episodes)
        low, high = table.mean() + error * stats.t.ppf([0.025, 0.975], runs - 1)
    else:
        drawn = np.random.default_rng(seed).integers(episodes, size=(resamples, episodes))
        low, high = np.percentile(table[0][drawn].mean(1), [2.5, 97.5])
    return float(low), float(high)


def seeds_interval(values: np.ndarray) -> tuple[float, float]:
    """95 % Student's t interval of the mean over training seeds `[seeds]`; NaN for a single seed."""
    if len(values) < 2:
        return float("nan"), float("nan")
    error = values.std(ddof=1) / np.sqrt(len(values))
    low, high = values.mean() + error * stats.t.ppf([0.025, 0.975], len(values) - 1)
    return float(low), float(high)


def paired_difference(ours: np.ndarray, theirs: np.ndarray) -> tuple[float, tuple[float, float]]:
    """Mean and 95 % interval of ours `[runs, episodes]` minus theirs `[episodes]` on the same episodes."""
    difference = np.atleast_2d(ours) - theirs
    return float(difference.mean()), mean_interval(difference)


def welch_interval(first: np.ndarray, second: np.ndarray) -> tuple[float, float]:
    """95 % Welch interval of the difference of two means; for two constant samples, their difference."""
    difference = float(first.mean() - second.mean())
    if len(set(first.tolist())) == len(set(second.tolist())) == 1:  # zero variance
        return difference, difference
    found = stats.ttest_ind(first, second, equal_var=False).confidence_interval()
    return float(found.low), float(found.high)


def median_interval(values: np.ndarray, seed: int = 0, resamples: int = 10_000) -> tuple[float, float]:
    """95 % percentile-bootstrap interval of the median of values `[n]`."""
    drawn = np.random.default_rng(seed).integers(len(values), size=(resamples, len(values)))
    low, high = np.percentile(np.median(values[drawn], axis=1), [2.5, 97.5])
    return float(low), float(high)
