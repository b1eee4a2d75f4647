"""MoERouting-v0 on a bundle of 12 experts, which has the outcomes of single experts and pairs only."""

import copy
import pickle
import warnings
from collections.abc import Callable
from itertools import combinations
from typing import Any

import gymnasium
import numpy as np
import pytest
from gymnasium.error import InvalidAction
from gymnasium.utils.env_checker import check_env
from stable_baselines3.common.env_checker import check_env as sb3_check_env

from cost.profile import Profile
from experts.bundle import Bundle, subsets
from moe_envs.routing.moves import Moves, TabulatedMoves
from moe_envs.routing.planning import NUMBERS, plan_margins, pool_experts, pool_members

ID = "moe_envs:MoERouting-v0"
VECTOR = "vector_entry_point"

each_action = pytest.mark.parametrize("action", ["expert", "top-m"])
each_observation = pytest.mark.parametrize("observation", ["estimates", "features"])


def make(twelve: Bundle, **kwargs: Any) -> Any:
    return gymnasium.make(ID, bundle=str(twelve.path), **kwargs).unwrapped


def right(twelve: Bundle, code: int) -> np.ndarray:
    """Whether a subset classifies each input of rl_train correctly."""
    codes = subsets.tabulated(12)
    outcomes = np.unpackbits(twelve.split("rl_train").outcomes, axis=1, count=len(codes), bitorder="little")
    found: np.ndarray = outcomes[:, codes.tolist().index(code)]
    return found


def test_rewards_by_hand(twelve: Bundle) -> None:
    env, costs = make(twelve, batch_size=4, cost_weight=0.3), Profile.model_validate(twelve.profile).cost_model()
    env.reset(seed=0)
    batch, reference = env.batch_inputs(), env.vector.tables.reference
    for place, (expert, first) in enumerate(((11, True), (11, False), (2, True), (11, False))):
        _, reward, ended, _, info = env.step(expert)
        terms = costs.slope[expert] + first * costs.fixed[expert]
        np.testing.assert_allclose([info["cost/time"], info["cost/memory"], info["cost/energy"]], terms, rtol=1e-12)
        relative = np.mean(terms / [reference.time, reference.memory, reference.energy])
        quality = right(twelve, 1 << expert)[batch[place]] / 4
        assert reward == pytest.approx(quality - 0.3 * relative, rel=1e-12)
        assert info["routing/experts_used"] == 1 + (place >= 2)
    assert ended


def test_top_m_is_of_one_or_two_experts(twelve: Bundle) -> None:
    env, costs = make(twelve, action="top-m"), Profile.model_validate(twelve.profile).cost_model()
    assert env.action_space == gymnasium.spaces.Discrete(2)
    env.reset(seed=0)
    first, second = env.batch_inputs()[:2]
    gate = twelve.split("rl_train").gate_logits
    pair, other = (np.argsort(-gate[each], kind="stable")[:2].tolist() for each in (first, second))
    info = env.step(1)[4]
    assert info["cost/memory"] == pytest.approx((costs.fixed + costs.slope)[pair, 1].sum())
    assert info["reward/quality"] == right(twelve, sum(1 << each for each in pair))[first] / 32
    info, expert = env.step(0)[4], other[0]
    assert info["cost/memory"] == pytest.approx(costs.slope[expert, 1] + (expert not in pair) * costs.fixed[expert, 1])
    with pytest.raises(InvalidAction):
        env.step(2)


def test_subsets_are_refused(twelve: Bundle) -> None:
    with pytest.raises(ValueError, match=r"action='subset'.* 12 experts .*'expert', or 'top-m' of one or two experts"):
        make(twelve, action="subset")


@each_action
@each_observation
def test_both_checkers_are_silent(twelve: Bundle, action: str, observation: str) -> None:
    kwargs = {"action": action, "observation": observation, "batch_size": 8}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for render_mode in ("rgb_array", "ansi", None):
            check_env(make(twelve, **kwargs, render_mode=render_mode))
        sb3_check_env(make(twelve, **kwargs))


@each_action
@each_observation
@pytest.mark.parametrize("rows", [1, 3, 16])
def test_vector_equals_single(
    twelve: Bundle, action: str, observation: str, rows: int, assert_same: Callable[[Any, Any], None]
) -> None:
    kwargs = {"bundle": str(twelve.path), "action": action, "observation": observation, "batch_size": 8}
    native = gymnasium.make_vec(ID, rows, vectorization_mode=VECTOR, **kwargs)
    single = gymnasium.make_vec(ID, rows, vectorization_mode="sync", **kwargs)
    assert_same(native.reset(seed=11), single.reset(seed=11))
    native.action_space.seed(0)
    for _ in range(60):
        actions = native.action_space.sample()
        ours = native.step(actions)
        assert_same(ours, single.step(actions))
        assert native.observation_space.contains(ours[0])


@each_action
def test_copies_and_restored_states_go_on_alike(
    twelve: Bundle, action: str, assert_same: Callable[[Any, Any], None]
) -> None:
    env = make(twelve, action=action, batch_size=8)
    env.reset(seed=1)
    actions = np.random.default_rng(0).integers(env.action_space.n, size=8).tolist()
    for each in actions[:3]:
        env.step(each)
    state, twins = env.state(), (copy.deepcopy(env), pickle.loads(pickle.dumps(env)))
    wanted = [env.step(each) for each in actions[3:]], env.reset()
    for twin in twins:
        assert_same(([twin.step(each) for each in actions[3:]], twin.reset()), wanted)
    env.restore(state)
    assert_same(([env.step(each) for each in actions[3:]], env.reset()), wanted)


def test_the_plan_by_brute_force_over_pools_of_three(twelve: Bundle) -> None:
    env = make(twelve, batch_size=8, cost_weight=0.2)
    costs, parts = Profile.model_validate(twelve.profile).cost_model(), env.observation_layout
    fixed, slope = (8 * 0.2 * env.vector.tables.relative(*part.T) for part in (costs.fixed, costs.slope))
    pools = [pool for size in (1, 2, 3) for pool in combinations(range(12), size)]
    for seed in range(5):
        first, _ = env.reset(seed=seed)
        worth = twelve.in_batches("rl_train", env.batch_inputs()[None])[0] - slope
        returns = {pool: worth[:, pool].max(1).sum() - fixed[list(pool)].sum() for pool in pools}
        plan, detour = first[parts["plan"].slice], first[parts["detour"].slice]
        best = max(returns, key=returns.__getitem__)
        assert [*best] == (plan > 0).nonzero()[0].tolist() == (detour == 0).nonzero()[0].tolist()
        for expert in range(12):
            inside, outside = (max(v for p, v in returns.items() if (expert in p) == k) for k in (True, False))
            assert plan[expert] == pytest.approx(np.clip(inside - outside, -4, 4), abs=1e-4)


def test_pools_that_are_gone_through_in_parts_are_all_of_them() -> None:
    generator = np.random.default_rng(0)
    members = pool_members(12)
    worth, price = generator.random((200, 32, 12)), members @ generator.random(12)
    best = worth[:, :, pool_experts(12)].max(3).sum(1) - price
    margins = np.array([best[:, row].max(1) - best[:, ~row].max(1) for row in members.T]).T
    assert np.abs(margins).max() < 4  # none is clipped
    assert best.size * 32 > NUMBERS
    np.testing.assert_allclose(plan_margins(worth, price), margins, atol=1e-4)
    assert [np.unique(each).tolist() for each in pool_experts(12)] == [row.nonzero()[0].tolist() for row in members]


@pytest.mark.parametrize("edges", [None, np.random.default_rng(1).dirichlet(np.ones(6), size=6).astype(np.float32)])
def test_moves_that_are_worked_out_are_those_of_the_tables(edges: np.ndarray | None) -> None:
    generator = np.random.default_rng(0)
    fixed, slope = generator.random((2, 64, 8))
    prices = generator.random(6), generator.random(6)
    parts = np.arange(1, 64), np.arange(64), fixed, slope, edges, prices, 6
    worked, tabulated = Moves(*parts), TabulatedMoves(*parts)
    unpaid, option = generator.integers(64, size=500), generator.integers(63, size=500)
    ours, wanted = worked.pay(unpaid, option), tabulated.pay(tabulated.ledger_of(unpaid), option)  # type: ignore[arg-type]
    np.testing.assert_array_equal(ours[0], wanted[0])
    np.testing.assert_array_equal(ours[1], tabulated.unpaid_of(wanted[1]))  # type: ignore[arg-type]
    np.testing.assert_array_equal(ours[3], wanted[3])
    seen = [each.view(np.float32).reshape(500, -1) for each in (ours[2], wanted[2])]
    np.testing.assert_allclose(*seen, rtol=1e-6)
    np.testing.assert_array_equal(seen[0][:, :6], seen[1][:, :6])
    assert [row.tolist() for row in map(worked.rows().__getitem__, ours[1][:20].tolist())] == seen[0][:20].tolist()
