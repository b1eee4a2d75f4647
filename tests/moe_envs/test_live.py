"""Live costs: the experts are really run, and what they take is what is paid."""

import pickle
import time
import warnings
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium.utils.env_checker import check_env
from stable_baselines3.common.env_checker import check_env as sb3_check_env
from torch import nn

from cost.timing import torch_threads
from experts import bundle, profiles

LIVE, BATCH = "moe_envs:MoERoutingLive-v0", 8
KWARGS: dict[str, Any] = {"bundle": "digits", "batch_size": BATCH}


class Slow(nn.Module):
    def __init__(self, expert: nn.Module) -> None:
        super().__init__()
        self.expert = expert

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        time.sleep(0.05 * len(x))
        return self.expert(x)


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("measured")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MOE_ENVS_CACHE", str(folder))
        profiles.prepare("digits", "live")
    return folder


@pytest.fixture(autouse=True)
def measured_once(measured: Path, own_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOE_ENVS_CACHE", str(measured))


def slowed(env: Any, expert: int = 3) -> Any:
    live = env.live if hasattr(env, "live") else env.vector.live
    live._experts[expert] = Slow(live._experts[expert])
    return env


def vector(rows: int) -> Any:
    return gymnasium.make_vec(LIVE, rows, vectorization_mode="vector_entry_point", **KWARGS).unwrapped


@pytest.mark.parametrize("action", ["expert", "subset", "top-m"])
def test_both_checkers_are_silent(action: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        env = gymnasium.make(LIVE, **KWARGS, action=action)
        assert env.spec is not None
        assert env.spec.nondeterministic
        check_env(env.unwrapped)
        sb3_check_env(gymnasium.make(LIVE, **KWARGS, action=action))


@pytest.fixture
def clocked(clock: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """An expert takes the time that it sleeps."""
    monkeypatch.setattr("moe_envs.routing.live.perf_counter_ns", clock.read_ns)


@pytest.mark.usefixtures("clocked")
def test_a_slowed_expert_is_paid_by_the_time_of_its_last_run() -> None:
    env = slowed(gymnasium.make(LIVE, **KWARGS).unwrapped)
    for _ in range(2):
        env.reset(seed=0)
        paid = [env.step(action)[4]["cost/time"] for action in (3, 0, 3, 3, 0, 0, 0, 0)]
        assert paid == pytest.approx([0.05, 0, 0.05, 0.05, 0, 0, 0, 0], abs=1e-4)


@pytest.mark.usefixtures("clocked")
def test_the_rows_of_a_vector_are_timed_for_themselves() -> None:
    env = slowed(vector(2))
    env.reset(seed=0)
    first, second = np.array(
        [step[4]["cost/time"] for step in (env.step(np.array([3, 0])), env.step(np.array([3, 3])))]
    )
    assert first == pytest.approx([0.05, 0], abs=1e-4)
    assert second == pytest.approx([0.05, 0.05], abs=1e-4)


def test_all_but_time_is_as_with_the_machines_profile() -> None:
    live, profiled = gymnasium.make(LIVE, **KWARGS), gymnasium.make("moe_envs:MoERouting-v0", **KWARGS, costs="machine")
    np.testing.assert_array_equal(live.reset(seed=4)[0], profiled.reset(seed=4)[0])
    cost = slice(-2, -1)
    for step in range(BATCH):
        ours, theirs = live.step(step % 3), profiled.step(step % 3)
        np.testing.assert_array_equal(np.delete(ours[0], cost), np.delete(theirs[0], cost))
        for key in ("reward/quality", "cost/memory", "cost/energy", "routing/experts_used"):
            assert ours[4][key] == theirs[4][key]
        reference = live.unwrapped.vector.tables.reference  # type: ignore[attr-defined]
        assert ours[4]["vector_reward"][1] == pytest.approx(-ours[4]["cost/time"] / reference.time)
        assert ours[1] == pytest.approx(ours[4]["vector_reward"] @ [1, 0.2 / 3, 0.2 / 3, 0.2 / 3])


def test_costs_far_out_stay_within_the_observations_bounds() -> None:
    env = vector(1)
    env.live._experts = [Slow(expert) for expert in env.live._experts]
    single = gymnasium.make(LIVE, **KWARGS).unwrapped
    single.vector.live._experts = env.live._experts  # type: ignore[attr-defined]
    single.reset(seed=0)
    env.reset(seed=0)
    for action in range(5):
        assert single.observation_space.contains(single.step(action)[0])
        assert env.observation_space.contains(env.step(np.array([action]))[0])


def test_threads_are_left_alone_and_copies_go_on() -> None:
    env = gymnasium.make(LIVE, **KWARGS).unwrapped
    env.reset(seed=0)
    with torch_threads(2):
        env.step(0)
        assert torch.get_num_threads() == 2
    assert not torch.is_inference_mode_enabled()
    twin = pickle.loads(pickle.dumps(env))
    state = env.state()  # type: ignore[attr-defined]
    assert twin.step(1)[4]["reward/quality"] == env.step(1)[4]["reward/quality"]
    env.restore(state)  # type: ignore[attr-defined]
    assert env.step(1)[4]["cost/memory"] > 0


def test_a_bundle_of_a_module_of_ones_own_says_that_it_cannot_run(monkeypatch: pytest.MonkeyPatch) -> None:
    metadata = bundle.load("digits").metadata | {"architecture": None}
    loaded = bundle.load("digits")
    monkeypatch.setattr("experts.bundle.load", lambda name: bundle.Bundle(loaded.path, metadata, loaded.members))
    with pytest.raises(ValueError, match="module of your own"):
        gymnasium.make(LIVE, **KWARGS)
