"""MoEAutoRate-v0 by hand: a training, its rates, its way back, its references."""

from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest

from experts import tasks
from experts.data import DataError
from moe_envs.autorate import env as env_module
from moe_envs.autorate import references
from moe_envs.autorate.signals import BACK, BACK_FACTOR, CLIMB, FACTORS, KEEP, RATES, cosine, found_rate, sweep_rates
from moe_envs.autorate.trainings import CONTEXTS, draw

ID = "moe_envs:MoEAutoRate-v0"


def make(**kwargs: Any) -> Any:
    return gymnasium.make(ID, **kwargs).unwrapped


def rows(count: int, **kwargs: Any) -> Any:
    return gymnasium.make_vec(ID, count, "vector_entry_point", **kwargs).unwrapped


def test_actions_multiply_the_rate_and_are_clamped() -> None:
    env = make(initial_rate=0.001)
    env.reset(seed=0)
    assert env.step(CLIMB)[4]["autorate/rate"] == pytest.approx(0.001)  # nothing has been observed
    for action, factor in enumerate(FACTORS):
        before = env.vector.rate[0]
        assert env.step(action)[4]["autorate/rate"] == pytest.approx(before * factor)
    for _ in range(8):
        info = env.step(0)[4]
    assert info["autorate/rate"] == RATES[0]


def test_the_optimiser_gets_the_rate_times_a_cosine() -> None:
    env = rows(4, initial_rate=0.001)
    env.reset(seed=0)
    for taken in range(5):
        env.step(np.full(4, KEEP))
        np.testing.assert_allclose(env.trainings.training.rates[:, 0], 0.001 * cosine(taken / env.horizon))
    assert cosine(np.array([0.0, 1.0])).tolist() == [1.0, pytest.approx(0.01)]


def test_going_back_restores_the_best_state_and_lowers_the_rate() -> None:
    env = rows(4, initial_rate=0.01)
    env.reset(seed=0)
    for _ in range(3):
        env.step(np.full(4, KEEP))
    best, moments = env._best_weights.copy(), env._best_first.copy()
    loss = env.best_loss.copy()
    env.step(np.full(4, 6))  # ten times the rate
    env._go_back(np.arange(4))
    kept = env.best_loss == loss
    assert kept.any()
    np.testing.assert_array_equal(env.trainings.training.weights[kept], best[kept])
    np.testing.assert_array_equal(env.trainings.training.first[kept], moments[kept])
    rate, backs = env.rate.copy(), env._backs.copy()
    infos = env.step(np.full(4, BACK))[4]
    np.testing.assert_allclose(infos["autorate/rate"], rate * BACK_FACTOR)
    np.testing.assert_array_equal(infos["autorate/backs"], backs + 1)


def test_what_diverges_is_undone() -> None:
    env = make(initial_rate=10.0)
    for seed in range(3):
        observation, _ = env.reset(seed=seed)
        before = env.vector.trainings.training.weights.copy()
        observation, _, _, _, info = env.step(KEEP)
        if info["autorate/backs"]:
            break
    assert info["autorate/backs"] == 1
    assert info["autorate/rate"] == pytest.approx(3.0)
    np.testing.assert_array_equal(env.vector.trainings.training.weights, before)
    assert observation[env.observation_layout["diverged"].slice] == 1
    assert np.isfinite(observation).all()


def test_the_reward_is_the_fall_of_the_best_loss_and_at_the_end_the_excess() -> None:
    env = make(initial_rate=0.01, split="test")
    env.reset(seed=2)
    best, ended = float(env.vector.best_loss[0]), False
    while not ended:
        _, reward, ended, _, info = env.step(KEEP)
        now = min(best, info["autorate/validation_loss"])
        final = 0.0
        if ended:
            log = np.log1p(info["autorate/excess"])
            final = -np.sign(log) * np.log1p(abs(log) / 0.1)
        assert reward == pytest.approx(0.3 * np.log(best / now) + final, abs=1e-6)
        best = now
    assert info["autorate/decisions"] == env.vector.describe(0).decisions


def test_a_cosine_from_the_tuned_rate_has_no_excess() -> None:
    env = rows(8, split="validation")
    env.reset(seed=0)
    env.rate = env.references.tuned[env.context].astype(np.float64)
    ended, excess = np.zeros(8, dtype=np.bool_), np.full(8, np.nan)
    while not ended.all():
        _, _, terminated, _, infos = env.step(np.full(8, KEEP))
        new = terminated & ~ended
        excess[new], ended = infos["autorate/excess"][new], ended | terminated
    np.testing.assert_allclose(excess, 0, atol=0.05)  # the references were computed on another machine


def test_contexts_are_of_their_split_and_as_documented() -> None:
    for split, count in CONTEXTS.items():
        drawn = [draw(split, number, 1037)[0] for number in range(count)]
        assert len({each.scale for each in drawn}) == count
        assert {each.experts for each in drawn} == {1, 2, 4}
        assert {each.sgd for each in drawn} == {True, False}
        assert {each.decisions for each in drawn} <= {*range(15, 45)}
        assert min(each.decisions for each in drawn) < 18
        assert max(each.decisions for each in drawn) > 41
    assert draw("train", 0, 1037)[0] != draw("test", 0, 1037)[0]


def test_a_range_test_finds_a_rate_below_divergence() -> None:
    rates = sweep_rates()
    losses = np.where(rates < 0.1, 2.3 - 2 * np.clip(np.log10(rates / 1e-3), 0, 2) / 2, 10.0)
    found = found_rate(np.stack([losses, np.where(np.arange(60) > 40, np.nan, 2.3 - np.arange(60) / 40)]))
    assert 0.005 < found[0] < 0.1
    assert found[1] == pytest.approx(rates[40] * 0.15)


def test_references_are_refused_where_they_are_not_of_the_task(tmp_path: Path) -> None:
    path = references.shipped_path("digits")
    (tmp_path / "altered").write_bytes(path.read_bytes()[:-1] + b"\x01")
    with pytest.raises(DataError, match="damaged"):
        references._read(tmp_path / "altered", "any")
    with pytest.raises(DataError, match="other data"):
        references._read(path, "of another task")


def test_references_of_an_own_task_are_trained_once(monkeypatch: pytest.MonkeyPatch, own_cache: Path) -> None:
    generator = np.random.default_rng(0)
    labels = generator.integers(0, 3, 400)
    tasks.build("mine", generator.normal(size=(400, 5)) + labels[:, None], labels)
    for module in (references, env_module):
        monkeypatch.setattr(module, "CONTEXTS", dict.fromkeys(CONTEXTS, 4))
    env = make(task="mine", steps_per_action=1, costs="machine")
    env.reset(seed=0)
    assert (env.vector.references.judged < env.vector.references.first).all()
    assert len(list((own_cache / "autorate").glob("mine-*.safetensors"))) == 1


def test_several_tasks_and_starts_train_side_by_side() -> None:
    env = rows(4, task=["digits", "fashion-mnist"], initial_rate=["range test", [1e-5, 1.0]])
    env.reset(seed=0)
    assert [(each.task.name, each.initial_rate) for each in env.envs] == [
        ("digits", "range test"), ("digits", (1e-5, 1.0)), ("fashion-mnist", "range test"),
        ("fashion-mnist", (1e-5, 1.0)),
    ]  # fmt: skip
    swept = env.envs[0]
    assert swept.rate[0] == pytest.approx(swept.references.found[swept.context[0]])
    with pytest.raises(ValueError, match="4 combinations"):
        rows(3, task=["digits", "fashion-mnist"], initial_rate=["range test", 0.1])


def test_pictures() -> None:
    env = make(render_mode="rgb_array")
    env.reset(seed=0)
    blank = env.render()
    env.step(CLIMB)
    env.step(BACK)
    assert env.render().shape == blank.shape
    assert (env.render() != blank).any()
    text = make(render_mode="ansi")
    text.reset(seed=0)
    text.step(KEEP)
    text.step(BACK)
    assert "went back" in text.render()


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"task": "mnist"}, "'digits', 'fashion-mnist'"),
        ({"split": "rl_train"}, "'train', 'validation', 'test'"),
        ({"initial_rate": "range"}, "range test"),
        ({"initial_rate": (1.0, 0.1)}, "first must not be above"),
        ({"initial_rate": -1.0}, "initial_rate"),
        ({"steps_per_action": 0}, "steps_per_action=0"),
        ({"costs": "live"}, "'reference', 'machine'"),
    ],
)
def test_wrong_arguments_name_the_valid_ones(kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(**kwargs)
