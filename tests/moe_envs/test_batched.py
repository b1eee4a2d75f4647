"""The two faces on the smallest problem there is: count to three, a unit of cost for each action 1."""

from collections.abc import Callable
from typing import Any, ClassVar, Unpack

import gymnasium
import numpy as np
import pytest
from gymnasium import spaces
from gymnasium.error import InvalidAction, ResetNeeded

from cost.model import Cost, RelativeCost
from moe_envs.core import BatchedEnv, Face, Outcome, Reward, SingleEnv
from moe_envs.core.spaces import layout


class CountingVectorEnv(BatchedEnv):
    STATE: ClassVar[tuple[str, ...]] = ("count", "start")

    def __init__(self, num_envs: int = 1, **face: Unpack[Face]) -> None:
        parts = layout([("count", 1, 0, 4, "steps so far"), ("start", 1, 0, 9, "a draw")])
        reward = Reward(0.5, RelativeCost(Cost(2, 2, 2), Cost(1, 0, 0)))
        super().__init__(num_envs, parts, spaces.Discrete(2), reward, **face)
        self.count, self.start = np.zeros((2, num_envs), dtype=np.int64)

    def _begin(self, rows: np.ndarray) -> None:
        self.count[rows], self.start[rows] = 0, self._draw(rows, 10, block=3)

    def _advance(self, actions: np.ndarray) -> Outcome:
        self.count += 1
        cost = np.zeros((self.num_envs, 3))
        cost[:, 0] = actions
        return Outcome(np.ones(self.num_envs), cost, self.count >= 3, {})

    def _observe(self) -> np.ndarray:
        return np.stack([np.minimum(self.count, 3), self.start], axis=1).astype(np.float32)


class CountingEnv(SingleEnv):
    vector_class = CountingVectorEnv


@pytest.mark.parametrize("mode", ["NextStep", "SameStep", "Disabled"])
def test_faces_are_equal(mode: str, assert_same: Callable[[Any, Any], None]) -> None:
    native = CountingVectorEnv(4, autoreset_mode=mode)
    single = gymnasium.vector.SyncVectorEnv([CountingEnv] * 4, autoreset_mode=mode)
    assert_same(native.reset(seed=[3, None, 5, 6])[0][[0, 2, 3]], single.reset(seed=[3, None, 5, 6])[0][[0, 2, 3]])
    assert_same(native.reset(seed=3), single.reset(seed=3))
    for step in range(40):
        actions = np.array([0, 1, step % 2, 1])
        ours, theirs = native.step(actions), single.step(actions)
        assert_same(ours, theirs)
        if mode == "Disabled" and ours[2].any():
            mask = {"reset_mask": ours[2].copy()}
            assert_same(native.reset(options=dict(mask)), single.reset(options=dict(mask)))


def test_numbers_by_hand() -> None:
    env = CountingEnv()
    env.reset(seed=0)
    results = [env.step(action) for action in (0, 1, 1)]
    assert [result[1] for result in results] == [1.0, 0.75, 0.75]
    assert [result[2] for result in results] == [False, False, True]
    assert results[1][4]["cost/time"] == 1.0
    assert results[1][4]["reward/cost"] == 0.5
    np.testing.assert_array_equal(results[1][4]["vector_reward"], [1, -0.5, 0, 0])
    with pytest.raises(ResetNeeded, match="call reset before step"):
        env.step(0)
    env.reset()
    with pytest.raises(InvalidAction):
        env.step(2)


def test_the_vector_cuts_episodes_by_itself() -> None:
    env = CountingVectorEnv(2, autoreset_mode="SameStep", max_episode_steps=2)
    env.reset(seed=0)
    _, _, terminated, truncated, _ = env.step(np.array([0, 0]))
    assert not truncated.any()
    _, _, terminated, truncated, infos = env.step(np.array([0, 0]))
    assert truncated.all()
    assert not terminated.any()
    assert [observation[0] for observation in infos["final_obs"]] == [2, 2]


def test_rows_have_draws_of_their_own() -> None:
    many, alone = CountingVectorEnv(3, autoreset_mode="SameStep"), CountingVectorEnv(1, autoreset_mode="SameStep")
    first, second = [many.reset(seed=7)[0][1, 1]], [alone.reset(seed=8)[0][0, 1]]
    for _ in range(60):
        first.append(many.step(np.zeros(3, dtype=np.int64))[0][1, 1])
        second.append(alone.step(np.zeros(1, dtype=np.int64))[0][0, 1])
    assert first == second
    assert len(set(first)) > 5


@pytest.mark.parametrize("mask", [np.zeros(3, dtype=bool), np.ones(2, dtype=bool), np.ones(3), [True, False, True]])
def test_wrong_reset_masks_are_refused(mask: Any) -> None:
    env = CountingVectorEnv(3)
    env.reset(seed=0)
    with pytest.raises(ValueError, match="reset_mask"):
        env.reset(options={"reset_mask": mask})
    with pytest.raises(ValueError, match="2 seeds for 3 rows"):
        env.reset(seed=[1, 2])
    with pytest.raises(ValueError, match="not a state"):
        env.restore({"arrays": {}, "generators": []})
