"""MoEMetaOpt-v0 by hand: a training, its decisions, its undoing."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch

from moe_envs.metaopt.signals import DECAYS, RATES

ID = "moe_envs:MoEMetaOpt-v0"
KEEP = np.array([1, 1, 1, 1])


def make(**kwargs: Any) -> Any:
    return gymnasium.make(ID, **kwargs).unwrapped


def test_actions_change_rates_and_decays_and_are_clamped() -> None:
    env = make(initial_rate=0.1, initial_decay=0.01, steps_per_action=1)
    env.reset(seed=0)
    info = env.step([2, 0, 0, 2])[4]
    assert (info["meta/gate_rate"], info["meta/experts_rate"]) == pytest.approx((0.2, 0.05))
    assert (info["meta/gate_decay"], info["meta/experts_decay"]) == (1e-3, 0.1)
    for _ in range(16):
        info = env.step([2, 0, 0, 2])[4]
    assert (info["meta/gate_rate"], info["meta/experts_rate"]) == pytest.approx((RATES[1], RATES[0]))
    assert (info["meta/gate_decay"], info["meta/experts_decay"]) == (0, DECAYS[-1])


def test_contexts_draw_the_first_decay() -> None:
    for kwargs, places in (({}, set(range(len(DECAYS)))), ({"initial_decay": (0.0, 1.0)}, {0, len(DECAYS) - 1})):
        env: Any = gymnasium.make_vec(ID, 64, "vector_entry_point", **kwargs).unwrapped
        env.reset(seed=0)
        assert set(env.ladder[:, 0].tolist()) == places
        assert (env.ladder[:, 0] == env.ladder[:, 1]).all()


def test_a_context_is_the_same_whatever_it_begins_with() -> None:
    weights = []
    for kwargs in ({}, {"initial_decay": 0.01}, {"initial_decay": (0.0, 0.1, 1.0), "initial_rate": 0.02}):
        env: Any = gymnasium.make_vec(ID, 8, "vector_entry_point", split="test", **kwargs).unwrapped
        env.reset(seed=3)
        weights.append(np.concatenate([env.training.weights, env._orders], axis=1))
    np.testing.assert_array_equal(weights[0], weights[1])
    np.testing.assert_array_equal(weights[0], weights[2])


def test_a_training_loss_of_nought_is_seen_as_a_number() -> None:
    env: Any = gymnasium.make_vec(ID, 2, "vector_entry_point").unwrapped
    env.reset(seed=0)
    env.step(np.tile(KEEP, (2, 1)))
    env._see(np.array([True, True]), np.zeros((2, 5)), env._validate())  # as easy data give after many decisions
    assert np.isfinite(env._observe()).all()


def test_reward_is_the_drop_of_log_loss_and_arrival_ends() -> None:
    env = make(initial_rate=0.02, target=0.9)
    env.reset(seed=1)
    before = np.log(np.log(10))
    for step in range(14):
        _, reward, ended, _, info = env.step(KEEP)
        after = np.log(info["meta/validation_loss"])
        assert reward == pytest.approx(before - after - 0.1 + info["meta/arrived"], abs=1e-9)
        before = after
        assert info["meta/actions"] == step + 1
        if ended:
            break
    assert info["meta/arrived"] == 1
    assert info["meta/accuracy"] >= 0.9
    total = make(initial_rate=0.02, target=1.0, cost_weight=1.0, widths=(24,))
    total.reset(seed=1)
    assert sum(total.step(KEEP)[4]["reward/cost"] for _ in range(30)) == pytest.approx(1)


def test_what_diverges_is_undone_or_ends() -> None:
    kwargs = {"initial_rate": 0.3, "scales": (1e4, 1e4), "steps_per_action": 3}
    env, ending = make(**kwargs), make(**kwargs, undo=False)
    env.reset(seed=0)
    ending.reset(seed=0)
    before = env.vector.training.weights.copy()
    observation, reward, ended, _, info = env.step(KEEP)
    assert reward == pytest.approx(-1.1)
    assert not ended
    assert np.array_equal(env.vector.training.weights, before)
    assert info["meta/gate_rate"] == pytest.approx(0.15)
    assert observation[env.observation_layout["undone"].slice] == 1
    assert np.isfinite(observation).all()
    assert ending.step(KEEP)[2]


def test_contexts_of_splits_are_disjoint_and_those_of_a_seed_the_same() -> None:
    seen: dict[str, set[tuple[float, ...]]] = {}
    for split in ("train", "validation", "test"):
        env: Any = gymnasium.make_vec(ID, 64, "vector_entry_point", split=split)
        env.reset(seed=0)
        training = env.unwrapped.training
        seen[split] = {tuple(row) for row in np.column_stack([training.rates[:, 0], training.weights[:, 0]])}
        assert len(seen[split]) == 64
        assert training.rates.min() >= 3e-4
        assert training.rates.max() <= 0.1
    assert not seen["train"] & seen["validation"]
    assert not seen["train"] & seen["test"]


def test_a_fork_goes_on_by_itself() -> None:
    env = make(render_mode="ansi")
    env.reset(seed=3)
    env.step(KEEP)
    state = env.state()
    first = [env.step([2, 2, 1, 1])[1] for _ in range(3)]
    env.restore(state)
    assert env.render().count("learning rate") == 1
    other = [env.step([0, 0, 1, 1])[1] for _ in range(3)]
    env.restore(state)
    assert [env.step([2, 2, 1, 1])[1] for _ in range(3)] == first != other
    assert env.render().count("learning rate") == 4
    with pytest.raises(ValueError, match="not a state"):
        gymnasium.make_vec(ID, 2, "vector_entry_point").unwrapped.restore(state)  # type: ignore[attr-defined]
    with pytest.raises(ValueError, match="not a state"):
        make(max_actions=3).restore(state)


def test_nothing_global_is_touched() -> None:
    torch.manual_seed(0)
    np.random.seed(0)  # noqa: NPY002
    states, threads = (torch.get_rng_state(), np.random.get_state()[1].copy()), torch.get_num_threads()  # type: ignore[union-attr]  # noqa: NPY002
    env = make()
    env.reset(seed=0)
    with torch.no_grad():
        env.step(KEEP)
        assert not torch.is_grad_enabled()
    assert torch.is_grad_enabled()
    assert torch.get_num_threads() == threads
    assert torch.equal(states[0], torch.get_rng_state())
    assert np.array_equal(states[1], np.random.get_state()[1])  # type: ignore[arg-type,index]  # noqa: NPY002


def test_machine_costs_are_measured_once(own_cache: Path) -> None:
    code = "import gymnasium; gymnasium.make('moe_envs:MoEMetaOpt-v0', costs='machine')"
    for expected in (True, False):
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        assert ("measuring the costs of trainings of 'digits'" in done.stderr) is expected
    assert (own_cache / "profiles" / "task-digits.json").exists()


def test_pictures() -> None:
    env = make(render_mode="rgb_array")
    env.reset(seed=0)
    blank = env.render()
    env.step(KEEP)
    assert env.render().shape == blank.shape
    assert (env.render() != blank).any()


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"task": "mnist"}, "'digits', 'fashion-mnist', 'fashion-mnist-14'"),
        ({"split": "rl_train"}, "'train', 'validation', 'test'"),
        ({"costs": "live"}, "'reference', 'machine'"),
        ({"tsak": "digits"}, "did you mean 'task'"),
        ({"max_actions": 0}, "max_actions=0"),
        ({"steps_per_action": 1.5}, "steps_per_action=1.5"),
        ({"initial_rate": -1.0}, "initial_rate"),
        ({"scales": (2.0, 1.0)}, "scales"),
        ({"widths": ()}, "widths"),
        ({"target": float("nan")}, "target=nan"),
        ({"initial_decay": 0.05}, "initial_decay=0.05"),
    ],
)
def test_wrong_arguments_name_the_valid_ones(kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(**kwargs)
