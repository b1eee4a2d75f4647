"""Baselines for the choice of compression levels under a budget: plans by rule, by search, and by exact allocation.

A plan is a level for each of P matrices, out of L. `sizes [P, L]` are bytes, `gains [P, L]` what each matrix alone adds
to the quality at each level; `budget` is for the matrices together. Where nothing fits, `ValueError` says what would.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp

Score = Callable[[np.ndarray], float]


class Found(NamedTuple):
    """Levels `[P]`, their quality as far as it was evaluated, and how many plans were evaluated for it."""

    levels: np.ndarray
    quality: float
    evaluations: int


def size(levels: np.ndarray, sizes: np.ndarray) -> int:
    """The bytes of a plan."""
    return int(np.take_along_axis(sizes, levels[:, None], axis=1).sum())


def uniform(sizes: np.ndarray, budget: float) -> np.ndarray:
    """The same level for all, the first that fits."""
    _check(sizes, budget)
    level = int((sizes.sum(0) <= budget).argmax())
    return np.full(len(sizes), level)


def greedy(sizes: np.ndarray, gains: np.ndarray, budget: float) -> np.ndarray:
    """From the first level of all, again and again the change of one matrix to a smaller form that loses least for each
    byte that it saves."""
    _check(sizes, budget)
    levels, places = np.zeros(len(sizes), dtype=np.int64), np.arange(len(sizes))
    while (total := size(levels, sizes)) > budget:
        saved = (sizes[places, levels][:, None] - sizes).astype(np.float64)
        lost = gains[places, levels][:, None] - gains
        ratio = np.where(saved > 0, lost / np.maximum(np.minimum(saved, total - budget), 1), np.inf)
        row, level = np.unravel_index(int(ratio.argmin()), ratio.shape)
        levels[row] = level
    return levels


def exact(sizes: np.ndarray, gains: np.ndarray, budget: float) -> np.ndarray:
    """The plan with the largest sum of gains that fits, by integer programming (HiGHS)."""
    _check(sizes, budget)
    count, choices = sizes.shape
    one_each = LinearConstraint(np.kron(np.eye(count), np.ones(choices)), 1, 1)
    fits = LinearConstraint(sizes.reshape(1, -1).astype(np.float64), -np.inf, budget)
    found = milp(-gains.ravel(), integrality=np.ones(sizes.size), bounds=Bounds(0, 1), constraints=[one_each, fits])
    if found.x is None:
        raise ValueError(f"no plan was found for {budget:,.0f} bytes: {found.message}")
    return np.asarray(found.x.reshape(sizes.shape).argmax(1))


def random_search(
    scores: Callable[[np.ndarray], np.ndarray], sizes: np.ndarray, budget: float, evaluations: int, seed: int = 0
) -> Found:
    """The best of random plans that fit: levels are drawn matrix by matrix, in random order, of those that leave enough
    for the rest. `scores` takes all plans `[n, P]` at once."""
    _check(sizes, budget)
    generator, least = np.random.default_rng(seed), sizes.min(1)
    plans = np.zeros((evaluations, len(sizes)), dtype=np.int64)
    for levels in plans:
        left, rest = float(budget), float(least.sum())
        for row in generator.permutation(len(sizes)):
            rest -= float(least[row])
            levels[row] = generator.choice((sizes[row] + rest <= left).nonzero()[0])
            left -= float(sizes[row, levels[row]])
    found = scores(plans)
    return Found(plans[found.argmax()], float(found.max()), evaluations)


def local_search(
    score: Score, start: np.ndarray, sizes: np.ndarray, budget: float, evaluations: int, seed: int = 0
) -> Found:
    """Hill climbing from a plan: one matrix, or two at once, get other levels; what fits and is better is kept."""
    generator = np.random.default_rng(seed)
    best, known = Found(start.copy(), score(start), 1), {start.tobytes()}
    done = tries = 1
    while done < evaluations and tries < 100 * evaluations:
        tries += 1
        levels = best.levels.copy()
        rows = generator.choice(len(sizes), size=min(len(sizes), int(generator.integers(1, 3))), replace=False)
        levels[rows] = np.clip(levels[rows] + generator.integers(-3, 4, size=len(rows)), 0, sizes.shape[1] - 1)
        if size(levels, sizes) > budget or levels.tobytes() in known:
            continue
        known.add(levels.tobytes())
        done += 1
        if (quality := score(levels)) > best.quality:
            best = Found(levels, quality, done)
    return best._replace(evaluations=done)


def all_plans(sizes: np.ndarray) -> np.ndarray:
    """Every plan `[n, P]`, levels that take a matrix's bytes no further left out: they are the same form."""
    distinct = [np.append(0, np.diff(row).nonzero()[0] + 1) for row in sizes]
    return np.stack([each.ravel() for each in np.meshgrid(*distinct, indexing="ij")], axis=1)


def _check(sizes: np.ndarray, budget: float) -> None:
    least = int(sizes.min(1).sum())
    if budget < least:
        raise ValueError(f"a budget of {budget:,.0f} bytes: the smallest plan takes {least:,}")
