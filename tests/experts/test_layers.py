"""The MoE layer against a plain loop over inputs, Hugging Face's block, and itself in its other forms."""

from typing import Any

import pytest
import torch
from torch import nn

from experts.graph import ExpertGraph
from experts.layers import MoELayer
from experts.routers import ROUTERS, Router, TopK, WithNull

D, FF, E = 12, 20, 4


def layer(router: str | Router = "topk", **options: Any) -> MoELayer:
    torch.manual_seed(0)
    return MoELayer(D, FF, E, 2, router, **options)


def inputs(count: int = 30) -> torch.Tensor:
    return torch.randn(count, D, generator=torch.Generator().manual_seed(1))


def by_loop(layer: MoELayer, x: torch.Tensor) -> torch.Tensor:
    """Each expert on all inputs, in plain torch."""
    routing = layer.router(layer.gate(x))
    return sum(routing.weights[:, number, None] * expert(x) for number, expert in enumerate(layer.experts))  # type: ignore[return-value]


def gradients(layer: MoELayer, x: torch.Tensor, y: torch.Tensor) -> list[torch.Tensor]:
    found = torch.autograd.grad(y.square().sum(), [x, *layer.parameters()], allow_unused=True)
    return [torch.zeros(()) if each is None else each for each in found]


@pytest.mark.parametrize("count", [1, 7, 300])  # 300: segments of more than 64 rows take another product
@pytest.mark.parametrize("router", ROUTERS)
def test_outputs_and_gradients_are_those_of_a_plain_loop(router: str, count: int) -> None:
    moe, x = layer(router), inputs(count).requires_grad_()
    y, _ = moe(x)
    wanted = by_loop(moe, x)
    torch.testing.assert_close(y, wanted, atol=1e-6, rtol=1e-5)
    for found, plain in zip(gradients(moe, x, y), gradients(moe, x, wanted), strict=True):
        torch.testing.assert_close(found, plain if found.shape else plain.sum(), atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("other", [{"recompute": True}, {"products": "grouped"}])
def test_other_ways_give_the_same(other: dict[str, Any]) -> None:
    x = inputs(200).requires_grad_()
    first, second = layer(products="segments"), layer(**other)
    ours, theirs = first(x)[0], second(x)[0]
    torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-5)
    for found, plain in zip(gradients(first, x, ours), gradients(second, x, theirs), strict=True):
        torch.testing.assert_close(found, plain, atol=2e-5, rtol=1e-4)
    with torch.inference_mode():
        torch.testing.assert_close(first(x)[0], ours, atol=1e-6, rtol=1e-5)


def test_an_expert_that_nobody_asked_has_no_gradient() -> None:
    moe = layer()
    moe(inputs(1))[0].sum().backward()
    assert sum(expert.w_in.grad is None for expert in moe.experts) == E - 2


@pytest.mark.parametrize("count", [1, 5, 300])
def test_numbers_are_those_of_hugging_face(count: int) -> None:
    mixtral = pytest.importorskip("transformers.models.mixtral.modeling_mixtral", reason="pip install moe-envs[hf]")
    from transformers import MixtralConfig

    torch.manual_seed(0)
    config = MixtralConfig(hidden_size=D, intermediate_size=FF, num_local_experts=E, num_experts_per_tok=2)
    config._experts_implementation = "eager"
    block = mixtral.MixtralSparseMoeBlock(config)
    for parameter in block.parameters():
        nn.init.normal_(parameter, std=0.3)
    x = inputs(count)
    ours, _ = MoELayer.from_block(block)(x[None])
    torch.testing.assert_close(ours, block(x[None]), atol=1e-4, rtol=1e-4)


def test_other_blocks_are_refused() -> None:
    with pytest.raises(ValueError, match="Linear is not a block"):
        MoELayer.from_block(nn.Linear(3, 3))


def test_autocast_and_low_precision_weights() -> None:
    moe, x = layer(), inputs(100)
    exact = moe(x)[0]
    with torch.autocast("cpu", torch.bfloat16):
        rough = moe(x)[0]
    assert rough.dtype == torch.bfloat16
    torch.testing.assert_close(rough.float(), exact, atol=0.05, rtol=0.05)
    assert moe.to(torch.bfloat16)(x.bfloat16())[0].dtype == torch.bfloat16


@pytest.mark.filterwarnings("ignore:The .grad attribute", "ignore:.*should not be instantiated")  # dynamo does both
def test_compiled_gives_the_same() -> None:
    moe, x = layer(), inputs(50)
    compiled = torch.compile(moe, backend="eager")
    torch.testing.assert_close(compiled(x)[0], moe(x)[0])


def test_copy_and_zero_experts() -> None:
    moe, x = layer(TopK(6), copy_experts=1, zero_experts=1), inputs()
    weights = moe.router(moe.gate(x)).weights
    real = sum(weights[:, number, None] * expert(x) for number, expert in enumerate(moe.experts))
    torch.testing.assert_close(moe(x)[0], real + weights[:, 4, None] * x, atol=1e-6, rtol=1e-5)
    null = layer(WithNull(TopK(2), 1), zero_experts=1)
    assert float(null(x)[1].members.shape[1]) == E + 1


def test_experts_and_routers_of_one_s_own() -> None:
    own = [nn.Sequential(nn.Linear(D, 3), nn.Tanh(), nn.Linear(3, D)) for _ in range(E)]
    moe, x = layer(experts=own), inputs()
    torch.testing.assert_close(moe(x)[0], by_loop(moe, x), atol=1e-6, rtol=1e-5)
    with pytest.raises(ValueError, match="2 experts are given"):
        layer(experts=own[:2])


@pytest.mark.parametrize("mode", ["sum", "weighted", "conv"])
def test_a_graph_mixes_what_the_team_returns(mode: str) -> None:
    torch.manual_seed(3)
    graph = ExpertGraph(E, mode, "random", width=D if mode == "conv" else None)
    if graph.convolution is not None:
        nn.init.normal_(graph.convolution)
    moe, x = layer(graph=graph), inputs()
    routing = moe.router(moe.gate(x))
    outputs = torch.stack([expert(x) for expert in moe.experts], dim=1)
    torch.testing.assert_close(moe(x)[0], graph(outputs, routing.weights, routing.members), atol=1e-5, rtol=1e-4)
    moe(x)[0].square().sum().backward()
    assert graph.edges.grad is not None
    assert graph.edges.grad.abs().max() > 1e-6


def test_no_inputs_and_more_axes() -> None:
    moe = layer()
    assert moe(inputs(0))[0].shape == (0, D)
    y, statistics = moe(inputs(30).view(2, 15, D))
    assert y.shape == (2, 15, D)
    assert statistics.members.shape == (30, E)
    torch.testing.assert_close(y.view(30, D), moe(inputs(30))[0])


def test_a_noisy_router_needs_the_generator() -> None:
    moe, x = layer(TopK(2, noise=2.0)), inputs()
    noisy = [moe(x, torch.Generator().manual_seed(seed))[0] for seed in (0, 0, 1)]
    assert torch.equal(noisy[0], noisy[1])
    assert not torch.equal(noisy[0], noisy[2])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_on_a_gpu() -> None:
    moe, x = layer().to(torch.bfloat16), inputs(200).bfloat16()
    plain = moe(x)[0].float()
    torch.testing.assert_close(moe.cuda()(x.cuda())[0].float().cpu(), plain, atol=0.05, rtol=0.05)


@pytest.mark.parametrize("wrong", [{"products": "fast"}, {"zero_experts": -1}, {"graph": ExpertGraph(3)}])
def test_what_cannot_be_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"fast|at least|nodes"):
        layer(**wrong)
