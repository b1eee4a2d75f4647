"""The environments as MO-Gymnasium has them."""

import mo_gymnasium
import numpy as np
import pytest
from gymnasium.utils.env_checker import data_equivalence
from mo_gymnasium.wrappers import LinearReward, MORecordEpisodeStatistics
from mo_gymnasium.wrappers.vector import MOSyncVectorEnv

import moe_envs

SPECS = [spec for spec in moe_envs.SPECS.values() if not spec.nondeterministic]
each_spec = pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.id)


@each_spec
def test_rewards_are_vectors_in_their_space(spec: moe_envs.Spec) -> None:
    env, again = (mo_gymnasium.make(spec.multi_objective_id, **spec.small) for _ in range(2))
    assert env.unwrapped.reward_space.shape == (4,)
    for each in (env, again):
        each.reset(seed=3)
        each.action_space.seed(3)
    rewards = []
    for _ in range(40):
        both = [each.step(each.action_space.sample()) for each in (env, again)]
        assert data_equivalence(both[0][1], both[1][1])
        observation, reward, terminated, truncated, info = both[0]
        assert env.observation_space.contains(observation)
        assert env.unwrapped.reward_space.contains(reward)
        assert reward == pytest.approx(info["vector_reward"])
        rewards.append(reward)
        if terminated or truncated:
            env.reset(), again.reset()
    assert np.std(rewards, axis=0)[0] > 0


@each_spec
def test_weighted_it_is_the_reward_of_the_plain_environment(spec: moe_envs.Spec) -> None:
    weight = 0.4
    arguments = {**spec.small, "cost_weight": weight}
    plain = mo_gymnasium.make(spec.id, **arguments)
    shares = plain.unwrapped.vector.reward.relative.weights
    weights = np.array([1, *(weight * share for share in (shares.time, shares.memory, shares.energy))])
    env = LinearReward(mo_gymnasium.make(spec.multi_objective_id, **arguments), weights)
    for each in (env, plain):
        each.reset(seed=1)
        each.action_space.seed(1)
    for _ in range(20):
        ours, theirs = (each.step(each.action_space.sample()) for each in (env, plain))
        assert ours[1] == pytest.approx(theirs[1], abs=1e-5)
        assert ours[2] == theirs[2]
        if ours[2]:
            break


def test_it_runs_under_the_wrappers_of_mo_gymnasium() -> None:
    made = [lambda: mo_gymnasium.make("mo-moe-routing-v0", bundle="digits")] * 3
    env = MOSyncVectorEnv(made)
    env.reset(seed=0)
    _, rewards, _, _, _ = env.step(env.action_space.sample())
    assert rewards.shape == (3, 4)
    single = MORecordEpisodeStatistics(made[0](), gamma=0.9)
    single.reset(seed=0)
    for _ in range(32):
        _, _, ended, _, info = single.step(single.action_space.sample())
    assert ended
    assert info["episode"]["r"].shape == (4,)
    assert info["episode"]["l"] == 32
