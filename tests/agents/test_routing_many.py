"""Baselines, bound, learners and deployed routers on a bundle of 12 experts."""

from itertools import combinations
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch

from agents import PPO
from agents.baselines import routing
from agents.baselines.routing_bound import best_pool
from agents.deploy.routing import RoutedMoE
from agents.evaluate import evaluate
from experts import data
from experts.bundle import Bundle

ID = "moe_envs:MoERouting-v0"


def test_the_bound_is_above_all_baselines(twelve: Bundle) -> None:
    kwargs: dict[str, Any] = {"bundle": str(twelve.path), "cost_weight": 0.2}
    policies = routing.baselines(ID, **kwargs, episodes=100) | {"bound": routing.bound(ID, **kwargs)}
    assert {"gate top-1", "gate top-2", "top-p", "batch pool (kNN)", "plan (estimates)"} < set(policies)
    assert "gate top-3" not in policies
    found = {
        name: float(evaluate(policy, ID, 200, split="test", **kwargs)["return"].mean())
        for name, policy in policies.items()
    }
    assert max(found, key=lambda name: found[name]) == "bound"
    assert found["random"] < found["gate top-1"] < found["plan (estimates)"]
    top_2 = evaluate(policies["gate top-2"], ID, 1000, split="rl_train", **kwargs)
    assert top_2["cost"].mean() == pytest.approx(1.0, abs=0.02)


def test_pools_of_the_baselines_have_at_most_three_experts(twelve: Bundle) -> None:
    problem = routing.RoutingProblem(ID, bundle=str(twelve.path))
    planner = routing.Planner(problem, problem.gate, problem.singles)
    returns = planner.pool_returns(validation=True)
    assert returns.shape == (routing.POOL_BATCHES, 12 + 66 + 220)
    tables, pool = problem.validation, int(problem.pools[100])
    inside = [expert for expert in range(12) if pool >> expert & 1]
    inputs = tables.batch(7)[:-1]
    chosen = np.array(inside)[planner.gains[1][inputs][:, inside].argmax(1)]
    split = tables.outcomes(inputs)[np.arange(32), tables.column(1 << chosen)] / 32
    price = problem.slope[tables.column(1 << chosen)].sum() + problem.fixed[tables.column(1 << np.unique(chosen))].sum()
    assert returns[7, 100] == pytest.approx(split.sum() - price, abs=1e-6)


@pytest.mark.parametrize("weight", [0.0, 0.02, 0.2, 2.0])
def test_the_bound_takes_the_best_of_all_pools(weight: float) -> None:
    """Of 9 experts, against all 511 pools; at the last weight, no expert pays and the cheapest loss is taken."""
    generator = np.random.default_rng(0)
    pools = [list(pool) for size in range(1, 10) for pool in combinations(range(9), size)]
    for _ in range(30):
        gain = (generator.random((12, 9)) < 0.4) / 12 - weight * generator.random(9) / 24
        price = weight * generator.random(9)
        values = [gain[:, pool].max(1).sum() - price[pool].sum() for pool in pools]
        found = best_pool(gain, price)
        assert gain[:, found].max(1).sum() - price[found].sum() == pytest.approx(max(values), abs=1e-12)


def test_the_plan_is_deployed_as_the_rule_that_it_is(twelve: Bundle) -> None:
    kwargs = {"bundle": str(twelve.path), "cost_weight": 0.1}
    problem = routing.RoutingProblem(ID, 10, "estimates", **kwargs)
    rule = routing.Baseline(routing._plan(problem, 0.0), problem, single=True)
    rows, chosen = played(rule, kwargs)
    routed = RoutedMoE(twelve, "plan", kwargs)
    with torch.inference_mode():
        x = torch.from_numpy(data.load("digits")["test"][0][rows.ravel()])
        members = routed.route(x, routed.gate(routed.trunk(x))).numpy()
        worth = torch.rand(5, 32, 12)
        whole, parts = (routed._plan(worth), torch.cat([routed._plan(each[None]) for each in worth]))
    assert (members.argmax(1) == chosen.ravel()).mean() > 0.999
    assert len(np.unique(chosen)) > 2
    torch.testing.assert_close(whole, parts)


def test_an_equivariant_policy_is_trained_and_deployed(twelve: Bundle) -> None:
    kwargs = {"bundle": str(twelve.path), "cost_weight": 0.1}
    policy = PPO(
        "MlpPolicy", ID, env_kwargs=kwargs, n_envs=16, n_steps=32, n_epochs=3,
        policy_kwargs={"equivariant": True, "residual": True},
    ).learn(2_000)  # fmt: skip
    rows, chosen = played(policy, kwargs)
    routed = RoutedMoE(twelve, policy, kwargs)
    with torch.inference_mode():
        x = torch.from_numpy(data.load("digits")["test"][0][rows.ravel()])
        members = routed.route(x, routed.gate(routed.trunk(x))).numpy()
        assert routed(x).shape == (len(x), 10)
    assert (members.argmax(1) == chosen.ravel()).mean() > 0.999
    moved = policy.on(ID, {"bundle": "digits"})  # from 12 experts to 8
    assert moved.predict(np.zeros((2, *moved.rows.observation_space.shape), dtype=np.float32))[0].shape == (2,)


def played(policy: Any, kwargs: dict[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    """Inputs of 50 test batches and the experts that a policy chooses for them, `[50, 32]` each."""
    env: Any = gymnasium.make_vec(ID, 50, vectorization_mode="vector_entry_point", **kwargs, split="test").unwrapped
    observation, _ = env.reset(seed=0)
    rows, chosen = np.array([env.tables.batch(batch)[:-1] for batch in env.batch]), []
    for _ in range(32):
        action, _ = policy.predict(observation, deterministic=True)
        chosen.append(action)
        observation, *_ = env.step(action)
    return rows, np.transpose(chosen)
