"""Baselines do what they are named for; the bound is exact."""

from itertools import product
from typing import Any

import gymnasium
import numpy as np
import pytest

from agents.baselines import routing
from agents.evaluate import Policy, evaluate

ID = "moe_envs:MoERouting-v0"
KWARGS: dict[str, Any] = {"bundle": "digits", "cost_weight": 0.3}


@pytest.fixture(scope="module")
def tuned() -> dict[str, Policy]:
    return routing.baselines(ID, episodes=200, **KWARGS) | {"oracle": routing.bound(ID, **KWARGS)}


def returns(policy: Any, split: str = "test", **kwargs: Any) -> float:
    return float(evaluate(policy, ID, 500, split=split, **(KWARGS | kwargs))["return"].mean())


def test_every_family_is_there(tuned: dict[str, Any]) -> None:
    scored = {
        f"{rule} ({name})"
        for rule, name in product(("greedy", "fixed pool", "batch pool"), ("gate", "kNN", "predictor"))
    }
    scored |= {"greedy (estimates)", "plan (estimates)"}
    plain = {"random", "top-p", "confidence threshold", "pool by batch gate", "oracle"}
    assert set(tuned) == scored | plain | {f"gate top-{m}" for m in range(1, 9)}
    assert [name for name, policy in tuned.items() if policy.kind == "bound"] == ["oracle"]


def test_the_bound_is_above_all_and_random_below_the_tuned(tuned: dict[str, Any]) -> None:
    found = {name: returns(policy) for name, policy in tuned.items()}
    assert max(found, key=lambda name: found[name]) == "oracle"
    assert found["random"] < found["gate top-1"] < found["batch pool (kNN)"] < found["plan (estimates)"]


def test_gate_top_m_runs_m_experts_and_costs_what_the_top_m_action_costs(tuned: dict[str, Any]) -> None:
    class TopM:
        env_kwargs = {"action": "top-m"}

        def __init__(self, m: int) -> None:
            self.m = m

        def predict(self, observation: np.ndarray, **_: Any) -> tuple[np.ndarray, None]:
            return np.full(len(observation), self.m - 1), None

    for m in (1, 2, 8):
        assert returns(tuned[f"gate top-{m}"]) == pytest.approx(returns(TopM(m)), abs=1e-12)


def test_actions_are_the_environment_s_own_where_it_can_express_them(tuned: dict[str, Any]) -> None:
    env = gymnasium.make(ID, **KWARGS, observation="features")
    observation, _ = env.reset(seed=0)
    for name in ("random", "gate top-1", "fixed pool (gate)", "greedy (kNN)"):
        action, _ = tuned[name].predict(observation)
        assert tuned[name].env_kwargs == {"observation": "features"}
        assert env.action_space.contains(action), name
    assert tuned["gate top-3"].env_kwargs == {"observation": "features", "action": "subset"}
    subsets = gymnasium.make(ID, **KWARGS, action="subset")
    action, _ = tuned["gate top-3"].predict(observation)
    assert subsets.action_space.contains(action)
    assert action.sum() == 3


def test_the_plan_is_the_best_of_all_plans() -> None:
    """Of two inputs, against all 256^2 pairs of subsets."""
    for size, choices in ((2, range(256)),):
        env = gymnasium.make_vec(
            ID, 1, vectorization_mode="vector_entry_point", **KWARGS, action="subset", batch_size=size
        ).unwrapped
        oracle = routing.Oracle()
        oracle.watch(env)  # type: ignore[arg-type]
        tables = env.tables  # type: ignore[attr-defined]
        for batch in range(5):
            inputs = tables.batch(batch)[:-1]
            correct, weight = tables.outcomes(inputs), KWARGS["cost_weight"]
            gain = correct / size - weight * tables.slope[:, 0]
            pairs = np.array(list(product(choices, repeat=size)))
            union = np.bitwise_or.reduce(pairs, axis=1)
            values = gain[np.arange(size), pairs].sum(1) - weight * tables.fixed[union, 0]
            plan = oracle.plan(inputs)
            union_of_plan = np.bitwise_or.reduce(plan)
            value = gain[np.arange(size), plan].sum() - weight * tables.fixed[union_of_plan, 0]
            assert value == pytest.approx(values.max(), abs=1e-12)


def test_greedy_prefers_experts_already_paid(tuned: dict[str, Any]) -> None:
    frame = evaluate(tuned["greedy (kNN)"], ID, 200, **KWARGS, split="test")
    assert (
        frame["routing/experts_used"].mean()
        < evaluate(tuned["gate top-1"], ID, 200, **KWARGS, split="test")["routing/experts_used"].mean()
    )


def test_only_routing_environments_are_taken() -> None:
    with pytest.raises(ValueError, match=r"CartPole-v1 is not a routing environment"):
        routing.baselines("CartPole-v1")


def test_top_p_takes_the_fewest_experts_that_reach_p() -> None:
    problem = routing.RoutingProblem(ID, **KWARGS)
    observation = np.zeros((1, problem.layout["progress"].slice.stop), dtype=np.float32)
    gate = np.array([0.5, 0.3, 0.1, 0.05, 0.02, 0.01, 0.01, 0.01])
    observation[:, problem.layout["gate_logits"].slice] = np.log(gate)
    for p, members in ((0.4, 1), (0.7, 0b11), (0.85, 0b111), (1.1, 255)):
        assert routing._top_p(problem, p)(observation).tolist() == [members]
