"""Plans under a budget: exact allocation against enumeration, no rule or search better than it, nothing too big."""

from itertools import product

import numpy as np
import pytest

from agents.baselines import compression


def problem(seed: int, count: int = 4, choices: int = 4) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(seed)
    sizes = np.sort(generator.integers(5, 100, (count, choices)), axis=1)[:, ::-1].copy()
    gains = -np.sort(generator.random((count, choices)), axis=1)
    return sizes, gains


def gain(levels: np.ndarray, gains: np.ndarray) -> float:
    return float(gains[np.arange(len(gains)), levels].sum())


@pytest.mark.parametrize("seed", range(12))
def test_all_fit_and_none_is_better_than_the_exact_one(seed: int) -> None:
    sizes, gains = problem(seed)
    budget = 0.6 * sizes[:, 0].sum() + 0.4 * sizes[:, -1].sum()
    plans = [np.array(levels) for levels in product(range(4), repeat=4)]
    best = max(gain(levels, gains) for levels in plans if compression.size(levels, sizes) <= budget)
    assert gain(compression.exact(sizes, gains, budget), gains) == pytest.approx(best)
    searched = compression.random_search(
        lambda plans: np.array([gain(each, gains) for each in plans]), sizes, budget, 60
    )
    assert searched.quality == gain(searched.levels, gains)
    start = compression.greedy(sizes, gains, budget)
    climbed = compression.local_search(lambda levels: gain(levels, gains), start, sizes, budget, 60)
    assert climbed.quality >= gain(start, gains)
    for levels in (compression.uniform(sizes, budget), start, searched.levels, climbed.levels):
        assert compression.size(levels, sizes) <= budget
        assert gain(levels, gains) <= best + 1e-9


def test_by_hand() -> None:
    sizes = np.array([[100, 10], [100, 50]])
    gains = np.array([[0.0, -1.0], [0.0, -0.1]])
    np.testing.assert_array_equal(compression.uniform(sizes, 120), [1, 1])
    np.testing.assert_array_equal(compression.greedy(sizes, gains, 150), [0, 1])
    np.testing.assert_array_equal(compression.exact(sizes, gains, 150), [0, 1])
    np.testing.assert_array_equal(compression.exact(sizes, gains, 149), [1, 0])
    assert compression.size(np.array([1, 0]), sizes) == 110


def test_a_budget_that_nothing_fits_is_named() -> None:
    sizes, gains = problem(0)
    for call in (
        compression.uniform,
        lambda s, b: compression.greedy(s, gains, b),
        lambda s, b: compression.exact(s, gains, b),
    ):
        with pytest.raises(ValueError, match=f"the smallest plan takes {sizes.min(1).sum()}"):
            call(sizes, 3)


def test_searches_are_repeatable_and_count() -> None:
    sizes, gains = problem(3)
    calls: list[bytes] = []

    def score(levels: np.ndarray) -> float:
        calls.append(levels.tobytes())
        return gain(levels, gains)

    def scores(plans: np.ndarray) -> np.ndarray:
        return np.array([score(levels) for levels in plans])

    first = compression.random_search(scores, sizes, 250, 20, seed=1)
    assert first.evaluations == len(calls) == 20
    assert len(set(calls)) > 10
    second = compression.random_search(scores, sizes, 250, 20, seed=1)
    np.testing.assert_array_equal(first.levels, second.levels)
    calls.clear()
    climbed = compression.local_search(score, compression.uniform(sizes, 250), sizes, 250, 15)
    assert climbed.evaluations == len(calls) == len(set(calls)) == 15


def test_all_plans_are_all_that_differ() -> None:
    sizes = np.array([[9, 5, 5], [7, 6, 2]])
    assert compression.all_plans(sizes).tolist() == [[0, 0], [0, 1], [0, 2], [1, 0], [1, 1], [1, 2]]
