"""Schedules of MoEMetaOpt-v0: shapes by hand, rates really set, a search that finds a better one."""

from typing import Any

import gymnasium
import numpy as np
import pytest

from agents.baselines import metaopt
from agents.baselines.metaopt import Heuristic, Plateau, RandomActions, Rates, Round, Schedule, search, trainings


def test_shapes_by_hand() -> None:
    progress = np.array([0, 0.3, 0.5, 1])
    np.testing.assert_allclose(metaopt.constant(progress), 1)
    np.testing.assert_allclose(metaopt.linear(progress), [1, 0.7, 0.5, 0])
    np.testing.assert_allclose(metaopt.cosine(progress), [1, (1 + np.cos(0.3 * np.pi)) / 2, 0.5, 0], atol=1e-12)
    np.testing.assert_allclose(metaopt.one_cycle(progress)[[0, 1, 3]], [1 / 25, 1, 1e-4])


def rates(policy: Any, steps: int, **kwargs: Any) -> np.ndarray:
    """The gate's learning rates over some decisions, `[steps, rows]`."""
    env: Any = gymnasium.make_vec(metaopt.ID, 2, "vector_entry_point", steps_per_action=1, **kwargs)
    policy.watch(env.unwrapped)
    observation, _ = env.reset(seed=0)
    found = []
    for _ in range(steps):
        actions, _ = policy.predict(observation)
        observation, _, _, _, infos = env.step(actions)
        found.append(infos["meta/gate_rate"])
    return np.array(found)


def test_the_rates_are_those_of_the_schedule() -> None:
    settings = Rates(np.array([0.02, 0.01]), np.array([0, 3]))
    found = rates(Schedule(metaopt.linear, settings), 5, max_actions=10)
    np.testing.assert_allclose(found, np.outer([1, 0.9, 0.8, 0.7, 0.6], [0.02, 0.02]))
    drawn = rates(Schedule(metaopt.constant), 3)
    assert (drawn == drawn[0]).all()
    assert drawn[0, 0] != drawn[0, 1]


def test_a_plateau_halves_the_rates() -> None:
    found = rates(Plateau(settings=Rates(np.array([1e-5 * 8, 1e-5 * 8]), np.array([5, 5]))), 12, scales=(1e-3, 1e-3))
    assert set(np.round(found.ravel() / 1e-5, 6)) <= {8.0, 4.0, 2.0, 1.0}
    stuck = Plateau()
    stuck.watch(gymnasium.make_vec(metaopt.ID, 1, "vector_entry_point").unwrapped)  # type: ignore[arg-type]
    stuck.env.reset(seed=0)
    none = np.array([False])
    factors = [stuck.factor(np.array([True])).item(), *(stuck.factor(none).item() for _ in range(6))]
    assert factors == [1, 1, 1, 0.5, 0.5, 0.5, 0.25]


def test_trainings_are_one_a_seed_and_the_same_for_all() -> None:
    frame = trainings(Schedule(settings=Rates(np.array([0.02, 0.02]), np.array([3, 3]))), [5, 5, 6], "test", target=0.9)
    assert len(frame) == 3
    assert frame["steps"][0] == frame["steps"][1]
    assert frame["arrived"].all()
    hopeless = trainings(RandomActions(), [1, 2], "test", target=1.1, max_actions=3, steps_per_action=1)
    assert (hopeless["steps"] == 4).all()
    assert not hopeless["arrived"].any()
    ruled = trainings(Heuristic(), [1, 2], "validation", max_actions=6)
    assert (ruled["meta/gate_rate"] <= ruled["meta/experts_rate"] / 2 + 1e-12).all()


@pytest.mark.parametrize("groups", [False, True])
def test_a_search_finds_what_is_better_than_the_first(groups: bool) -> None:
    kwargs: dict[str, Any] = {"max_actions": 12, "target": 0.9}
    make = metaopt.SCHEDULES["constant"]
    best, steps, decisions = search(make, groups, [Round(12, 2), Round(3, 4)], **kwargs)
    assert 12 * 2 + 3 * 4 <= decisions <= 12 * (12 * 2 + 3 * 4)
    assert groups or best.rates[0] == best.rates[1]
    assert best.rates.shape == (2,)
    judged = trainings(make(best), range(4), "validation", **kwargs)
    assert judged["steps"].mean() == steps < 9
