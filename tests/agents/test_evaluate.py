"""Evaluation: every episode once, the same ones for all policies, sums that fit the reward."""

from typing import Any

import gymnasium
import numpy as np
import pytest

from agents.evaluate import evaluate

ID = "moe_envs:MoERouting-v0"


class Constant:
    """Always the same expert."""

    def __init__(self, expert: int) -> None:
        self.expert = expert

    def predict(
        self, observation: np.ndarray, state: Any = None, episode_start: Any = None, deterministic: bool = False
    ) -> tuple[np.ndarray, Any]:
        return np.full(len(observation), self.expert), state


def test_it_equals_a_loop_over_single_environments() -> None:
    frame = evaluate(Constant(5), ID, episodes=4, seed=20, bundle="digits", split="test", cost_weight=0.3)
    assert list(frame["episode"]) == [0, 1, 2, 3]
    for episode, row in frame.iterrows():
        env = gymnasium.make(ID, bundle="digits", split="test", cost_weight=0.3)
        env.reset(seed=20 + int(str(episode)))
        steps = [env.step(5) for _ in range(32)]
        assert row["return"] == pytest.approx(sum(step[1] for step in steps))
        assert row["quality"] == pytest.approx(sum(step[4]["reward/quality"] for step in steps))
        assert row["cost/energy"] == pytest.approx(sum(step[4]["cost/energy"] for step in steps))
        assert row["routing/experts_used"] == 1


def test_a_policy_that_takes_masks_gets_them() -> None:
    asked: list[np.ndarray] = []

    class Masked(Constant):
        def predict(self, *args: Any, action_masks: np.ndarray | None = None, **kwargs: Any) -> tuple[np.ndarray, Any]:
            assert action_masks is not None
            asked.append(action_masks)
            return action_masks.argmax(1), None

    kwargs = {"model": "digits-mlp", "evaluation": "additive"}
    frame = evaluate(Masked(0), "moe_envs:MoECompression-v0", episodes=6, **kwargs)
    plain = evaluate(Constant(0), "moe_envs:MoECompression-v0", episodes=6, **kwargs)
    assert len(asked) == 18
    assert not np.all(asked)
    np.testing.assert_array_equal(frame["return"], plain["return"])  # what does not fit becomes the first that does


def test_more_episodes_than_rows() -> None:
    frame = evaluate(Constant(1), ID, episodes=1003, bundle="digits", batch_size=2)
    assert list(frame["episode"]) == list(range(1003))
    np.testing.assert_allclose(frame["return"], frame["quality"] - 0.2 * frame["cost"], atol=1e-12)
    assert set(frame["quality"]) == {0.0, 0.5, 1.0}
