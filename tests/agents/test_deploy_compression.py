"""A policy's plan: within its budget, and what the environment's walk gave."""

from typing import Any

import gymnasium
import numpy as np
import pytest
from stable_baselines3 import PPO as SB3

from agents.deploy.compression import levels_of, plan_of
from agents.ppo import PPO

ID, MODEL = "moe_envs:MoECompression-v0", "digits-mlp"


def sb3() -> Any:
    return SB3("MlpPolicy", gymnasium.make(ID, model=MODEL, evaluation="additive"), n_steps=8, seed=0, device="cpu")


def ours() -> Any:
    return PPO(
        "MlpPolicy",
        ID,
        env_kwargs={"model": MODEL, "evaluation": "additive"},
        n_envs=2,
        n_steps=8,
        batch_size=16,
        seed=0,
    )


@pytest.mark.filterwarnings("ignore:.*mini-batch")
@pytest.mark.parametrize("make", [sb3, ours])
def test_a_plan_is_the_walk_of_its_policy(make: Any) -> None:
    policy = make()
    env = gymnasium.make(ID, model=MODEL, budget=20_000).unwrapped
    observation, _ = env.reset(seed=0)
    taken = []
    for _ in range(18):
        masks = {"action_masks": env.action_masks()} if make is ours else {}  # type: ignore[attr-defined]
        action, _ = policy.predict(observation, deterministic=True, **masks)
        observation, _, done, _, info = env.step(action)
        taken.append(info["compression/level"])
    assert done
    plan = plan_of(policy, MODEL, 20_000)
    assert list(plan.levels.values()) == taken
    assert plan.bytes == info["compression/bytes"] <= 20_000


def test_many_are_drawn_for_each_budget() -> None:
    found = levels_of(ours(), MODEL, [15_000, 40_000], deterministic=False, repeats=6)
    assert found.shape == (2, 6, 18)
    assert len(np.unique(found[0], axis=0)) == 6
