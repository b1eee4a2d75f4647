"""Statistics and fronts against numbers worked out by hand."""

import numpy as np
import pytest

from benchmarks.results import pareto
from benchmarks.results.statistics import (
    bootstrap_interval,
    iqm,
    mean_interval,
    normalized_score,
    paired_difference,
    probability_of_improvement,
)


def test_interquartile_mean_ignores_the_outer_quarters() -> None:
    assert iqm(np.array([-1000.0, 1, 2, 3, 4, 5, 6, 1000])) == 3.5


def test_bootstrap_draws_runs_within_each_task() -> None:
    tasks = np.array([0.0, 10.0]) + np.zeros((5, 1))  # runs are alike, tasks are far apart: nothing is uncertain
    assert bootstrap_interval(tasks) == (5, 5)
    runs = np.arange(8.0)[:, None]  # mean 3.5, standard deviation of the mean of drawn ones 2.291 / sqrt(8)
    low, high = bootstrap_interval(runs, lambda scores: float(scores.mean()), resamples=20_000)
    assert (3.5 - low, high - 3.5) == (pytest.approx(1.96 * 0.81, rel=0.05), pytest.approx(1.96 * 0.81, rel=0.05))
    assert np.isnan(bootstrap_interval(runs[:1])).all()


def test_probability_of_improvement_counts_pairs() -> None:
    ours, theirs = np.array([[1.0, 5.0], [3.0, 5.0]]), np.array([[2.0, 5.0]])
    assert probability_of_improvement(ours, theirs) == pytest.approx((0.5 + 0.5) / 2)
    assert probability_of_improvement(ours[:, :1], np.array([[0.0], [4.0]])) == 0.5


def test_normalized_score_is_0_at_the_baseline_and_1_at_the_bound() -> None:
    assert normalized_score(np.array([0.7, 0.8, 0.9]), 0.7, 0.9) == pytest.approx([0, 0.5, 1])
    assert np.isnan(normalized_score(0.7, 0.7, 0.7))


def test_interval_of_a_mean_has_the_size_of_its_standard_error() -> None:
    values = np.random.default_rng(1).normal(3, 1, size=10_000)
    low, high = mean_interval(values)
    assert low < values.mean() < high
    assert (high - low) / 2 == pytest.approx(1.96 / 100, rel=0.1)
    assert mean_interval(values) == (low, high)


def test_runs_that_differ_widen_the_interval() -> None:
    episodes = np.random.default_rng(1).normal(size=1000)
    alike, apart = np.stack([episodes] * 5), np.stack([episodes + shift for shift in (-1, -0.5, 0, 0.5, 1)])
    narrow, wide = ((high - low) / 2 for low, high in map(mean_interval, (alike, apart)))
    t, sd = 2.776, np.std([-1, -0.5, 0, 0.5, 1], ddof=1)  # Student's t for 4 degrees of freedom
    assert narrow == pytest.approx(t * episodes.std(ddof=1) / np.sqrt(1000), rel=1e-3)
    assert wide == pytest.approx(t * np.sqrt(sd**2 / 5 + episodes.var(ddof=1) / 1000), rel=1e-3)
    with pytest.raises(ValueError, match="2 episodes"):
        mean_interval(np.array([1.0]))


def test_pairing_removes_what_episodes_share() -> None:
    hard = np.random.default_rng(1).normal(size=500)
    difference, (low, high) = paired_difference(np.stack([hard + 0.1, hard + 0.3]), hard)
    assert difference == pytest.approx(0.2)
    assert high - low == pytest.approx(2 * 12.706 * 0.1, rel=1e-3)  # t of 1 degree of freedom, standard error 0.1
    assert paired_difference(hard + 0.1, hard)[1] == (pytest.approx(0.1), pytest.approx(0.1))


def test_front_and_hypervolume() -> None:
    points = np.array([[0.5, 0.8], [1.0, 0.9], [1.0, 0.7], [0.5, 0.8]])
    assert pareto.front(points[:3]).tolist() == [True, True, False]
    expected = (2.0 - 0.5) * 0.8 + (2.0 - 1.0) * 0.1
    assert pareto.hypervolume(points, (2.0, 0.0)) == pytest.approx(expected)


def test_tasks_of_one_training_are_drawn_together() -> None:
    """Six tasks that say the same are one: drawn apart, the interval would be 6 ** 0.5 times narrower."""
    one = np.random.default_rng(0).normal(size=(10, 1))
    six = one.repeat(6, axis=1)
    low, high = bootstrap_interval(six, np.mean, trainings=["a"] * 6)
    assert (low, high) == pytest.approx(bootstrap_interval(one, np.mean), abs=0.05)
    apart = bootstrap_interval(six, np.mean)
    assert (high - low) / (apart[1] - apart[0]) == pytest.approx(6**0.5, rel=0.1)
    assert bootstrap_interval(six, np.mean, trainings=range(6)) == apart
