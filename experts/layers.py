"""Mixture-of-Experts layer with any router; rows are sorted once by expert and gradients are per expert.

Rows are gathered by expert into contiguous segments, and every segment is one product with the weights of its expert.
Each expert has separate parameters, so that an unused expert has no gradient instead of a gradient of zeros. Products
are chosen by size and device: oneDNN's for segments of many rows on a CPU, BLAS for few, `grouped_mm` for bfloat16 on a
GPU.

Shape legend: T inputs, D width of the model, F width of an expert, E experts, N choices (rows that experts see).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable

from experts.graph import ExpertGraph
from experts.routers import Router, RoutingStatistics, TopK, make_router

PRODUCTS = ("auto", "segments", "grouped")
BLOCK = 256  # rows whose hidden units fit a CPU cache
MANY = 64  # rows from which oneDNN is faster than BLAS (benchmarks/speed/layer.py)


class SwiGLU(nn.Module):
    """An expert: w_out (silu(w_gate x) * w_up x), the two first products in one (Shazeer 2020)."""

    def __init__(self, d_model: int, d_ff: int) -> None:
        super().__init__()
        self.w_in = nn.Parameter((torch.rand(2 * d_ff, d_model) * 2 - 1) * d_model**-0.5)  # gate, then up
        self.w_out = nn.Parameter((torch.rand(d_model, d_ff) * 2 - 1) * d_ff**-0.5)

    def forward(self, x_ND: torch.Tensor) -> torch.Tensor:
        """`[N, D]` to `[N, D]`."""
        gate, up = F.linear(x_ND, self.w_in).chunk(2, dim=-1)
        return F.linear(F.silu(gate) * up, self.w_out)


class MoELayer(nn.Module):
    """A linear gate, a router, and E experts, SwiGLU unless `experts` are given (modules `[N, D]` to `[N, D]`).

    `forward` takes inputs `[..., D]` and returns outputs of the same shape and `RoutingStatistics`, whose losses are
    for the caller to add; with `statistics=False` the outputs alone, as blocks of Hugging Face do. Given a `generator`
    the router is noisy. Gradients of gradients are not computed. `copy_experts` and `zero_experts` more columns of the
    gate stand for experts that return the input and nothing (Jin et al. 2024, MoE++). A `graph` (`ExpertGraph`) mixes
    what a team's experts return. With `recompute` hidden units are computed again in the backward pass instead of kept.
    `torch.autocast` is followed; `torch.compile` leaves the experts' products as they are. `products` forces a kind of
    product, for tests and timings.
    """

    def __init__(
        self,
        d_model: int,
        d_ff: int,
        num_experts: int,
        k: int = 2,
        router: str | Router = "topk",
        graph: ExpertGraph | None = None,
        *,
        experts: Sequence[nn.Module] | None = None,
        copy_experts: int = 0,
        zero_experts: int = 0,
        recompute: bool = False,
        products: str = "auto",
        statistics: bool = True,
    ) -> None:
        super().__init__()
        if min(d_model, d_ff, num_experts) < 1 or min(copy_experts, zero_experts) < 0:
            raise ValueError(f"d_model={d_model}, d_ff={d_ff}, num_experts={num_experts}: must be at least 1")
        if experts is not None and len(experts) != num_experts:
            raise ValueError(f"{len(experts)} experts are given, num_experts={num_experts}")
        if products not in PRODUCTS:
            raise ValueError(f"products={products!r} is not one of {', '.join(PRODUCTS)}")
        if graph is not None and (len(graph.edges) != num_experts or copy_experts or zero_experts):
            raise ValueError(
                "a graph must have as many nodes as the layer has experts, and takes no copy or zero experts"
            )
        self.experts = nn.ModuleList(experts or (SwiGLU(d_model, d_ff) for _ in range(num_experts)))
        self.gate = nn.Linear(d_model, num_experts + copy_experts + zero_experts, bias=False)
        self.router = make_router(router, k)
        self.graph, self.copy_experts, self.zero_experts = graph, copy_experts, zero_experts
        self.recompute, self.products, self.statistics = recompute, products, statistics

    @classmethod
    def from_block(cls, block: nn.Module, **options: Any) -> MoELayer:
        """A layer with the weights of a Hugging Face block (transformers 5: Mixtral's, Qwen3-MoE's, OLMoE's and others
        whose experts are stacked SwiGLUs, chosen by a softmax), which can take its place in the model; `options` are
        those of the layer.

        The layer and the block get the same few inputs; raises `ValueError` for a block that answers otherwise (shared
        experts, another activation or gate).
        """
        source: Any = block
        try:
            gate, gate_up, down = source.gate.weight, source.experts.gate_up_proj, source.experts.down_proj
            k = int(getattr(source, "top_k", None) or source.gate.top_k)
        except AttributeError as error:
            raise ValueError(f"{type(block).__name__} is not a block of stacked SwiGLU experts: {error}") from error
        experts, double, d_model = gate_up.shape
        if tuple(down.shape) != (experts, d_model, double // 2) or tuple(gate.shape) != (experts, d_model):
            shapes = f"{tuple(gate_up.shape)}, {tuple(down.shape)} and a gate {tuple(gate.shape)}"
            raise ValueError(f"{type(block).__name__} has weights {shapes}: not [E, 2F, D], [E, D, F] and [E, D]")
        plain = cls(d_model, double // 2, experts, k).to(gate.device, gate_up.dtype)
        with torch.no_grad():
            plain.gate.weight.copy_(gate)
            for number, expert in enumerate(plain.experts):
                expert.w_in.copy_(gate_up[number])  # type: ignore[operator]
                expert.w_out.copy_(down[number])  # type: ignore[operator]
        router = _router_of(source, plain, k)
        layer = cls(d_model, double // 2, experts, **{"k": k, "router": router, "statistics": False, **options}).to(
            gate.device, gate_up.dtype
        )
        layer.load_state_dict(plain.state_dict(), strict=False)
        return layer

    def forward(
        self, x: torch.Tensor, generator: torch.Generator | None = None, router: Router | None = None
    ) -> torch.Tensor | tuple[torch.Tensor, RoutingStatistics]:
        """Outputs `[..., D]` and statistics of the routing, by the layer's router or by another one for this call."""
        output, statistics = self._run(x, generator, router)
        return (output, statistics) if self.statistics else output

    def _run(
        self, x: torch.Tensor, generator: torch.Generator | None, router: Router | None
    ) -> tuple[torch.Tensor, RoutingStatistics]:
        x_TD = x.reshape(-1, x.shape[-1])
        routing = (router or self.router)(self.gate(x_TD), generator)
        weights_TE, members_TE = routing.weights, routing.members
        num_experts = len(self.experts)
        shapes = tuple(weights_TE.shape), tuple(members_TE.shape)
        if shapes not in {((len(x_TD), size),) * 2 for size in (num_experts, self.gate.out_features)}:
            asked = f"{len(x_TD)} inputs and {self.gate.out_features} columns of the gate"
            raise ValueError(f"the router returned weights and members {shapes} for {asked}")
        statistics = replace(routing.statistics, real=num_experts)
        if self.graph is not None and self.graph.mode != "conv":
            weights_TE = self.graph.weights(weights_TE, members_TE)
        answered_TE = members_TE[:, :num_experts]
        choices = answered_TE.T.nonzero()  # sorted by expert, then by input
        counts = answered_TE.sum(0).tolist()
        expert_N, input_N = choices.unbind(1)
        if self.graph is not None and self.graph.mode == "conv":
            rows_ND = self._answers(x_TD.index_select(0, input_N), counts)
            outputs_TED = rows_ND.new_zeros(len(x_TD), num_experts, x_TD.shape[1]).index_put(
                (input_N, expert_N), rows_ND
            )
            return self.graph(outputs_TED, weights_TE, members_TE).view_as(x), statistics
        weights_N = weights_TE[input_N, expert_N]
        if all(_is_plain(expert) for expert in self.experts):
            output_TD = self._swiglu(x_TD, input_N, weights_N, counts)
        else:
            rows_ND = self._answers(x_TD.index_select(0, input_N), counts)
            rows_ND = rows_ND * weights_N.unsqueeze(1).to(rows_ND.dtype)
            output_TD = rows_ND.new_zeros(x_TD.shape).index_add(0, input_N, rows_ND)
        if self.copy_experts:
            copied_TE = weights_TE[:, num_experts : num_experts + self.copy_experts]
            output_TD = output_TD + (copied_TE.sum(1, keepdim=True) * x_TD).to(output_TD.dtype)
        return output_TD.view_as(x), statistics

    def _answers(self, rows_ND: torch.Tensor, counts: list[int]) -> torch.Tensor:
        """Expert outputs for rows sorted by expert, `[N, D]`."""
        parts = zip(self.experts, rows_ND.split(counts), strict=True)
        found = [expert(part) for expert, part in parts if len(part)]
        return torch.cat(found) if found else rows_ND

    def _swiglu(
        self, x_TD: torch.Tensor, input_N: torch.Tensor, weights_N: torch.Tensor, counts: list[int]
    ) -> torch.Tensor:
        w_in: list[Any] = [expert.w_in for expert in self.experts]
        w_out: list[Any] = [expert.w_out for expert in self.experts]
        if torch.is_autocast_enabled(x_TD.device.type):
            dtype = torch.get_autocast_dtype(x_TD.device.type)
            w_in, w_out = ([each.to(dtype) for each in weights] for weights in (w_in, w_out))
        x_TD, weights_N = x_TD.to(w_in[0].dtype), weights_N.to(w_in[0].dtype).unsqueeze(1)
        aligned = w_in[0].dtype == torch.bfloat16 and not (x_TD.shape[1] | w_out[0].shape[1]) % 8
        if self.products == "grouped" or (self.products == "auto" and x_TD.is_cuda and aligned):
            return _grouped(x_TD, input_N, weights_N, counts, w_in, w_out)
        return _segmented(x_TD, input_N, weights_N, counts, torch.is_grad_enabled() and not self.recompute, w_in, w_out)


def _is_plain(expert: nn.Module) -> bool:
    """Whether an expert's products can run without calling the module, i.e. it has no hooks."""
    return type(expert) is SwiGLU and not expert._forward_hooks and not expert._forward_pre_hooks


def _router_of(block: Any, plain: MoELayer, k: int) -> Router:
    """Router that reproduces the outputs of the block whose weights the layer has."""
    weights, training = plain.gate.weight, block.training
    x = torch.randn(1, 16, weights.shape[1], generator=torch.Generator().manual_seed(0)).to(weights)
    block.eval()
    with torch.no_grad():
        found = block(x)
        wanted = (found[0] if isinstance(found, tuple) else found).view_as(x)
        for router in (TopK(k), TopK(k, normalize=False)):
            plain.router = router
            error = float((plain(x)[0] - wanted).abs().max() / wanted.abs().max().clamp_min(1e-12))
            if error < (1e-4 if weights.dtype == torch.float32 else 0.1):
                break
        else:
            raise ValueError(f"{type(block).__name__} answers otherwise than a softmax over its top {k} experts does")
    block.train(training)
    return router


def _grouped(
    x_TD: torch.Tensor,
    input_N: torch.Tensor,
    weights_N1: torch.Tensor,
    counts: list[int],
    w_in: list[torch.Tensor],
    w_out: list[torch.Tensor],
) -> torch.Tensor:
    """All experts in two grouped products."""
    asked = [number for number, count in enumerate(counts) if count]
    if not asked:
        return torch.zeros_like(x_TD)
    ends = torch.tensor([counts[number] for number in asked], device=x_TD.device).cumsum(0).to(torch.int32)
    first, second = (torch.stack([weights[number] for number in asked]).mT for weights in (w_in, w_out))
    gate, up = F.grouped_mm(x_TD.index_select(0, input_N), first, offs=ends).chunk(2, dim=-1)
    rows_ND = F.grouped_mm(F.silu(gate) * up, second, offs=ends)
    return torch.zeros_like(x_TD).index_add(0, input_N, rows_ND * weights_N1)


def _segmented(
    x_TD: torch.Tensor, input_N: torch.Tensor, weights_N1: torch.Tensor, counts: list[int], keep: bool,
    w_in: list[torch.Tensor], w_out: list[torch.Tensor],
) -> torch.Tensor:  # fmt: skip
    run: Any = _Segments.apply
    if torch.compiler.is_compiling():  # else `disable` would import the compiler, which takes seconds
        run = torch.compiler.disable(run)
    found: torch.Tensor = run(x_TD, input_N, weights_N1, counts, keep, *w_in, *w_out)
    return found


class _Segments(torch.autograd.Function):
    """SwiGLU experts on their segments, one after the other; E products of many rows fill a CPU better than one
    grouped product does."""

    @staticmethod
    def forward(
        ctx: Any, x_TD: torch.Tensor, input_N: torch.Tensor, weights_N1: torch.Tensor, counts: list[int],
        keep: bool, *weights: torch.Tensor,
    ) -> torch.Tensor:  # fmt: skip
        output_TD, kept = torch.zeros_like(x_TD), list[torch.Tensor]()
        for expert, rows in _segments(counts) if keep else _segments(counts, BLOCK):
            w_in, w_out = weights[expert], weights[len(counts) + expert]
            part = x_TD.index_select(0, input_N[rows])
            if keep:
                hidden = _linear(part, w_in)
                gate, up = hidden.chunk(2, dim=-1)
                active = F.silu(gate).mul_(up)
                kept += [hidden, active]
            else:
                active = _gated(part, w_in)
            output_TD.index_add_(0, input_N[rows], _linear(active, w_out).mul_(weights_N1[rows]))
        ctx.save_for_backward(x_TD, input_N, weights_N1, *weights, *kept)
        ctx.counts = counts
        return output_TD

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient_TD: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        counts: list[int] = ctx.counts
        x_TD, input_N, weights_N1, *rest = ctx.saved_tensors
        weights, kept = rest[: 2 * len(counts)], rest[2 * len(counts) :]
        gradient_TD, wanted = gradient_TD.contiguous(), ctx.needs_input_grad
        of_x, of_weights = torch.zeros_like(x_TD) if wanted[0] else None, torch.empty_like(weights_N1)
        of_experts: list[torch.Tensor | None] = [None] * len(weights)
        for number, (expert, rows) in enumerate(_segments(counts)):
            w_in, w_out = weights[expert], weights[len(counts) + expert]
            inputs_N = input_N[rows]
            part, back = x_TD.index_select(0, inputs_N), gradient_TD.index_select(0, inputs_N)
            hidden = kept[2 * number] if kept else _linear(part, w_in)
            gate, up = hidden.chunk(2, dim=-1)
            active = kept[2 * number + 1] if kept else F.silu(gate) * up
            of_active = _times(back, w_out)
            of_weights[rows] = torch.linalg.vecdot(of_active, active).unsqueeze(1)
            if wanted[5 + len(counts) + expert]:
                of_experts[len(counts) + expert] = back.mul_(weights_N1[rows]).T @ active
            if not (wanted[0] or wanted[5 + expert]):
                continue
            of_active *= weights_N1[rows]
            of_hidden = torch.empty_like(hidden)
            of_gate, of_up = of_hidden.chunk(2, dim=-1)
            torch.mul(of_active, F.silu(gate), out=of_up)
            torch.ops.aten.silu_backward.grad_input(of_active.mul_(up), gate, grad_input=of_gate)
            if wanted[5 + expert]:
                of_experts[expert] = of_hidden.T @ part
            if of_x is not None:
                of_x.index_add_(0, inputs_N, _times(of_hidden, w_in))
        return of_x, None, of_weights, None, None, *of_experts


def _segments(counts: list[int], most: int | None = None) -> list[tuple[int, slice]]:
    """Experts that have rows, with their rows, at most so many at a time."""
    found, start = [], 0
    for expert, count in enumerate(counts):
        for first in range(start, start + count, most or max(1, count)):
            found.append((expert, slice(first, min(first + (most or count), start + count))))
        start += count
    return found


def _by_onednn(x: torch.Tensor) -> bool:
    many = x.device.type == "cpu" and x.dtype == torch.float32 and len(x) >= MANY
    return many and torch.backends.mkldnn.is_available()


def _linear(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """x weight^T."""
    if _by_onednn(x):
        return torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")
    return F.linear(x, weight)


def _times(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """x weight."""
    return _linear(x, weight.T) if _by_onednn(x) else x @ weight


def _gated(x: torch.Tensor, w_in: torch.Tensor) -> torch.Tensor:
    """The hidden units of SwiGLU, activation and product fused where the library can."""
    w_gate, w_up = w_in.chunk(2)
    if _by_onednn(x):
        gate = torch.ops.mkldnn._linear_pointwise(x, w_gate, None, "swish", [], "")
        return torch.ops.mkldnn._linear_pointwise.binary(x, gate, w_up, None, "mul")
    gate, up = F.linear(x, w_in).chunk(2, dim=-1)
    return F.silu(gate).mul_(up)
