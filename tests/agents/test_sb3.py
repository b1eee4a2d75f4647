"""The native VecEnv equals DummyVecEnv; costs reach the log; settings are complete."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from stable_baselines3 import PPO
from stable_baselines3.common.env_util import make_vec_env
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from agents import sb3, tuned
from agents.training import Watcher, by_return

ID = "moe_envs:MoERouting-v0"
DIGITS: dict[str, Any] = {"bundle": "digits", "batch_size": 6}


@pytest.mark.parametrize("action", ["expert", "subset"])
def test_native_vec_env_equals_dummy_vec_env(action: str, assert_same: Callable[[Any, Any], None]) -> None:
    kwargs = {**DIGITS, "action": action}
    native, dummy = sb3.make_sb3_vec(ID, 3, **kwargs), make_vec_env(ID, 3, seed=9, env_kwargs=kwargs)
    native.seed(9)
    np.testing.assert_array_equal(native.reset(), dummy.reset())
    native.action_space.seed(0)
    for _ in range(50):
        actions = np.stack([native.action_space.sample() for _ in range(3)])
        ours, theirs = native.step(actions), dummy.step(actions)
        for info in (*ours[3], *theirs[3]):
            if "episode" in info:  # VecMonitor and Monitor differ in rounding, types and time
                info["episode"] = {"r": round(float(info["episode"]["r"]), 3), "l": int(info["episode"]["l"])}
        assert_same(ours[:3], theirs[:3])
        assert_same(ours[3], theirs[3])
    assert native.get_attr("num_envs") == [3] * 3
    native.close()


@pytest.mark.parametrize("action", ["expert", "subset", "top-m"])
def test_sb3_trains_on_every_kind_of_action(action: str) -> None:
    from agents.evaluate import evaluate

    kwargs = {**DIGITS, "action": action}
    model = PPO("MlpPolicy", sb3.make_sb3_vec(ID, 4, **kwargs), n_steps=12, batch_size=48, seed=0).learn(48)
    assert len(evaluate(model, ID, 10, **kwargs)) == 10


def test_only_environments_that_leave_resets_to_it_are_adapted() -> None:
    import gymnasium

    with pytest.raises(ValueError, match="Disabled"):
        sb3.NativeVecEnv(gymnasium.make_vec(ID, 2, vectorization_mode="vector_entry_point", **DIGITS))


def test_costs_and_rewards_reach_tensorboard(tmp_path: Path) -> None:
    env = sb3.make_sb3_vec(ID, 4, **DIGITS, cost_weight=0.3)
    logger = sb3.CostLogger()
    PPO("MlpPolicy", env, n_steps=12, batch_size=48, seed=0, tensorboard_log=str(tmp_path)).learn(96, logger)
    events = EventAccumulator(str(next(tmp_path.glob("*/"))))
    events.Reload()
    tags = set(events.Tags()["scalars"])
    expected = {"reward/quality", "reward/cost", "cost/time", "cost/memory", "cost/energy", "routing/experts_used"}
    assert expected | {"rollout/ep_rew_mean"} <= tags
    assert len(logger.records) == 16
    for record in logger.records:
        assert record["return"] == pytest.approx(record["reward/quality"] - 0.3 * record["reward/cost"], abs=1e-6)
        assert 1 <= record["routing/experts_used"] <= 6
    logged = events.Scalars("cost/time")[-1].value
    assert logged == pytest.approx(np.mean([record["cost/time"] for record in logger.records[8:]]), rel=1e-5)


def test_rewards_are_normalised_and_recorded_as_they_are() -> None:
    values = {"n_steps": 12, "batch_size": 48, "normalize_rewards": True}
    algorithm, logger = (
        sb3.make_algorithm("ppo", sb3.make_sb3_vec(ID, 4, **DIGITS, cost_weight=0.3), 0, values),
        sb3.CostLogger(),
    )
    algorithm.learn(96, logger)
    assert algorithm.get_env().ret_rms.var != 1  # type: ignore[union-attr]
    for record in logger.records:
        assert record["return"] == pytest.approx(record["reward/quality"] - 0.3 * record["reward/cost"], abs=1e-5)


@pytest.mark.parametrize(
    ("algo", "small"),
    [
        *(("ppo", {"batch_size": 64}), ("a2c", {}), ("dqn", {"learning_starts": 16})),
        *(("qrdqn", {"learning_starts": 16}), ("ppo_lstm", {"batch_size": 64, "n_epochs": 1})),
    ],
)
def test_every_algorithm_trains_with_its_tuned_settings_and_repeats_bit_for_bit(
    algo: str, small: dict[str, Any]
) -> None:
    weights = []
    for _ in range(2):
        settings = tuned.settings(algo, ID, "sb3", n_envs=4, **small)
        model = sb3.make_algorithm(algo, sb3.make_sb3_vec(ID, 4, **DIGITS), 3, settings)
        model.learn(256)
        weights.append(np.concatenate([value.numpy().ravel() for value in model.policy.state_dict().values()]))
    np.testing.assert_array_equal(*weights)


def test_unknown_algorithms_are_named() -> None:
    with pytest.raises(ValueError, match="ppo, a2c, dqn, qrdqn, ppo_lstm, ppo_mask"):
        tuned.settings("sac", ID, "sb3")


def test_masks_are_asked_for_where_there_are_none() -> None:
    with pytest.raises(ValueError, match="each action is valid; take ppo"):
        sb3.make_algorithm("ppo_mask", sb3.make_sb3_vec(ID, 1, **DIGITS), 0, {})


def test_a_watcher_in_sb3s_own_learn_keeps_the_weights_best_on_validation() -> None:
    judge = by_return(ID, DIGITS, episodes=200)
    watcher = Watcher(judge, every=800)
    env = sb3.make_sb3_vec(ID, 16, **DIGITS)
    model = PPO("MlpPolicy", env, n_steps=12, batch_size=48, learning_rate=0.02, seed=0)
    model.learn(4000, sb3.AfterUpdate(watcher))
    assert judge(watcher.end(model)) == max(look.score for look in watcher.curve)


def test_ppo_learns_to_route_better_than_the_gate() -> None:
    """60,000 steps on digits: far above the gate's top-1, and cheaper, on validation; so for 10 of 10 seeds."""
    from agents.baselines.routing import RoutingProblem, _top_m
    from agents.evaluate import evaluate

    kwargs: dict[str, Any] = {"bundle": "digits", "cost_weight": 0.4}
    settings = tuned.settings("ppo", ID, "sb3", n_envs=32, batch_size=256, learning_rate="linear 2e-3")
    model = sb3.make_algorithm("ppo", sb3.make_sb3_vec(ID, 32, **kwargs), 0, settings)
    model.learn(60_000)
    problem = RoutingProblem(ID, **kwargs)
    gate = problem.tune([(_top_m(problem, 1), True)])
    ours, theirs = (evaluate(policy, ID, 500, **kwargs, split="validation") for policy in (model, gate))
    assert ours["return"].mean() > theirs["return"].mean() + 0.03
    assert ours["cost"].mean() < theirs["cost"].mean()
