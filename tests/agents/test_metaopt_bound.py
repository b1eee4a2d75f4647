"""The search that sees the future: what it finds really arrives, and no sequence that was tried is shorter."""

from itertools import product
from typing import Any

import numpy as np
import pytest

from agents.baselines.metaopt import KEEP
from agents.baselines.metaopt_bound import ACTIONS, beam_search
from moe_envs.metaopt.env import MoEMetaOptEnv

EASY: dict[str, Any] = {"initial_rate": 0.02, "target": 0.85, "max_actions": 6, "steps_per_action": 8}


class Keep:
    def predict(
        self, observation: np.ndarray, state: Any = None, episode_start: Any = None, deterministic: bool = True
    ) -> tuple[np.ndarray, Any]:
        return np.tile(KEEP, (len(observation), 1)), state


def play(seed: int, actions: np.ndarray, **kwargs: Any) -> tuple[int, bool]:
    """Decisions until the target, and whether it was reached."""
    env = MoEMetaOptEnv(split="test", **kwargs)
    env.reset(seed=seed)
    for number, action in enumerate(actions):
        *_, info = env.step(action)
        if info["meta/arrived"]:
            return number + 1, True
    return len(actions), False


@pytest.mark.parametrize("policy", [None, Keep()])
def test_what_is_found_arrives(policy: Any) -> None:
    for seed in range(2):
        actions, arrives = beam_search(seed, "test", 2, policy, **EASY)
        assert arrives
        assert play(seed, actions, **EASY) == (len(actions), True)
        kept, arrived = play(seed, np.tile(KEEP, (6, 1)), **EASY)
        assert policy is None or len(actions) <= kept or not arrived


def test_a_beam_that_keeps_all_is_exhaustive() -> None:
    kwargs = EASY | {"max_actions": 2, "target": 0.8}
    found, arrives = beam_search(3, "test", 81, **kwargs)
    tried = [play(3, ACTIONS[list(pair)], **kwargs) for pair in product(range(0, 81, 8), repeat=2)]
    assert arrives
    assert len(found) <= min(steps for steps, arrived in tried if arrived)
    assert play(3, found, **kwargs) == (len(found), True)


def test_trainings_that_diverge_are_given_up() -> None:
    actions, arrives = beam_search(1, "test", 2, Keep(), **(EASY | {"undo": False, "initial_rate": 0.3}))
    if arrives:
        assert play(1, actions, undo=False, **(EASY | {"initial_rate": 0.3})) == (len(actions), True)


def test_a_target_out_of_reach_is_not_reached() -> None:
    actions, arrives = beam_search(0, "test", 1, Keep(), **(EASY | {"target": 1.1, "max_actions": 2}))
    assert not arrives
    assert len(actions) == 2
