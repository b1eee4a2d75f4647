"""PPO and REINFORCE learn what can be learnt, resume bit for bit and stop at what is not finite."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
from gymnasium.vector import AutoresetMode

from agents import PPO, REINFORCE, training
from agents.batches import beside_others
from agents.learner import Learner
from agents.resumable import EPISODES
from agents.rollouts import NotFiniteError
from tests.agents import problems  # noqa: F401

ROUTING: dict[str, Any] = {"env": "moe_envs:MoERouting-v0", "env_kwargs": {"bundle": "digits"}}
FAST: dict[str, Any] = {"n_steps": 32, "learning_rate": "linear 3e-3", "ent_coef": 0.003}


def last_return(agent: Learner) -> float:
    return float(agent.episodes.frame()["return"].tail(200).mean())


@pytest.mark.parametrize("learner", [PPO, REINFORCE])
@pytest.mark.parametrize(
    ("env", "best", "steps", "ent_coef"),
    [  # each passes for 10 of the seeds 0 to 9, with both learners
        ("Identity-v0", 8, 20_000, 0.003),
        ("Counting-v0", 1, 40_000, 0.1),  # with 0.003 PPO does for 4 of them, REINFORCE for 8
        ("Masked-v0", 8, 30_000, 0.003),
        ("Bits-v0", 1, 30_000, 0.003),
        ("Choices-v0", 1, 30_000, 0.003),
        ("Target-v0", 0, 40_000, 0.003),
    ],
)
def test_it_learns(learner: type[Learner], env: str, best: float, steps: int, ent_coef: float) -> None:
    kwargs: Any = FAST | ({"n_steps": 8, "learning_rate": "linear 1e-2"} if learner is REINFORCE else {"n_epochs": 5})
    agent: Any = learner
    agent = agent("MlpPolicy", env, n_envs=16, seed=0, **kwargs | {"ent_coef": ent_coef}).learn(steps)
    assert last_return(agent) > best - max(0.1, 0.1 * best)


def test_only_a_memory_remembers() -> None:  # passes for 10 of the seeds 0 to 9
    with_memory, without = (
        PPO(
            "MlpPolicy",
            "Memory-v0",
            n_envs=32,
            batch_size=256,
            n_epochs=4,
            policy_kwargs={"net_arch": [32], "gru": gru},
            **FAST,
        )
        for gru in (16, 0)
    )
    assert last_return(with_memory.learn(40_000)) > 0.9
    assert abs(last_return(without.learn(20_000))) < 0.3


@pytest.mark.parametrize("gru", [0, 8])  # each passes for 10 of the seeds 0 to 9
def test_a_truncated_episode_is_worth_what_comes_after(gru: int) -> None:
    policy = {"net_arch": [16], "gru": gru}
    settings: dict[str, Any] = {"n_steps": 20, "n_epochs": 5, "gamma": 0.9, "learning_rate": "linear 3e-2"}
    agent = PPO("MlpPolicy", "Forever-v0", n_envs=8, batch_size=80, **settings, policy_kwargs=policy).learn(12_000)
    inputs = np.zeros((1, 1), dtype=np.float32)
    values = agent.descent.evaluate(inputs[None], np.zeros((1, 1)), agent.network.begin(1))[1]
    assert values.item() == pytest.approx(10, rel=0.1)


@pytest.mark.parametrize("learner", [PPO, REINFORCE])
@pytest.mark.parametrize(
    "kwargs",
    [
        ROUTING,
        {**ROUTING, "normalize_observations": True, "normalize_rewards": True, "temperature": "linear 2 1"},
        {"env": "CartPole-v1", "policy_kwargs": {"net_arch": [8], "gru": 4}},
        {"env": "Masked-v0"},
    ],
)
def test_resume_is_bit_for_bit(learner: Callable[..., Learner], kwargs: dict[str, Any], tmp_path: Path) -> None:
    def make() -> Learner:
        return learner("MlpPolicy", n_envs=4, n_steps=16, learning_rate="linear 1e-3", **kwargs)

    def stop(agent: Learner) -> None:
        if agent.num_timesteps >= cut:
            raise InterruptedError

    whole = make().learn(1500, checkpoint_path=tmp_path / "whole", checkpoint_every=300)
    for cut in (400, 700, 1200):
        run = tmp_path / str(cut)
        with pytest.raises(InterruptedError):
            make().learn(1500, stop, checkpoint_path=run, checkpoint_every=300)
        agent = type(whole).resume(run).learn(checkpoint_path=run, checkpoint_every=300)
        assert agent.num_timesteps == whole.num_timesteps
        for name, weights in whole.network.weights.items():
            assert np.array_equal(weights, agent.network.weights[name])
        assert (run / EPISODES).read_bytes() == (tmp_path / "whole" / EPISODES).read_bytes()
        assert agent.logs.keys() == whole.logs.keys()


def test_the_same_seed_gives_the_same_bits_and_another_does_not() -> None:
    first, second, other = (
        PPO("MlpPolicy", **ROUTING, n_envs=4, n_steps=16, seed=seed).learn(600) for seed in (0, 0, 1)
    )
    assert np.array_equal(first.network.flat, second.network.flat)
    assert not np.array_equal(first.network.flat, other.network.flat)


def test_exploration_is_independent_of_the_environment() -> None:
    """A policy that draws from the stream that the environment was reset by learns worse than one that does not."""
    agent = PPO("MlpPolicy", "CartPole-v1", n_envs=2, seed=5)
    rows = [gymnasium.utils.seeding.np_random(seed)[0] for seed in (5, 6)]
    streams = [generator.bit_generator.state["state"]["inc"] for generator in (*rows, agent.generator)]
    agent.rows.reset(5)
    assert agent.rows.env.unwrapped.np_random.bit_generator.state["state"]["inc"] == streams[0]
    assert len(set(streams)) == 3


def test_all_autoreset_modes_teach_the_same() -> None:
    found = []
    for mode in (AutoresetMode.DISABLED, AutoresetMode.SAME_STEP, AutoresetMode.NEXT_STEP):
        env = gymnasium.make_vec(
            ROUTING["env"], 4, "vector_entry_point", autoreset_mode=mode.value, **ROUTING["env_kwargs"]
        )
        agent = PPO("MlpPolicy", env, n_steps=40, n_epochs=2).learn(160)
        found.append(agent)
    assert np.array_equal(found[0].network.flat, found[1].network.flat)
    frames = [agent.episodes.frame() for agent in found]
    assert frames[0].equals(frames[1])
    assert found[2].num_timesteps == 2 * (160 - 4)  # each of 4 rows spends a step of 40 on a reset
    assert (frames[2]["length"] == 32).all()


def test_steps_spent_on_resets_do_not_count() -> None:
    env = gymnasium.make_vec("CartPole-v1", 4, "vector_entry_point")
    agent = PPO("MlpPolicy", env, n_steps=64, n_epochs=1, normalize_rewards=True).learn(2000)
    frame = agent.episodes.frame()
    assert (frame["length"] == frame["return"]).all()
    assert frame["entropy"].max() <= np.log(2) + 1e-6
    assert frame["timesteps"].is_monotonic_increasing
    unfinished = agent.episodes.carry["length"].sum()
    assert frame["length"].sum() + unfinished == agent.num_timesteps
    assert agent.reward_scale.moments.count == agent.num_timesteps


@pytest.mark.parametrize("gru", [0, 4])
def test_a_rollout_of_resets_alone_is_no_update(gru: int) -> None:
    from gymnasium.vector import SyncVectorEnv

    env = SyncVectorEnv([lambda: gymnasium.make("Target-v0")] * 2, autoreset_mode=AutoresetMode.NEXT_STEP)
    agent = PPO("MlpPolicy", env, n_steps=1, batch_size=1, policy_kwargs={"gru": gru}).learn(10)
    assert agent.num_timesteps == 10
    assert agent.updates.count == 50


def test_masks_come_from_wrapped_and_remote_environments() -> None:
    from gymnasium.vector import AsyncVectorEnv, SyncVectorEnv
    from gymnasium.wrappers.vector import RecordEpisodeStatistics

    makers = [lambda: gymnasium.make("Masked-v0")] * 2
    wrapped = RecordEpisodeStatistics(SyncVectorEnv(makers))
    for env in (wrapped, AsyncVectorEnv(makers, context="fork")):
        agent = PPO("MlpPolicy", env, n_steps=32)
        assert agent.rows.has_masks
        agent.learn(64)  # a masked action would be an error
        agent.close()
    with pytest.raises(ValueError, match="row 1 allows no action"):
        agent.predict(np.zeros((2, 10), np.int8), action_masks=np.eye(2, 10, dtype=bool) & [[True], [False]])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"n_steps": 0}, "n_steps=0: must be a whole number"),
        ({"n_envs": 0}, "n_envs=0"),
        ({"batch_size": None}, "batch_size=None"),
        ({"gamma": 1.1}, "gamma=1.1: must be a finite number of at least 0 and of at most 1"),
        ({"learning_rate": "cosine 1"}, "learning_rate: 'cosine 1' is not"),
        ({"learning_rate": "linear x"}, "learning_rate: could not"),
        ({"temperature": "linear 2 0"}, "temperature='linear 2 0': must be positive"),
        ({"learning_rate": float("nan")}, "learning_rate=nan: must be positive"),
        ({"max_grad_norm": -1}, "max_grad_norm=-1: must be a finite number above 0"),
        ({"clip_range": "linear 0.2"}, "clip_range='linear 0.2': must be a finite number above 0"),
        ({"policy_kwargs": {"hidden": 3}}, "policy_kwargs has hidden; known are net_arch, gru"),
        ({"policy_kwargs": {"net_arch": {"pi": [3]}}}, "must be a list, each a whole number"),
    ],
)
def test_settings_that_cannot_be_meant_are_named(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PPO("MlpPolicy", "Identity-v0", **settings)


def test_no_temperature_for_a_box() -> None:
    with pytest.raises(ValueError, match="temperature is for actions drawn from logits"):
        PPO("MlpPolicy", "Target-v0", temperature=2.0)


def test_nothing_to_do_is_said() -> None:
    agent = PPO("MlpPolicy", "Identity-v0")
    agent.goal = 100
    for steps in (0, -5):
        with pytest.raises(ValueError, match="nothing to do"):
            agent.learn(steps)
    agent.learn(callback=lambda agent: agent.num_timesteps < 100)
    with pytest.raises(ValueError, match="nothing to do"):
        agent.learn()


def test_a_callback_ends_a_training() -> None:
    agent = PPO("MlpPolicy", "Identity-v0", n_envs=2, n_steps=8)
    agent.learn(1000, lambda agent: agent.num_timesteps < 32)
    assert agent.num_timesteps == 32


def test_after_an_error_of_the_environment_episodes_begin_anew() -> None:
    agent = PPO("MlpPolicy", "Masked-v0", n_envs=2, n_steps=8)
    act, agent._act = agent._act, lambda *arguments: (np.array([0, 1]), arguments[1])  # type: ignore[method-assign]
    with pytest.raises(AssertionError, match="a masked action"):
        agent.learn(16)
    agent._act = act  # type: ignore[method-assign]
    agent.learn(64)
    assert (agent.episodes.frame()["length"] == 8).all()


@pytest.mark.parametrize("field", ["reward", "observation"])
def test_what_is_not_finite_is_an_error_that_says_where(field: str) -> None:
    agent = PPO("MlpPolicy", "Broken-v0", n_envs=2, n_steps=8, env_kwargs={"field": field})
    before = agent.network.flat.clone()
    with pytest.raises(NotFiniteError, match=f"Broken-v0: the {field} of row 0 at step [23]"):
        agent.learn(100)
    assert np.array_equal(agent.network.flat, before)


def test_a_gradient_that_is_not_finite_is_an_error() -> None:
    agent = PPO("MlpPolicy", "Forever-v0", n_envs=2, n_steps=8)
    object.__setattr__(agent.settings, "vf_coef", float("inf"))  # which no argument can be
    with pytest.raises(NotFiniteError, match="lower learning_rate"):
        agent.learn(100)
    assert np.isfinite(agent.network.flat.numpy()).all()
    agent.network.weights["policy.bias"][:] = np.nan
    with pytest.raises(NotFiniteError, match="row 0"):
        agent.predict(np.zeros(1, dtype=np.float32))


def test_predict_is_sb3s(tmp_path: Path) -> None:
    agent = PPO("MlpPolicy", **ROUTING, n_envs=4, n_steps=16)
    observations = agent.rows.reset(0)
    actions, state = agent.predict(observations, deterministic=True)
    assert actions.shape == (4,)
    assert state is None
    single, _ = agent.predict(observations[2], deterministic=True)
    assert agent.rows.action_space.contains(single)
    assert single == actions[2]
    agent.save(tmp_path / "agent")
    again, _ = PPO.load(tmp_path / "agent").predict(observations, deterministic=True)
    assert np.array_equal(again, actions)
    masked, _ = agent.predict(observations[0], action_masks=np.arange(8) == 3)
    assert masked == 3
    box = PPO("MlpPolicy", "Target-v0", n_envs=1)
    action, _ = box.predict(np.zeros(1, dtype=np.float32))
    assert box.rows.action_space.contains(action)


def test_the_curves_are_on_tensorboard(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    PPO("MlpPolicy", **ROUTING, n_envs=8, n_steps=32, tensorboard_log=tmp_path).learn(1024)
    events = EventAccumulator(str(tmp_path / "PPO_1")).Reload()
    wanted = {
        *("rollout/ep_rew_mean", "rollout/ep_len_mean", "train/approx_kl", "train/value_loss", "train/entropy_loss"),
        *("time/fps", "reward/quality", "reward/cost", "cost/time", "cost/energy", "routing/experts_used"),
    }
    assert wanted <= set(events.Tags()["scalars"])
    returns = [event.value for event in events.Scalars("rollout/ep_rew_mean")]
    assert len(returns) == 4


def test_episodes_are_what_the_environment_says() -> None:
    agent = PPO("MlpPolicy", **ROUTING, n_envs=8, n_steps=40).learn(640)
    frame = agent.episodes.frame()
    assert len(frame) == 16
    assert (frame["length"] == 32).all()
    np.testing.assert_allclose(frame["return"], frame["reward/quality"] - 0.2 * frame["reward/cost"], atol=1e-6)
    assert frame["routing/experts_used"].between(1, 8).all()
    assert frame["entropy"].between(0, np.log(8) + 1e-6).all()


def test_rows_of_a_group_play_the_same_episodes_and_are_compared() -> None:
    agent = PPO("MlpPolicy", "Identity-v0", n_envs=6, n_steps=16, seed=0, batch_size=96, group_size=3)
    agent.collector.begin(agent.arguments["seed"])
    rollout = agent.collector.collect(16, agent._act)
    seen = rollout.observations.reshape(16, 2, 3, -1)
    np.testing.assert_array_equal(seen, np.broadcast_to(seen[:, :, :1], seen.shape))
    assert (rollout.actions.reshape(16, 2, 3).std(-1) > 0).any()
    assert (seen[:, 0, 0] != seen[:, 1, 0]).any()
    advantages = np.random.default_rng(0).normal(size=(5, 6)).astype(np.float32)
    found = beside_others(advantages, np.zeros((5, 6), dtype=np.bool_), 3)
    np.testing.assert_allclose(found[:, 1], advantages[:, 1] - advantages[:, [0, 2]].mean(1), rtol=1e-5)
    agent.learn(192)


def test_only_advantages_are_relative_to_the_group() -> None:
    """A grouped and an ungrouped learner make batches of one rollout; the value's targets and its log are the same."""
    kwargs: Any = {"n_envs": 6, "n_steps": 16, "seed": 0, "batch_size": 96}
    grouped, alone = (PPO("MlpPolicy", "Identity-v0", group_size=size, **kwargs) for size in (3, 1))
    grouped.collector.begin(0)
    rollout = grouped.collector.collect(16, grouped._act)
    alone.collector = grouped.collector
    relative, plain = (agent._batch(rollout) for agent in (grouped, alone))
    np.testing.assert_array_equal(relative.returns, plain.returns)
    expected = beside_others(plain.advantages.reshape(16, 6), rollout.truncated | rollout.terminated, 3)
    np.testing.assert_array_equal(relative.advantages, expected.ravel())
    assert (relative.advantages != plain.advantages).any()
    assert grouped.log.values["train/explained_variance"] == alone.log.values["train/explained_variance"] != 0


def test_a_group_needs_equal_episodes() -> None:
    with pytest.raises(ValueError, match="group_size=2: episodes of a group ended in different steps"):
        PPO("MlpPolicy", "Counting-v0", n_envs=4, n_steps=64, seed=0, group_size=2).learn(256)
    with pytest.raises(ValueError, match="n_envs=4: must be a multiple of group_size=3"):
        PPO("MlpPolicy", "Counting-v0", n_envs=4, group_size=3).learn(256)
    with pytest.raises(ValueError, match="n_envs=4: must be a multiple of group_size=3"):  # before a run is written
        training.make("Counting-v0", "ppo", "own", {}, 0, {"n_envs": 4, "group_size": 3})


def test_a_policy_of_groups_decides_for_one_row() -> None:
    agent = PPO("MlpPolicy", "Identity-v0", n_envs=4, n_steps=8, batch_size=32, seed=0, group_size=4).learn(32)
    moved = agent.on("Identity-v0")
    assert moved.predict(np.int64(2))[0] == agent.predict(np.int64(2))[0]
    assert moved.learn(32).num_timesteps == 32


def test_target_kl_stops_an_update() -> None:
    runs = [
        PPO("MlpPolicy", **ROUTING, n_envs=8, n_steps=32, learning_rate=0.03, target_kl=limit).learn(512)
        for limit in (None, 0.01)
    ]
    assert runs[0].updates.count == 20
    assert runs[1].updates.count < 20
    assert runs[1].logs["train/approx_kl"] > 0.01


def test_an_update_is_sb3s() -> None:
    """The same weights, rollout and minibatches: SB3's PPO and ours end with the same weights."""
    import stable_baselines3
    import torch
    from stable_baselines3.common.logger import configure

    from agents.sb3 import make_sb3_vec

    rows, steps = 8, 40
    settings: dict[str, Any] = {"n_steps": steps, "batch_size": rows * steps, "n_epochs": 5, "learning_rate": 1e-3}
    settings |= {"gae_lambda": 0.8, "ent_coef": 0.01, "max_grad_norm": 0.05}
    ours = PPO("MlpPolicy", **ROUTING, n_envs=rows, **settings)
    env = make_sb3_vec(ROUTING["env"], rows, **ROUTING["env_kwargs"])
    theirs = stable_baselines3.PPO("MlpPolicy", env, policy_kwargs={"net_arch": [64, 64]}, device="cpu", **settings)

    def their_weights() -> dict[str, np.ndarray]:
        found = {name: value.numpy().T for name, value in theirs.policy.state_dict().items()}
        nets = ("mlp_extractor.policy_net", "mlp_extractor.value_net")
        weights = {f"{k}.weight": np.stack([found[f"{net}.{2 * k}.weight"] for net in nets]) for k in (0, 1)}
        weights |= {f"{k}.bias": np.stack([found[f"{net}.{2 * k}.bias"][None] for net in nets]) for k in (0, 1)}
        weights |= {"policy.weight": found["action_net.weight"], "policy.bias": found["action_net.bias"]}
        return weights | {"value.weight": found["value_net.weight"][:, 0], "value.bias": found["value_net.bias"]}

    for name, values in their_weights().items():
        ours.network.weights[name][:] = values
    ours.collector.begin(0)
    batch = ours._batch(ours.collector.collect(steps, ours._act))
    observations, actions = batch.inputs.reshape(steps, rows, -1), batch.actions.reshape(steps, rows)
    theirs._setup_learn(10**6)
    theirs.set_logger(configure(None, []))
    env.seed(0)
    seen, starts = env.reset(), np.ones(rows, dtype=np.bool_)
    for step in range(steps):
        np.testing.assert_array_equal(seen, observations[step])
        with torch.no_grad():
            values, log_prob, _ = theirs.policy.evaluate_actions(
                torch.from_numpy(observations[step]), torch.from_numpy(actions[step])
            )
        after, rewards, done, _ = env.step(actions[step])
        theirs.rollout_buffer.add(seen, actions[step][:, None], rewards, starts, values[:, 0], log_prob)
        seen, starts = after, done  # type: ignore[assignment]
    with torch.no_grad():
        last = theirs.policy.predict_values(torch.from_numpy(seen))
    theirs.rollout_buffer.compute_returns_and_advantage(last, starts)
    np.testing.assert_allclose(theirs.rollout_buffer.advantages.ravel(), batch.advantages, atol=1e-5)
    theirs.train()
    ours.updates(batch, ours.generator, 1e-3, np.float32(1))
    for name, values in their_weights().items():
        np.testing.assert_allclose(ours.network.weights[name], values, atol=1e-5)


def test_arguments_that_are_no_json_cannot_be_saved(tmp_path: Path) -> None:
    agent = PPO("MlpPolicy", "Forever-v0", env_kwargs={}, n_steps=8)
    agent.arguments["env_kwargs"] = {"made": object()}
    with pytest.raises(ValueError, match="cannot be saved"):
        agent.learn(8, checkpoint_path=tmp_path / "run")
    assert agent.num_timesteps == 0
