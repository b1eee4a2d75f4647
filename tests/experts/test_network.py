"""The network of several MoE layers: its training, its losses, and its file."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from experts import data
from experts.checkpoints import load_model, save_model
from experts.data import DataError
from experts.layers import MoELayer
from experts.losses import (
    diversity_loss,
    drift_loss,
    entropy_weighted_balance_loss,
    load_balancing_loss,
)
from experts.network import MoENetwork, NetworkSettings, network_loss, train_network
from experts.routers import TopK


def make(**options: object) -> Callable[[], MoENetwork]:
    return lambda: MoENetwork(64, 10, d_model=24, d_ff=16, num_experts=4, **options)  # type: ignore[arg-type]


def digits(split: str) -> tuple[np.ndarray, np.ndarray]:
    return data.load("digits")[split]


def accuracy(network: MoENetwork) -> float:
    inputs, labels = digits("validation")
    with torch.inference_mode():
        return float((network(torch.from_numpy(inputs))[0].argmax(1).numpy() == labels).mean())


KINDS: list[dict[str, object]] = [  # each passes for 10 of the seeds 0 to 9
    {},
    {"router": "hierarchical"},
    {"graph": {"init": "random"}},
    {"k": 3, "zero_experts": 2},
]


@pytest.mark.parametrize("options", KINDS, ids=str)
def test_it_learns_the_digits_with_every_expert_at_work(options: dict[str, object]) -> None:
    before = torch.get_rng_state(), torch.get_num_threads()
    network = train_network(make(**options), *digits("rl_train"), NetworkSettings(epochs=15, batch_size=32))
    assert torch.equal(before[0], torch.get_rng_state())
    assert before[1] == torch.get_num_threads()
    assert accuracy(network) > 0.9
    with torch.inference_mode():
        statistics = network(torch.from_numpy(digits("validation")[0]))[1]
    assert len(statistics) == 2
    assert all(float(found.utilisation) > 0.85 for found in statistics)


def test_the_same_seed_gives_the_same_weights() -> None:
    settings = NetworkSettings(epochs=1, balance=0.1, diversity=0.1, drift=1.0, z=0.01, entropy_weighted=True)
    first, second = (train_network(make(graph={}), *digits("rl_train"), settings) for _ in range(2))
    assert all(torch.equal(*pair) for pair in zip(first.parameters(), second.parameters(), strict=True))


def test_experts_begin_the_same_whatever_gates_and_graphs_are_theirs() -> None:
    first = []
    for options in ({}, {"graph": {"init": "random"}}, {"zero_experts": 2, "k": 3}):
        torch.manual_seed(0)
        network = make(**options)()
        first.append(
            torch.cat([weights.flatten() for layer in network.layers for weights in layer.experts.parameters()])
        )  # type: ignore[union-attr]
    assert torch.equal(first[0], first[1])
    assert torch.equal(first[0], first[2])


def test_experts_that_are_held_to_their_average_drift_less() -> None:  # passes for 10 of the seeds 0 to 9
    def moved(drift: float) -> float:
        """Of the layers, from their first weights to their last."""
        kept: list[torch.Tensor] = []

        def keep(epoch: int, network: MoENetwork) -> None:
            kept.append(torch.cat([weights.detach().flatten() for weights in network.layers.parameters()]))

        settings = NetworkSettings(epochs=4, batch_size=32, drift=drift)
        train_network(make(), *digits("rl_train"), settings, keep)
        return float((kept[-1] - kept[0]).norm())

    assert moved(100.0) < 0.8 * moved(0.0)


def test_a_diversity_loss_makes_experts_differ() -> None:  # passes for 10 of the seeds 0 to 9
    def likeness(diversity: float) -> float:
        settings = NetworkSettings(epochs=6, batch_size=32, diversity=diversity)
        network = train_network(make(), *digits("rl_train"), settings)
        with torch.inference_mode():
            return float(sum(diversity_loss(each) for each in network.probe(torch.from_numpy(digits("validation")[0]))))

    assert likeness(0.5) < 0.7 * likeness(0.0)


def test_losses_by_hand() -> None:
    logits = torch.tensor([[4.0, 0.0], [0.0, 0.0]])
    chosen = torch.tensor([[True, False], [False, True]])
    p = torch.tensor([4.0, 0.0]).softmax(0)
    assert load_balancing_loss(logits, chosen).item() == pytest.approx(1.0)
    sure = float(-(p * p.log()).sum() / np.log(2))  # the second input, not sure at all, counts 1
    weights = torch.tensor([sure, 1.0]) / (sure + 1)
    share, mean = weights, torch.stack([weights[0] * p[0] + weights[1] / 2, weights[0] * p[1] + weights[1] / 2])
    wanted = (sure + 1) / 2 * 2 * float((share * mean).sum())
    assert entropy_weighted_balance_loss(logits, chosen).item() == pytest.approx(wanted, rel=1e-5)
    same = torch.randn(8, 1, 3).expand(8, 2, 3) * torch.tensor([1.0, -2.0])[None, :, None]
    assert diversity_loss(same).item() == pytest.approx(1.0)
    apart = torch.tensor([[[1.0], [1.0]], [[-1.0], [1.0]], [[1.0], [-1.0]], [[-1.0], [-1.0]]])
    assert diversity_loss(apart).item() == pytest.approx(0.0)
    assert drift_loss([torch.tensor([3.0, 4.0])], [torch.tensor([0.0, 4.0])]).item() == pytest.approx(9 / 16)


def test_each_weight_of_the_settings_adds_its_loss() -> None:
    torch.manual_seed(0)
    network = make(graph={"init": "random"})()
    x, y = (torch.from_numpy(each[:40]) for each in digits("rl_train"))
    averages = [[weights.detach() + 1 for weights in layer.experts.parameters()] for layer in network.layers
                if isinstance(layer, MoELayer)]  # fmt: skip

    def loss(**weights: float) -> float:
        none = {"balance": 0.0, "sparsity": 0.0}
        return network_loss(network, x, y, NetworkSettings(**{**none, **weights}), averages).item()

    _, statistics = network(x)
    assert loss(z=2.0) - loss() == pytest.approx(2 * sum(each.z_loss.item() for each in statistics), rel=1e-4)
    assert loss(balance=2.0) - loss() == pytest.approx(
        2 * sum(each.balance_loss.item() for each in statistics), rel=1e-4
    )
    edges = sum(layer.graph.sparsity_loss().item() for layer in network.layers)  # type: ignore[union-attr, operator]
    assert loss(sparsity=2.0) - loss() == pytest.approx(2 * edges, rel=1e-4)
    probed = sum(diversity_loss(each).item() for each in network.probe(x[:32]))
    assert loss(diversity=2.0) - loss() == pytest.approx(2 * probed, rel=1e-4)
    assert loss(drift=2.0) > loss() + 0.1


def test_its_file_is_whole_or_refused(tmp_path: Path) -> None:
    path, network = (
        tmp_path / "network.safetensors",
        make(router="top-p", router_options={"p": 0.7}, graph={"mode": "conv"})(),
    )
    save_model(network, path)
    restored, x = load_model(path, MoENetwork), torch.rand(9, 64)
    torch.testing.assert_close(restored(x)[0], network(x)[0], atol=0, rtol=0)
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 1
    path.write_bytes(raw)
    with pytest.raises(DataError, match="damaged"):
        load_model(path, MoENetwork)
    path.write_bytes(b"{}")
    with pytest.raises(DataError, match="damaged or no safetensors file"):
        load_model(path, MoENetwork)
    save_model(network.bfloat16(), path)
    assert all(weights.dtype == torch.float32 for weights in load_model(path, MoENetwork).parameters())
    with pytest.raises(ValueError, match="state_dict"):
        save_model(make(router=TopK(2))(), path)
