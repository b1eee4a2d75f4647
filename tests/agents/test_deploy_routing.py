"""A deployed router decides, costs and answers as its policy did in the environment."""

from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch

from agents import PPO
from agents.baselines.routing import Baseline, RoutingProblem, _plan
from agents.deploy.routing import RoutedMoE
from experts import bundle as bundles
from experts import data

ID = "moe_envs:MoERouting-v0"


def policies() -> list[tuple[str, dict[str, Any], Any]]:
    import stable_baselines3 as sb3

    from agents.sb3 import make_sb3_vec

    found = []
    for action in ("expert", "subset"):
        kwargs = {"bundle": "digits", "action": action, "cost_weight": 0.1}
        own = PPO(
            "MlpPolicy", ID, env_kwargs=kwargs, n_envs=16, n_steps=32, n_epochs=5, policy_kwargs={"residual": True}
        ).learn(15_000)
        found.append((f"own {action}", kwargs, own))
        model = sb3.PPO("MlpPolicy", make_sb3_vec(ID, 16, **kwargs), n_steps=32, batch_size=256, device="cpu", seed=0)
        found.append((f"sb3 {action}", kwargs, model.learn(4_000)))
    return found


def test_a_deployed_router_is_the_environments_policy() -> None:
    loaded = bundles.load("digits")
    inputs, labels = data.load("digits")["test"]
    for name, kwargs, policy in policies():
        routed = RoutedMoE(loaded, policy, kwargs)
        assert name.startswith("own") or all(weights.requires_grad for weights in policy.policy.parameters())
        env: Any = gymnasium.make(ID, **kwargs, split="test").unwrapped
        deployed, played, chosen = [], [], []
        for episode in range(20):
            observation, _ = env.reset(seed=episode)
            batch = env.batch_inputs()
            actions = []
            for _ in range(32):
                action, _ = policy.predict(observation, deterministic=True)
                actions.append(action)
                observation, _, ended, _, info = env.step(action)
                played.append(info["reward/quality"] * 32)
            assert ended
            with torch.inference_mode():
                x = torch.from_numpy(inputs[batch])
                deployed += (routed(x).argmax(1).numpy() == labels[batch]).astype(float).tolist()
                members = routed.route(x, routed.gate(routed.trunk(x))).numpy()
            wanted = np.array(actions) == 1 if kwargs["action"] == "subset" else np.eye(8)[np.array(actions)] > 0
            chosen.append((members == wanted).all(1).mean())
        assert np.mean(chosen) >= 0.999, name
        assert np.mean(deployed) == pytest.approx(np.mean(played), abs=0.002), name


def test_experts_that_are_not_chosen_are_not_run() -> None:
    kwargs = {"bundle": "digits"}
    policy = PPO("MlpPolicy", ID, env_kwargs=kwargs, n_envs=1)
    policy.network.weights["policy.bias"][:] = np.eye(8, dtype=np.float32)[5] * 100
    routed = RoutedMoE("digits", policy, kwargs)
    ran: list[tuple[int, int]] = []
    for number, expert in enumerate(routed.experts):
        expert.register_forward_hook(lambda module, given, output, n=number: ran.append((n, len(output))))
    with torch.inference_mode():
        assert routed(torch.rand(70, 64)).shape == (70, 10)
    assert ran == [(5, 70)]


@pytest.mark.filterwarnings("ignore::FutureWarning")  # torch's exporter on its own functions
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_the_onnx_model_gives_the_same_answers(tmp_path: Path) -> None:
    runtime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    kwargs = {"bundle": "digits", "cost_weight": 0.1, "batch_size": 8}
    policy = PPO("MlpPolicy", ID, env_kwargs=kwargs, n_envs=16, n_steps=32, n_epochs=5).learn(8_000)
    routed = RoutedMoE("digits", policy, kwargs)
    routed.export_onnx(tmp_path / "routed.onnx", batch_size=16)
    assert len(list(tmp_path.iterdir())) == 1
    session = runtime.InferenceSession(str(tmp_path / "routed.onnx"))
    x = data.load("digits")["test"][0][:16]
    (found,) = session.run(None, {"input": x})
    with torch.inference_mode():
        np.testing.assert_allclose(found, routed(torch.from_numpy(x)), atol=1e-4)


def test_what_cannot_be_deployed_is_said() -> None:
    with pytest.raises(ValueError, match="gru=0"):
        RoutedMoE("digits", PPO("MlpPolicy", ID, env_kwargs={"bundle": "digits"}, n_envs=1, policy_kwargs={"gru": 4}))
    with pytest.raises(ValueError, match="top-m"):
        RoutedMoE("digits", PPO("MlpPolicy", ID, env_kwargs={"bundle": "digits"}, n_envs=1), {"action": "top-m"})
    with pytest.raises(ValueError, match="the policy observes"):
        RoutedMoE("digits", PPO("MlpPolicy", ID, env_kwargs={"bundle": "digits"}, n_envs=1), {"action": "subset"})


def test_dqn_and_qr_dqn_are_deployed_and_recurrent_policies_refused() -> None:
    from agents.sb3 import make_algorithm, make_sb3_vec

    kwargs = {"bundle": "digits"}
    env = gymnasium.make(ID, **kwargs)
    observations = np.stack([env.reset(seed=seed)[0] for seed in range(50)])
    settings = {"learning_starts": 100, "policy_kwargs": {"net_arch": [8]}}
    for algo in ("dqn", "qrdqn"):
        model = make_algorithm(algo, make_sb3_vec(ID, 4, **kwargs), 0, settings)
        routed = RoutedMoE("digits", model, kwargs)
        wanted, _ = model.predict(observations, deterministic=True)
        assert (routed.policy(torch.from_numpy(observations)).argmax(1).numpy() == wanted).all()
    model = make_algorithm("ppo_lstm", make_sb3_vec(ID, 4, **kwargs), 0, {"n_steps": 8})
    with pytest.raises(ValueError, match="RecurrentActorCriticPolicy is not deployed"):
        RoutedMoE("digits", model, kwargs)


def test_an_empty_batch_has_no_answers() -> None:
    routed = RoutedMoE("digits", PPO("MlpPolicy", ID, env_kwargs={"bundle": "digits"}, n_envs=1))
    assert routed(torch.zeros(0, 64)).shape == (0, 10)


def test_the_plan_is_deployed_as_the_rule_that_it_is() -> None:
    kwargs = {"bundle": "digits", "cost_weight": 0.2}
    problem = RoutingProblem(ID, 10, "estimates", **kwargs)
    rule = Baseline(_plan(problem, 0.0), problem, single=True)
    env: Any = gymnasium.make_vec(ID, 50, "vector_entry_point", **kwargs, split="test").unwrapped
    observation, _ = env.reset(seed=0)
    rows = np.array([env.tables.batch(batch)[:-1] for batch in env.batch])
    chosen = []
    for _ in range(32):
        action, _ = rule.predict(observation)
        chosen.append(action)
        observation, *_ = env.step(action)
    routed = RoutedMoE("digits", "plan", kwargs)
    with torch.inference_mode():
        x = torch.from_numpy(data.load("digits")["test"][0][rows.ravel()])
        members = routed.route(x, routed.gate(routed.trunk(x))).numpy()
    assert (members.argmax(1) == np.transpose(chosen).ravel()).mean() > 0.999
    with pytest.raises(ValueError, match='policy="plan" needs'):
        RoutedMoE("digits", "plan", {"observation": "features"})
    with pytest.raises(ValueError, match="'pln': must be"):
        RoutedMoE("digits", "pln", kwargs)  # type: ignore[arg-type]


def test_fewer_points_are_searched_with_little_loss() -> None:
    kwargs = {"bundle": "digits", "cost_weight": 0.2}
    inputs, labels = (torch.from_numpy(each) for each in data.load("digits")["test"])
    right = {}
    for points in (None, 400, 10**9):
        routed = RoutedMoE("digits", "plan", kwargs, points=points)
        with torch.inference_mode():
            right[points] = float((routed(inputs).argmax(1) == labels).float().mean())
        assert len(routed.estimator.points_NF) == (400 if points == 400 else 800)  # type: ignore[union-attr]
    assert right[10**9] == right[None]
    assert right[None] - 0.05 < right[400]
    of_features = {"bundle": "digits", "observation": "features"}
    policy = PPO("MlpPolicy", ID, env_kwargs=of_features, n_envs=1)
    assert RoutedMoE("digits", policy, of_features).estimator is None
    with pytest.raises(ValueError, match="searches no neighbours"):
        RoutedMoE("digits", policy, of_features, points=5)
    with pytest.raises(ValueError, match="points=0"):
        RoutedMoE("digits", "plan", kwargs, points=0)
