"""The MoE layer against a plain loop over inputs, Hugging Face's block, and itself in its other forms."""

import shutil
from collections.abc import Callable
from pathlib import Path
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


@pytest.mark.parametrize("options", [{}, {"products": "grouped"}, {"graph": ExpertGraph(E, "conv", width=D)}], ids=str)
def test_an_expert_that_nobody_asked_has_no_gradient(options: dict[str, Any]) -> None:
    moe = layer(**options)
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
    ours = MoELayer.from_block(block)(x[None])
    torch.testing.assert_close(ours, block(x[None]), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("normalize", [True, False])
def test_blocks_that_do_not_normalise_are_taken_and_those_with_more_refused(normalize: bool) -> None:
    pytest.importorskip("transformers", reason="pip install moe-envs[hf]")
    from transformers import Qwen2MoeConfig, Qwen3MoeConfig
    from transformers.models.qwen2_moe.modeling_qwen2_moe import Qwen2MoeSparseMoeBlock
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock

    torch.manual_seed(0)
    sizes: dict[str, Any] = {"hidden_size": D, "moe_intermediate_size": FF, "num_experts": E, "num_experts_per_tok": 2}
    taken = Qwen3MoeConfig(**sizes, norm_topk_prob=normalize)
    refused = Qwen2MoeConfig(**sizes, shared_expert_intermediate_size=FF)
    blocks: list[Any] = [Qwen3MoeSparseMoeBlock(taken), Qwen2MoeSparseMoeBlock(refused)]
    for block, config in zip(blocks, (taken, refused), strict=True):
        config._experts_implementation = "eager"
        for parameter in block.parameters():
            nn.init.normal_(parameter, std=0.3)
    x = inputs(20)[None]
    torch.testing.assert_close(MoELayer.from_block(blocks[0])(x), blocks[0](x), atol=1e-4, rtol=1e-4)
    with pytest.raises(ValueError, match="answers otherwise"):
        MoELayer.from_block(blocks[1])


def test_other_blocks_are_refused() -> None:
    with pytest.raises(ValueError, match="Linear is not a block"):
        MoELayer.from_block(nn.Linear(3, 3))


FORMS: dict[str, Callable[[], dict[str, Any]]] = {
    "plain": dict,
    "weighted graph": lambda: {"graph": ExpertGraph(E, init="random")},
    "conv graph": lambda: {"graph": ExpertGraph(E, "conv", "random", width=D)},
    "own experts": lambda: {"experts": [nn.Linear(D, D) for _ in range(E)]},
    "copy expert": lambda: {"copy_experts": 1},
    "switch and graph": lambda: {"router": "switch", "graph": ExpertGraph(E, init="random")},
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_and_low_precision_weights(form: str, dtype: torch.dtype) -> None:
    moe, x = layer(**FORMS[form]()), inputs(100)
    exact = moe(x)[0]
    with torch.autocast("cpu", dtype):
        rough = moe(x)[0]
    assert rough.dtype == dtype
    assert (rough.float() - exact).abs().median().item() < 0.02  # a choice may be another one
    rough.float().square().mean().backward()
    assert all(each.grad is None or bool(each.grad.isfinite().all()) for each in moe.parameters())
    assert moe.to(dtype)(x.to(dtype))[0].dtype == dtype


@pytest.mark.filterwarnings("ignore:The .grad attribute", "ignore:.*should not be instantiated")  # dynamo does both
@pytest.mark.filterwarnings("ignore:.*torch.jit.script_method")
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled_gives_the_same(backend: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))  # code there may be for other vector instructions
    if backend == "inductor" and shutil.which("g++") is None:
        pytest.skip("no g++")
    if backend == "inductor" and torch.backends.cpu.get_cpu_capability() == "DEFAULT":
        pytest.skip("torch writes vector code, which does not compile without vector instructions")
    moe, x = layer(), inputs(400).requires_grad_()
    compiled = torch.compile(moe, backend=backend)
    y, wanted = compiled(x)[0], moe(x)[0]
    torch.testing.assert_close(y, wanted)
    for found, plain in zip(gradients(moe, x, y), gradients(moe, x, wanted), strict=True):
        torch.testing.assert_close(found, plain, atol=2e-5, rtol=1e-4)


def test_copy_and_zero_experts() -> None:
    moe, x = layer(TopK(3), copy_experts=1, zero_experts=1), inputs()
    weights = moe.router(moe.gate(x)).weights
    real = sum(weights[:, number, None] * expert(x) for number, expert in enumerate(moe.experts))
    torch.testing.assert_close(moe(x)[0], real + weights[:, 4, None] * x, atol=1e-6, rtol=1e-5)
    null = layer(WithNull(TopK(2), 1), zero_experts=1)
    torch.testing.assert_close(null(x)[0], by_loop(null, x), atol=1e-6, rtol=1e-5)
    answering = null.router(null.gate(x)).members.sum(1).float().mean()
    assert float(null(x)[1].experts_per_input) == pytest.approx(float(answering))
    assert float(answering) < 2


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


@pytest.mark.parametrize("router", ROUTERS)
def test_no_inputs(router: str) -> None:
    assert layer(router)(inputs(0))[0].shape == (0, D)
    assert layer(router, products="grouped")(inputs(0))[0].shape == (0, D)


def test_what_a_router_may_not_return() -> None:
    moe = layer(lambda logits, generator=None: TopK(2)(logits[:9]))
    with pytest.raises(ValueError, match="30 inputs and 4 columns"):
        moe(inputs())
    with pytest.raises(ValueError, match="columns of the gate"):
        layer(WithNull(TopK(2), 1))(inputs())  # without a zero expert


def test_frozen_experts_pay_for_no_gradient_and_hooks_are_called() -> None:
    moe, x = layer(), inputs().requires_grad_()
    moe.experts.requires_grad_(False)
    wanted = gradients(moe.requires_grad_(), x, moe(x)[0])[0]
    moe.experts.requires_grad_(False)
    torch.testing.assert_close(torch.autograd.grad(moe(x)[0].square().sum(), x)[0], wanted)
    seen: list[int] = []
    moe.experts[2].register_forward_hook(lambda module, given, output: seen.append(len(output)))
    y, statistics = moe(x)
    torch.testing.assert_close(y, by_loop(moe, x), atol=1e-6, rtol=1e-5)
    assert seen[:1] == [int(statistics.members[:, 2].sum())]


def test_more_axes() -> None:
    moe = layer()
    torch.testing.assert_close(moe(inputs(1)[0])[0], moe(inputs(1))[0][0])
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
    torch.manual_seed(0)
    for dtype in (torch.float32, torch.bfloat16):
        moe, x = (
            MoELayer(32, 64, E).to(dtype),
            torch.randn(200, 32, generator=torch.Generator().manual_seed(1), dtype=dtype),
        )
        plain = moe(x)[0]
        plain.square().sum().backward()
        wanted = [each.grad.float() for each in moe.parameters() if each.grad is not None]
        moe.zero_grad()
        found = moe.cuda()(x.cuda())[0]
        found.square().sum().backward()
        torch.testing.assert_close(found.float().cpu(), plain.float(), atol=0.05, rtol=0.05)
        for each, other in zip((p.grad for p in moe.parameters() if p.grad is not None), wanted, strict=True):
            torch.testing.assert_close(each.float().cpu(), other, atol=0.5, rtol=0.1)


@pytest.mark.parametrize("wrong", [{"products": "fast"}, {"zero_experts": -1}, {"graph": ExpertGraph(3)}])
def test_what_cannot_be_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"fast|at least|nodes"):
        layer(**wrong)
