"""Vector environments side by side: the same rows as apart, infos that only some have, errors."""

from typing import Any

import gymnasium
import numpy as np
import pytest
from gymnasium.error import InvalidAction
from gymnasium.vector import AutoresetMode

from moe_envs.core.mixed import MixedVectorEnv

ID = "moe_envs:MoEMetaOpt-v0"


def make(task: Any, rows: int, **kwargs: Any) -> Any:
    return gymnasium.make_vec(ID, rows, "vector_entry_point", task=task, max_actions=3, steps_per_action=1, **kwargs)


@pytest.mark.parametrize("mode", [AutoresetMode.SAME_STEP, AutoresetMode.NEXT_STEP])
def test_rows_are_those_of_the_environments_apart(mode: AutoresetMode) -> None:
    kwargs = {"autoreset_mode": mode.value}
    mixed = make(["digits", "fashion-mnist"], 5, **kwargs)
    apart = [make("digits", 3, **kwargs), make("fashion-mnist", 2, **kwargs)]
    observation, _ = mixed.reset(seed=5)
    of_apart = [env.reset(seed=seed)[0] for env, seed in zip(apart, (5, 8), strict=True)]
    np.testing.assert_array_equal(observation, np.concatenate(of_apart))
    generator = np.random.default_rng(0)
    for _ in range(7):
        actions = generator.integers(0, 3, (5, 4))
        together = mixed.step(actions)
        each = [env.step(part) for env, part in zip(apart, (actions[:3], actions[3:]), strict=True)]
        for place in range(4):
            np.testing.assert_array_equal(together[place], np.concatenate([found[place] for found in each]))
        infos = together[4]
        for key in each[0][4].keys() - {"final_info", "final_obs"}:
            np.testing.assert_array_equal(infos[key], np.concatenate([found[4][key] for found in each]))
        if "final_info" in each[0][4]:
            found = infos["final_info"]["meta/actions"]
            np.testing.assert_array_equal(found, [3] * 5)
            assert all(final is not None for final in infos["final_obs"])
    mixed.close()


def test_rows_begin_anew_by_a_mask() -> None:
    env = make(["digits", "fashion-mnist"], 4, autoreset_mode=AutoresetMode.DISABLED.value)
    env.reset(seed=0)
    for _ in range(3):
        before, _, terminated, _, _ = env.step(np.ones((4, 4), dtype=np.int64))
    assert terminated.all()
    for mask in ([False, True, False, False], [True, False, True, True]):
        after, _ = env.reset(options={"reset_mask": np.array(mask)})
        changed = (after != before).any(1)
        np.testing.assert_array_equal(changed, mask)
        before = after
    env.step(np.ones((4, 4), dtype=np.int64))


def test_what_is_wrong_changes_nothing() -> None:
    env = make(["digits", "fashion-mnist"], 4, autoreset_mode=AutoresetMode.DISABLED.value)
    env.reset(seed=np.int64(3))
    wrong = np.ones((4, 4), dtype=np.int64)
    wrong[3, 0] = 7
    with pytest.raises(InvalidAction):
        env.step(wrong)
    assert [each.taken.tolist() for each in env.envs] == [[0, 0], [0, 0]]
    for seed in ([1, 2, 3], range(7)):
        with pytest.raises(ValueError, match=f"{len(seed)} seeds for 4 rows"):
            env.reset(seed=seed)
    for mask in (np.ones(2, dtype=np.bool_), np.zeros(4, dtype=np.bool_), [True] * 4):
        with pytest.raises(ValueError, match=r"reset_mask must be a boolean array \[4\]"):
            env.reset(options={"reset_mask": mask})


def test_a_state_is_gone_back_to() -> None:
    env = make(["digits", "fashion-mnist"], 4)
    env.reset(seed=0)
    env.step(np.full((4, 4), 2))
    state = env.state()
    first = env.step(np.ones((4, 4), dtype=np.int64))
    env.restore(state)
    second = env.step(np.ones((4, 4), dtype=np.int64))
    np.testing.assert_array_equal(first[0], second[0])
    np.testing.assert_array_equal(first[1], second[1])
    with pytest.raises(ValueError, match="not a state of 2 environments"):
        env.restore({"mixed": [state["mixed"][0]]})


def test_an_entry_that_only_some_have_is_nought_in_the_others() -> None:
    mixed = MixedVectorEnv([make("digits", 1), make("digits", 2)])
    joined = mixed._joined([{"a": np.array([3]), "_a": np.array([True])}, {}])
    np.testing.assert_array_equal(joined["a"], [3, 0, 0])
    np.testing.assert_array_equal(joined["_a"], [True, False, False])


def test_what_cannot_be_mixed_is_named() -> None:
    other: Any = gymnasium.make_vec("moe_envs:MoERouting-v0", 2, "vector_entry_point", bundle="digits").unwrapped
    with pytest.raises(ValueError, match="spaces differ"):
        MixedVectorEnv([make("digits", 1), other])
    modes = [
        make("digits", 1, autoreset_mode=mode.value) for mode in (AutoresetMode.SAME_STEP, AutoresetMode.NEXT_STEP)
    ]
    with pytest.raises(ValueError, match="autoreset modes differ"):
        MixedVectorEnv(modes)
    with pytest.raises(ValueError, match="2 tasks for 1 rows"):
        make(["digits", "fashion-mnist"], 1)
