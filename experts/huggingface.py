"""Mixture-of-Experts language models of Hugging Face transformers 5: Mixtral, Qwen3-MoE, OLMoE.

They need `pip install moe-envs[hf]`. Shape legend: B rows, T tokens, N = B * T, L layers with experts, E experts, D
width.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from experts.compression.quantize import dequantize, quantize
from experts.language.transformer import Experts
from experts.layers import MoELayer
from experts.routers import Routing, RoutingStatistics, TopKEach, mixing_weights


class AdaptedModel:
    """A model whose experts are recorded and chosen from outside; the model itself is called as before.

    `k` is the number of experts of a token: None for the model's own, a number, one for each layer, `[B, T, L]` for the
    next call, or a function of layer, inputs `[N, D]` and logits `[N, E]` that returns k `[N]`. Only the experts of
    `allowed`, boolean `[L, E]`, are used. `own_k` is the model's own number. `close` removes the hooks; what `compress`
    and `replace` did stays.
    """

    def __init__(self, model: nn.Module, blocks: list[Any]) -> None:
        self.model, self.blocks, self.replaced = model, blocks, list[MoELayer]()
        gate = blocks[0].gate
        self.layers, self.own_k = len(blocks), int(gate.top_k)
        self.num_experts, self.d_model = map(int, gate.weight.shape)
        self.k: Experts | None = None
        self.allowed: torch.Tensor | None = None
        self._routing: list[RoutingStatistics] | None = None
        self._handles = [
            block.gate.register_forward_hook(self._hook(number), with_kwargs=False)
            for number, block in enumerate(blocks)
        ]

    def close(self) -> None:
        """Remove the hooks."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def _require_hooks(self) -> None:
        if not self._handles:
            raise ValueError("the model's blocks were closed or replaced: adapt the model anew, or use the new layers")

    @contextmanager
    def choosing(self, k: Experts | None = None, allowed: torch.Tensor | None = None) -> Iterator[None]:
        """Choose experts this way inside the block."""
        self._require_hooks()
        before, (self.k, self.allowed) = (self.k, self.allowed), (k, allowed)
        try:
            yield
        finally:
            self.k, self.allowed = before

    @contextmanager
    def recording(self) -> Iterator[list[RoutingStatistics]]:
        """Collect the routing of each layer of each call, `[N, E]`, inside the block."""
        self._require_hooks()
        found: list[RoutingStatistics] = []
        self._routing = found
        try:
            yield found
        finally:
            self._routing = None

    def replace(self, **options: Any) -> list[MoELayer]:
        """Put our layers in the blocks' places, with `options` of `MoELayer`, and let the blocks go; returns the
        layers, whose routers choose from now on."""
        self._require_hooks()
        for block in self.blocks:
            parent, name = _place(self.model, block)
            layer = MoELayer.from_block(block, **options)
            setattr(parent, name, layer)
            self.replaced.append(layer)
        self.close()
        self.blocks = []
        return self.replaced

    @torch.no_grad()
    def compress(self, bits: int) -> int:
        """Round the experts' weights to integers of 8, 4 or 2 bits with scales; returns their bytes when packed."""
        self._require_hooks()
        size = 0
        for block in self.blocks:
            for weights_EOI in (block.experts.gate_up_proj, block.experts.down_proj):
                for weight in weights_EOI:
                    raw = quantize(weight.detach().float().cpu().numpy(), bits)
                    size += len(raw)
                    weight.copy_(torch.from_numpy(dequantize(raw, (weight.shape[0], weight.shape[1]), bits)))
        return size

    def _hook(self, layer: int) -> Any:
        def hook(gate: Any, given: tuple[torch.Tensor], found: Any) -> Any:
            logits_NE, weights_Nk, experts_Nk = found
            if self.k is None and self.allowed is None:
                members_NE = torch.zeros_like(logits_NE, dtype=torch.bool).scatter(-1, experts_Nk, True)
            else:
                routing = self._chosen(layer, given[0].reshape(len(logits_NE), -1), logits_NE.float())
                members_NE = routing.members
                most = max(1, int(members_NE.sum(-1).max()))
                order_Nk = logits_NE.masked_fill(~members_NE, -torch.inf).topk(most, dim=-1).indices
                weights_Nk = self._weights(layer, routing).gather(-1, order_Nk).to(weights_Nk.dtype)
                # the blocks skip an index of E, which is none of their experts
                experts_Nk = torch.where(members_NE.gather(-1, order_Nk), order_Nk, self.num_experts)
            if self._routing is not None:
                self._routing.append(RoutingStatistics(logits_NE, members_NE, members_NE))
            return logits_NE, weights_Nk, experts_Nk

        return hook

    def _chosen(self, layer: int, inputs_ND: torch.Tensor, logits_NE: torch.Tensor) -> Routing:
        tokens, wanted = len(logits_NE), self.k
        if callable(wanted) and not isinstance(wanted, torch.Tensor):
            k_N = wanted(layer, inputs_ND, logits_NE)
        elif isinstance(wanted, torch.Tensor):
            k_N = wanted.flatten(0, -2)[:, layer]
        else:
            number: Any = self.own_k if wanted is None else wanted
            each = [number] * self.layers if isinstance(number, int) else list(number)
            if len(each) != self.layers or not all(0 <= one <= self.num_experts for one in each):
                raise ValueError(f"k={wanted}: a number from 0 to {self.num_experts}, or one for each of {self.layers}")
            k_N = torch.full((tokens,), each[layer])
        if k_N.shape != (tokens,):
            raise ValueError(f"k has {tuple(k_N.shape)} numbers in layer {layer} for {tokens} tokens")
        allowed = None if self.allowed is None else self.allowed[layer].to(logits_NE.device)
        return TopKEach(k_N.to(logits_NE.device), allowed)(logits_NE)

    def _weights(self, layer: int, routing: Routing) -> torch.Tensor:
        """Weights of the chosen experts, with the sum that the model gives them."""
        if getattr(self.blocks[layer].gate, "norm_topk_prob", True):
            return mixing_weights(routing.statistics.logits, routing.members).nan_to_num(0.0)
        return routing.statistics.logits.softmax(-1) * routing.members


def adapt(model: nn.Module) -> AdaptedModel:
    """Adapt a Mixtral, Qwen3-MoE or OLMoE model; raises `ValueError` for one without such layers."""
    blocks = [
        each for each in model.modules()
        if hasattr(getattr(each, "experts", None), "gate_up_proj") and hasattr(getattr(each, "gate", None), "top_k")
    ]  # fmt: skip
    if not blocks:
        raise ValueError(f"{type(model).__name__} has no layers of experts as Mixtral, Qwen3-MoE and OLMoE have them")
    if getattr(getattr(model, "config", None), "_experts_implementation", "eager") not in (None, "eager"):
        model.set_experts_implementation("eager")  # type: ignore[operator]  # others compute experts that are skipped
    return AdaptedModel(model, blocks)


def _place(model: nn.Module, wanted: nn.Module) -> tuple[nn.Module, str]:
    """The parent of a module, and its name in it."""
    for parent in model.modules():
        for name, child in parent.named_children():
            if child is wanted:
                return parent, name
    raise ValueError("this block is no longer in the model")
