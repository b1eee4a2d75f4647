"""Baselines for compression levels under a budget: rules, searches and exact allocation.

A plan assigns one of L levels to each of P matrices. `sizes [P, L]` are bytes, `gains [P, L]` the quality change of
each matrix alone at each level; `budget` is in bytes for all matrices. `ValueError` names the least size if nothing
fits.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import TYPE_CHECKING, Any, NamedTuple

import gymnasium
import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp

if TYPE_CHECKING:
    from moe_envs.compression import MoECompressionVectorEnv
    from moe_envs.compression.tables import CompressionTables

Score = Callable[[np.ndarray], float]


class SearchedPlan(NamedTuple):
    """Levels `[P]`, their quality if evaluated, and the number of evaluated plans."""

    levels: np.ndarray
    quality: float
    evaluations: int


def size(levels: np.ndarray, sizes: np.ndarray) -> int:
    """Size of a plan in bytes."""
    return int(np.take_along_axis(sizes, levels[:, None], axis=1).sum())


def uniform(sizes: np.ndarray, budget: float) -> np.ndarray:
    """First level that fits when used for all matrices."""
    _check(sizes, budget)
    level = int((sizes.sum(0) <= budget).argmax())
    return np.full(len(sizes), level)


def greedy(sizes: np.ndarray, gains: np.ndarray, budget: float) -> np.ndarray:
    """Start at the first level and repeatedly compress the matrix with the least quality loss per byte saved."""
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
    """Feasible plan with the largest sum of gains, by integer programming (HiGHS)."""
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
) -> SearchedPlan:
    """Best of random feasible plans: levels are drawn matrix by matrix in random order from those that leave enough
    bytes for the rest. `scores` takes all plans `[n, P]` at once."""
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
    return SearchedPlan(plans[found.argmax()], float(found.max()), evaluations)


def local_search(
    score: Score, start: np.ndarray, sizes: np.ndarray, budget: float, evaluations: int, seed: int = 0
) -> SearchedPlan:
    """Hill climbing from a plan: change the level of one or two matrices; keep better feasible plans."""
    generator = np.random.default_rng(seed)
    best, known = SearchedPlan(start.copy(), score(start), 1), {start.tobytes()}
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
            best = SearchedPlan(levels, quality, done)
    return best._replace(evaluations=done)


def all_plans(sizes: np.ndarray) -> np.ndarray:
    """All plans `[n, P]`, without levels that do not reduce the size of a matrix, since these have the same form."""
    distinct = [np.append(0, np.diff(row).nonzero()[0] + 1) for row in sizes]
    return np.stack([each.ravel() for each in np.meshgrid(*distinct, indexing="ij")], axis=1)


def _check(sizes: np.ndarray, budget: float) -> None:
    least = int(sizes.min(1).sum())
    if budget < least:
        raise ValueError(f"a budget of {budget:,.0f} bytes: the smallest plan takes {least:,}")


RULES = ("uniform", "greedy", "exact on sensitivities", "random search", "exact, then local search")
SEARCHES = RULES[3:]
EVALUATIONS = 400  # per search, model and budget
MOST_PLANS = 200_000  # largest number of plans that a bound evaluates


def find_plan(name: str, tables: CompressionTables, model: int, room: float, evaluations: int, seed: int) -> np.ndarray:
    """Levels `[U]` that a rule of `RULES` selects for a model of the tables within `room` bytes for matrices."""
    sizes, gains = tables.sizes, tables.gains[model]

    def scores(plans: np.ndarray) -> np.ndarray:
        return tables.quality(np.full(len(plans), model), plans)[0]

    if name == "uniform":
        return uniform(sizes, room)
    if name == "greedy":
        return greedy(sizes, gains, room)
    if name == "random search":
        return random_search(scores, sizes, room, evaluations, seed).levels
    best = exact(sizes, gains, room)
    if name == "exact on sensitivities":
        return best
    return local_search(lambda levels: float(scores(levels[None])[0]), best, sizes, room, evaluations, seed).levels


class Planned:
    """Rule as a policy: at the start of each walk, `plan` of tables, model and bytes selects the levels; plans are
    cached by model and budget."""

    def __init__(self, plan: Callable[[CompressionTables, int, float], np.ndarray], kind: str = "baseline") -> None:
        self.plan, self.kind = plan, kind

    def watch(self, env: MoECompressionVectorEnv) -> None:
        """Attach to a vector environment."""
        self._env, self._plans = env, np.zeros_like(env.levels)
        self._made: dict[tuple[int, int], np.ndarray] = {}

    def predict(
        self, observation: np.ndarray, state: Any = None, episode_start: Any = None, deterministic: bool = True
    ) -> tuple[np.ndarray, Any]:
        """Planned levels `[n]`."""
        env, place = self._env, self._env.place
        for row in (place == 0).nonzero()[0]:
            key = int(env.model[row]), int(env.budget[row])
            if key not in self._made:
                self._made[key] = self.plan(env.tables, key[0], key[1] - env.tables.overhead)
            self._plans[row] = self._made[key]
        return self._plans[np.arange(len(place)), np.minimum(place, self._plans.shape[1] - 1)], state


def baselines(
    env_id: str,
    *,
    report: Callable[[float], object] = lambda share: None,
    evaluations: int = EVALUATIONS,
    **env_kwargs: Any,
) -> dict[str, Any]:
    """Uniform levels, greedy and exact allocation on sensitivities; for a fixed budget also two searches with
    `evaluations` evaluations each, on the training images of the environment."""
    tables = _tables(env_id, {**env_kwargs, "split": "train"})
    names = RULES if env_kwargs.get("budget") is not None else RULES[:3]
    found: dict[str, Any] = {}
    for number, name in enumerate(names):
        known: dict[tuple[int, float], np.ndarray] = {}

        def plan(
            _: CompressionTables, model: int, room: float, name: str = name, known: dict[Any, Any] = known
        ) -> np.ndarray:
            if (model, room) not in known:
                known[model, room] = find_plan(name, tables, model, room, evaluations, 0)
            return np.asarray(known[model, room])

        found[name] = Planned(plan)
        report((number + 1) / len(names))
    return found


def bound(env_id: str, **env_kwargs: Any) -> Planned | None:
    """Best of all plans on the evaluation images; None if there are more than 200,000 plans."""
    tables = _tables(env_id, env_kwargs)
    if np.prod([float(len(np.unique(row))) for row in tables.sizes]) > MOST_PLANS:
        return None
    plans = all_plans(tables.sizes)
    used = np.take_along_axis(tables.sizes.T, plans, axis=0).sum(1)

    @cache
    def quality(model: int) -> np.ndarray:
        return score_all(tables, model, plans)

    def best(_: CompressionTables, model: int, room: float) -> np.ndarray:
        return np.asarray(plans[np.where(used <= room, quality(model), -np.inf).argmax()])

    return Planned(best, kind="bound")


def score_all(tables: CompressionTables, model: int, plans: np.ndarray) -> np.ndarray:
    """Quality of plans `[n, U]` for a model of the tables."""
    parts = np.array_split(plans, max(1, len(plans) // 500))
    return np.concatenate([tables.quality(np.full(len(part), model), part)[0] for part in parts])


def _tables(env_id: str, env_kwargs: dict[str, Any]) -> CompressionTables:
    env: Any = gymnasium.make_vec(env_id, 1, vectorization_mode="vector_entry_point", **env_kwargs).unwrapped
    tables: CompressionTables = env.tables
    return tables
