"""The numpy passes of networks against torch's autograd, and moments against numpy's."""

from typing import Any

import numpy as np
import pytest
import torch
from gymnasium import spaces

from agents.descent import Descent
from agents.networks import Network
from agents.preprocessing import Moments, Preprocessor
from agents.set_network import SetNetwork
from cost.profile import measure_experts
from experts import bundle
from experts.training import TrainingSettings

NO_STARTS, NO_STATE = np.zeros(0), np.zeros((0, 0), dtype=np.float32)


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize(("net_arch", "free"), [((64, 64), 0), ((16,), 0), ((), 0), ((8, 12, 5), 0), ((64, 32), 3)])
def test_backward_is_autograds(net_arch: tuple[int, ...], free: int, residual: bool) -> None:
    generator = np.random.default_rng(0)
    known = generator.standard_normal((7, 3)).astype(np.float32) if residual else None
    network = Network(7, 3 + free, net_arch, free=free, seed=1, residual=known)
    network.weights["policy.weight"] *= 50
    inputs = generator.standard_normal((40, 7)).astype(np.float32)
    of_head = generator.standard_normal((40, 3 + free)).astype(np.float32)
    of_values = generator.standard_normal(40).astype(np.float32)
    network.forward(inputs[:33])  # other sizes before, in the same memory
    leaf = network.flat.clone().requires_grad_()
    head, values, _ = network.torch_forward(leaf, torch.from_numpy(inputs))
    torch.autograd.backward([head, values], [torch.from_numpy(of_head), torch.from_numpy(of_values)])
    found = network.forward(inputs)
    np.testing.assert_allclose(found[0], head.detach(), atol=1e-5)
    np.testing.assert_allclose(found[1], values.detach(), atol=1e-5)
    np.testing.assert_allclose(network.act(inputs, network.begin(40))[0], found[0], atol=1e-6)
    network.backward(of_head, of_values)
    assert leaf.grad is not None
    scale = float(leaf.grad.abs().max())
    np.testing.assert_allclose(network.flat_gradient / scale, leaf.grad / scale, atol=1e-5)


def test_a_residual_policy_starts_as_the_environment_advises() -> None:
    from agents import PPO
    from agents.baselines import routing
    from agents.evaluate import evaluate

    kwargs = {"bundle": "digits", "cost_weight": 0.4}
    policy = PPO("MlpPolicy", "moe_envs:MoERouting-v0", env_kwargs=kwargs, policy_kwargs={"residual": True})
    policy.network.weights["policy.weight"][:] = 0
    problem = routing.RoutingProblem("moe_envs:MoERouting-v0", 100, "estimates", **kwargs)
    plan = routing.Baseline(routing._plan(problem, 0.0), problem, True)
    found = [evaluate(each, "moe_envs:MoERouting-v0", 100, **kwargs)["return"].mean() for each in (policy, plan)]
    assert found[0] == pytest.approx(found[1], abs=1e-9)
    with pytest.raises(ValueError, match="not normalised"):
        PPO(
            "MlpPolicy", "moe_envs:MoERouting-v0", env_kwargs=kwargs, normalize_observations=True,
            policy_kwargs={"residual": True},
        )  # fmt: skip
    assert PPO("MlpPolicy", "CartPole-v1", policy_kwargs={"residual": True}).network.residual is None


def test_pairs_share_their_weights_beside_one_more_choice() -> None:
    generator, columns = np.random.default_rng(0), np.arange(10).reshape(2, 5)
    network = SetNetwork(columns, np.array([10, 11]), (8, 8), residual=np.ones((12, 13), dtype=np.float32), extra=3)
    network.flat[:] = torch.from_numpy(generator.standard_normal(len(network.flat)).astype(np.float32))
    inputs, order = generator.standard_normal((6, 12)).astype(np.float32), np.array([3, 0, 4, 1, 2])
    head, _ = network.act(inputs, NO_STATE)
    in_torch, values, _ = network.torch_forward(network.flat, torch.from_numpy(inputs))
    np.testing.assert_allclose(head, in_torch, atol=1e-5)
    assert (head.shape, values.shape) == ((6, 13), (6,))
    assert head[:, :10:2] == pytest.approx(np.repeat(inputs.sum(1)[:, None], 5, 1), abs=1e-5)  # "no" is as advised
    other, _ = network.act(np.concatenate([inputs[:, columns[:, order].ravel()], inputs[:, 10:]], 1), NO_STATE)
    np.testing.assert_allclose(other[:, 1:10:2], head[:, 1:10:2][:, order], atol=1e-5)
    np.testing.assert_allclose(other[:, 10:], head[:, 10:], atol=1e-5)


def test_a_gru_acts_as_it_learns() -> None:
    network, generator = Network(5, 4, (8,), gru=6), np.random.default_rng(0)
    inputs = generator.standard_normal((9, 3, 5)).astype(np.float32)
    starts = generator.random((9, 3)) < 0.3
    state = generator.standard_normal((3, 6)).astype(np.float32)
    heads, _ = Descent(network).evaluate(inputs, starts, state)
    for step in range(9):
        head, state = network.act(inputs[step], state * ~starts[step][:, None])
        np.testing.assert_allclose(head, heads[step], atol=1e-6)


def test_a_gru_is_torchs() -> None:
    network, generator = Network(5, 2, (), gru=6, seed=3), np.random.default_rng(0)
    cell = torch.nn.GRUCell(5, 6)
    with torch.no_grad():
        cell.weight_ih.copy_(torch.from_numpy(network.weights["gru.weight"].T))
        cell.weight_hh.copy_(torch.from_numpy(network.weights["gru.state_weight"].T))
        cell.bias_ih.zero_()
        cell.bias_hh.zero_()
        inputs, state = generator.standard_normal((4, 5)).astype(np.float32), np.ones((4, 6), dtype=np.float32)
        _, after = network.act(inputs, state)
        np.testing.assert_allclose(after, cell(torch.from_numpy(inputs), torch.from_numpy(state)), atol=1e-6)


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_descent_is_torchs_adamw_with_clipped_gradients(decay: float) -> None:
    network, generator = Network(4, 2, (8,)), np.random.default_rng(0)
    descent = Descent(network)
    leaf = network.flat.clone().requires_grad_()
    optimizer = torch.optim.AdamW([leaf], lr=0.01, eps=1e-5, weight_decay=decay)
    for step in range(5):
        inputs = generator.standard_normal((20, 4)).astype(np.float32)
        head, values = network.torch_forward(leaf, torch.from_numpy(inputs))[:2]
        optimizer.zero_grad()
        (head.sum() * 3 + values.square().sum()).backward()
        torch.nn.utils.clip_grad_norm_([leaf], 0.5 if step else 1e9)
        optimizer.step()
        _, found = descent.forward(inputs, NO_STARTS, NO_STATE)
        descent.backward(np.full((20, 2), 3, dtype=np.float32), 2 * found)
        descent.step(0.01, 0.5 if step else 1e9, decay)
        np.testing.assert_allclose(network.flat, leaf.detach(), atol=1e-5)


def test_a_gradient_that_is_not_finite_changes_nothing() -> None:
    descent = Descent(Network(4, 2, (8,)))
    before = descent.network.flat.clone()
    descent.network.flat_gradient[3] = np.nan
    assert not np.isfinite(descent.step(0.1, 0.5))
    assert torch.equal(descent.network.flat, before)
    assert not descent.state()["adam"][0].any()


def test_moments_in_parts_are_those_of_the_whole() -> None:
    values, moments = np.random.default_rng(0).standard_normal((1000, 3)) * 5 + 2, Moments(3)
    for part in np.split(values, [1, 10, 500]):
        moments.update(part)
    np.testing.assert_allclose(moments.mean, values.mean(0))
    np.testing.assert_allclose(moments.variance, values.var(0))


def test_observations_are_flat_one_hot_normalised() -> None:
    discrete = Preprocessor(spaces.Discrete(3, start=2))
    assert discrete.flatten(np.array([2, 4])).tolist() == [[1, 0, 0], [0, 0, 1]]
    box = Preprocessor(spaces.Box(-1, 1, (2, 2)), normalize=True)
    flat = box.flatten(np.random.default_rng(0).standard_normal((500, 2, 2)) * 7 + 3)
    box.update(flat)
    assert box(flat).mean(0) == pytest.approx(np.zeros(4), abs=1e-4)
    assert box(flat).std(0) == pytest.approx(np.ones(4), abs=1e-4)
    assert box(flat * 100).max() == 10
    with pytest.raises(ValueError, match="FlattenObservation"):
        Preprocessor(spaces.Dict())


@pytest.mark.skipif(torch.cuda.is_available(), reason="a CUDA device is here")
def test_a_gpu_that_is_not_there_is_said() -> None:
    with pytest.raises(ValueError, match="no CUDA device"):
        Descent(Network(2, 2), "cuda")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_learns_what_the_cpu_learns() -> None:
    networks = [Network(4, 2, (8,)) for _ in range(2)]
    inputs = np.random.default_rng(0).standard_normal((20, 4)).astype(np.float32)
    for network, device in zip(networks, ("cpu", "cuda"), strict=True):
        descent = Descent(network, device)
        for _ in range(3):
            head, values = descent.forward(inputs, NO_STARTS, NO_STATE)
            descent.backward(head, values)
            descent.step(0.01, 0.5)
    np.testing.assert_allclose(networks[0].flat, networks[1].flat, atol=1e-5)


def test_an_equivariant_policy_serves_any_order_and_number_of_actions() -> None:
    from agents import PPO

    kwargs, sizes = {"bundle": "digits"}, {"equivariant": True, "residual": True, "net_arch": [16, 8]}
    policy = PPO("MlpPolicy", "moe_envs:MoERouting-v0", env_kwargs=kwargs, n_envs=4, policy_kwargs=sizes, seed=3)
    policy.network.weights["policy.weight"] *= 100
    observations = policy.get_env().reset(seed=0)[0]
    layout: Any = policy.get_env().unwrapped.observation_layout  # type: ignore[attr-defined]
    order, mixed = np.random.default_rng(0).permutation(8), observations.copy()
    for part in layout.values():
        if part.slice.stop - part.slice.start == 8:
            mixed[:, part.slice] = observations[:, part.slice][:, order]
    heads = [policy.network.act(each, np.zeros((4, 0)))[0] for each in (observations, mixed)]
    np.testing.assert_allclose(heads[1], heads[0][:, order], rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        head, values, _ = policy.network.torch_forward(policy.network.flat, torch.from_numpy(observations))
    np.testing.assert_allclose(head, heads[0], rtol=1e-4, atol=1e-4)
    assert values.shape == (4,)
    inputs, labels = np.random.default_rng(0).normal(size=(200, 4)).astype(np.float32), np.arange(200) % 2
    settings = TrainingSettings(widths=(2, 4, 8), epochs=1)
    other = bundle.build("three", inputs, labels, settings=settings, profile=measure_experts, progress=False)
    moved = policy.on("moe_envs:MoERouting-v0", {"bundle": str(other.path)})
    assert moved.predict(moved.get_env().reset(seed=0)[0])[0].max() < 3
    assert torch.equal(moved.network.flat, policy.network.flat)
    plain = PPO("MlpPolicy", "moe_envs:MoERouting-v0", env_kwargs=kwargs, n_envs=1)
    with pytest.raises(ValueError, match="other weights"):
        plain.on("moe_envs:MoERouting-v0", {"bundle": str(other.path)})
    for wrong, message in ((("CartPole-v1", {}), "one number for each action"), (("Pendulum-v1", {}), "discrete")):
        with pytest.raises(ValueError, match=message):
            PPO("MlpPolicy", wrong[0], policy_kwargs={"equivariant": True})


def test_one_policy_trains_on_several_bundles_and_weights() -> None:
    from agents import PPO

    kwargs = {"bundle": ["digits", "fashion-mnist"], "cost_weight": [0.1, 0.4]}
    policy = PPO(
        "MlpPolicy", "moe_envs:MoERouting-v0", env_kwargs=kwargs, n_envs=8, n_steps=8, batch_size=32,
        policy_kwargs={"equivariant": True, "residual": True, "net_arch": [8]},
    )  # fmt: skip
    advised = policy.on("moe_envs:MoERouting-v0", {"bundle": "digits"}).network.residual
    np.testing.assert_array_equal(policy.network.residual, advised)
    assert advised is not None
    before = policy.network.flat.clone()
    policy.learn(128)
    assert not torch.equal(policy.network.flat, before)
    with pytest.raises(ValueError, match="4 pairs for 3 rows"):
        PPO("MlpPolicy", "moe_envs:MoERouting-v0", env_kwargs=kwargs, n_envs=3)
