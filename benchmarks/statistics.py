"""Interquartile means and bootstrap intervals, as rliable has them (Agarwal et al. 2021), by scipy and numpy."""

import numpy as np
from scipy import stats


def interquartile_mean(values: np.ndarray) -> float:
    """The mean of the middle half of all values."""
    return float(stats.trim_mean(np.ravel(values), 0.25))


def mean_interval(values: np.ndarray, seed: int = 0, resamples: int = 2000) -> tuple[float, float]:
    """95 % percentile-bootstrap interval of the mean of values `[episodes]`, or of runs' values `[runs, episodes]`.

    Of runs, both the runs and the episodes, which are the same for all runs, are drawn anew. Raises `ValueError` for
    fewer than two episodes.
    """
    table = np.atleast_2d(values)
    if table.shape[1] < 2:
        raise ValueError(f"an interval needs at least 2 episodes, got {table.shape[1]}")
    generator, means = np.random.default_rng(seed), np.empty(resamples)
    for index in range(resamples):
        runs = generator.integers(table.shape[0], size=table.shape[0])
        episodes = generator.integers(table.shape[1], size=table.shape[1])
        weights = np.bincount(episodes, minlength=table.shape[1])
        means[index] = table[runs].mean(0) @ weights / table.shape[1]
    low, high = np.percentile(means, [2.5, 97.5])
    return float(low), float(high)


def paired_difference(ours: np.ndarray, theirs: np.ndarray) -> tuple[float, tuple[float, float]]:
    """Mean and 95 % interval of ours `[runs, episodes]` less theirs `[episodes]` on the same episodes."""
    difference = np.atleast_2d(ours) - theirs
    return float(difference.mean()), mean_interval(difference)
