"""A language model whose experts stay on the disk, but for those that a budget of memory holds."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, Protocol, get_args, runtime_checkable

import torch
import torch.nn.functional as F
from torch import nn

from experts.huggingface import AdaptedModel
from experts.language.model import LanguageModel
from experts.layers import MoELayer
from experts.offload.demand import Probable
from experts.offload.eviction import Eviction, make
from experts.offload.pool import ExpertPool, fitting
from experts.offload.store import ExpertFile, OffloadError, Weights, expert_bytes, rounded, source_of, write
from experts.routers import Router, Routing, RoutingStatistics

PREFETCH = (None, "last")


class Decision(NamedTuple):
    """What runs in a layer, and what stays in memory: weights `[T, E]`, 0 for experts that do not run, and the numbers
    of those that stay."""

    weights: torch.Tensor
    stay: set[int]


@runtime_checkable
class Control(Protocol):
    """Decides for each token which experts run and which stay in memory; not more than `memory` holds."""

    def start(self) -> list[set[int]]:
        """Experts in memory at first, for each layer."""

    def decide(self, layer: int, inputs_TD: torch.Tensor, logits_TE: torch.Tensor, resident: set[int]) -> Decision:
        """For the inputs of a layer's call and what its gate returns for them."""


class OffloadedModel:
    """A model that answers as before while at most `memory` bytes of its experts are in memory, and beside them one
    that runs and those that are being read; with a `Control`, all that run in a layer for one token.

    `model` is a `LanguageModel`, or an `AdaptedModel` of transformers; its experts are written to `file` (default: a
    temporary file) in the precision `weights`, unless the file is there, and leave the model for good: use
    `offloaded.model` as before. `policy` is an eviction rule by name, a function of the number of experts that fit that
    makes one, or a `Control` that also decides what runs. `prefetch="last"` loads ahead the experts that the token
    before used in the next layer, a `Probable` those that it predicts for one text. Close it, or use it in a `with`
    block.

    Raises `ValueError` for experts that are not SwiGLUs of one size, and `OffloadError` for a file of other experts and
    where an expert cannot be read.
    """

    def __init__(
        self, model: LanguageModel | AdaptedModel, memory: int,
        policy: str | Control | Callable[[int], Eviction] = "lru", *,
        file: Path | str | None = None, weights: Weights = "float32", prefetch: str | Probable | None = None,
        direct: bool = True,
    ) -> None:  # fmt: skip
        if weights not in get_args(Weights):
            raise ValueError(f"weights={weights!r} is not one of {', '.join(get_args(Weights))}")
        if not isinstance(prefetch, Probable) and prefetch not in PREFETCH:
            raise ValueError(f"prefetch={prefetch!r} is not one of {', '.join(map(repr, PREFETCH))}")
        if isinstance(policy, str):
            make(policy, 1, 1)
        _require_whole(model)
        each = _expert_size(model, weights)
        fitting(memory, each)  # all is checked before the model is changed
        if isinstance(prefetch, Probable) and (shape := _shape(model)) != (prefetch.layers, prefetch.experts):
            raise ValueError(f"prefetch is for {prefetch.layers} layers of {prefetch.experts} experts, not {shape}")
        self.control = policy if isinstance(policy, Control) else None
        first = [] if self.control is None else self.control.start()
        if (needed := sum(map(len, first)) * each) > memory:
            raise ValueError(f"memory={memory}: the policy keeps experts of {needed:,} bytes")
        if self.control is not None and prefetch:
            raise ValueError("prefetch is for rules of eviction; a policy decides itself what is loaded")
        self.model, self.prefetch = model, prefetch
        self.layers = _layers(model)
        with ExitStack() as opening:
            if file is None:
                file = Path(opening.enter_context(tempfile.TemporaryDirectory(prefix="moe-experts-"))) / "experts.bin"
            opened = opening.enter_context(_opened(Path(file), self.layers, weights, direct))
            self.pool = ExpertPool(opened, memory, "lru" if isinstance(policy, Control) else policy)
            opening.callback(self.pool.close)
            self.pool.fill((layer, expert) for layer, experts in enumerate(first) for expert in sorted(experts))
            self._open = opening.pop_all()
        self.direct = opened.direct
        self._last: dict[int, list[int]] = {}
        for number, layer in enumerate(self.layers):
            layer.experts = nn.ModuleList(_Offloaded(self.pool, number, each) for each in range(len(layer.experts)))
            layer.register_forward_pre_hook(self._hook(number), with_kwargs=True)

    def __enter__(self) -> OffloadedModel:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the file; the model cannot be called any more."""
        self._open.close()

    def statistics(self) -> dict[str, float]:
        """Requests, hits, loads, bytes and seconds of waiting, in all and a token."""
        return self.pool.statistics().summary()

    def _hook(self, number: int) -> Callable[..., tuple[Any, dict[str, Any]]]:
        """Before a layer's call: its router asks the pool for what it chose."""

        def hook(layer: Any, given: tuple[Any, ...], options: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
            inner: Router = options.get("router") or layer.router
            if self.control:
                if options.get("router") is not None:
                    raise ValueError("the policy decides which experts run: the model takes neither k nor allowed")
                inner = partial(self._controlled, self.control, number, layer, given[0])
                return given, {**options, "router": inner}

            def router(logits_TE: torch.Tensor, generator: torch.Generator | None = None) -> Routing:
                routing = inner(logits_TE, generator)
                self._provide(number, layer, routing)
                return routing

            return given, {**options, "router": router}

        return hook

    def _controlled(
        self, control: Control, number: int, layer: MoELayer, x: torch.Tensor, logits_TE: torch.Tensor,
        generator: torch.Generator | None = None,
    ) -> Routing:  # fmt: skip
        """Routes by the control, which sees the layer's inputs."""
        there = self.pool.residents_of(number)
        weights_TE, stay = control.decide(number, x.reshape(len(logits_TE), -1), logits_TE, there)
        members_TE = weights_TE > 0
        asked = members_TE.any(0).nonzero()[:, 0].tolist()
        kept = [expert for expert in asked if len(logits_TE) == 1 or expert in there | stay]
        tokens = len(logits_TE) if number == 0 else 0
        self._hand(layer, self.pool.exchange(number, kept, stay, len(asked), tokens))
        return Routing(weights_TE, members_TE, RoutingStatistics(logits_TE, members_TE, members_TE))

    @staticmethod
    def _hand(layer: MoELayer, found: dict[int, torch.Tensor]) -> None:
        """Give experts their bytes for the call."""
        experts: Any = layer.experts
        for expert, raw in found.items():
            experts[expert].raw = raw

    def _provide(self, number: int, layer: MoELayer, routing: Routing) -> None:
        asked_E = routing.members.any(0)
        weight_E = (routing.weights.detach() * routing.members).sum(0)
        order = weight_E.masked_fill(~asked_E, -1.0).argsort(descending=True)[: int(asked_E.sum())].tolist()
        found = self.pool.take(number, order, tokens=len(routing.members) if number == 0 else 0)
        self._hand(layer, found)
        if isinstance(self.prefetch, Probable):
            fewest = int(routing.members.sum(1).min()) if len(routing.members) else 0
            wanted_TK = routing.weights.detach().topk(fewest, dim=-1).indices.cpu().numpy()
            self.pool.prefetch(*self.prefetch.ahead(number, wanted_TK, self.pool.resident))
        elif self.prefetch:
            if number + 1 < len(self.layers):
                self.pool.prefetch(number + 1, self._last.get(number + 1, []))
            self._last[number] = routing.members[-1].nonzero()[:, 0].tolist() if len(routing.members) else []


class _Offloaded(nn.Module):
    """An expert whose bytes were provided for one call, or are read in it."""

    def __init__(self, pool: ExpertPool, layer: int, number: int) -> None:
        super().__init__()
        self.pool, self.layer, self.number = pool, layer, number
        self.raw: torch.Tensor | None = None

    def forward(self, x_ND: torch.Tensor) -> torch.Tensor:
        """`[N, D]` to `[N, D]`."""
        raw, self.raw = self.raw, None
        w_in, w_out = self.pool.file.weights(self.pool.once(self.layer, self.number) if raw is None else raw)
        gate, up = F.linear(x_ND, w_in.to(x_ND)).chunk(2, dim=-1)
        return F.linear(F.silu(gate) * up, w_out.to(x_ND))


def rounded_copy(model: LanguageModel, weights: Weights) -> LanguageModel:
    """A copy whose experts are as they are read from a file of this precision, all in memory."""
    network = deepcopy(model.network)
    blocks: Any = network.blocks
    with torch.no_grad():
        for expert in [each for block in blocks for each in block.moe.experts]:
            for old, new in zip((expert.w_in, expert.w_out), rounded(expert, weights), strict=True):
                old.copy_(new)
    return LanguageModel(network, model.tokenizer, model.metadata)


def _require_whole(model: LanguageModel | AdaptedModel) -> None:
    network = model.network if isinstance(model, LanguageModel) else model.model
    if any(isinstance(each, _Offloaded) for each in network.modules()):
        raise ValueError("the experts of this model are offloaded already: load the model anew")


def _layers(model: LanguageModel | AdaptedModel) -> list[MoELayer]:
    if isinstance(model, AdaptedModel):
        return model.replaced or model.replace()
    blocks: Any = model.network.blocks
    return [block.moe for block in blocks]


def _expert_size(model: LanguageModel | AdaptedModel, weights: Weights) -> int:
    if isinstance(model, LanguageModel):
        return expert_bytes(model.settings.d_model, model.settings.d_ff, weights)
    if model.replaced:
        expert: Any = model.replaced[0].experts[0]
        return expert_bytes(model.d_model, expert.w_out.shape[1], weights)
    return expert_bytes(model.d_model, int(model.blocks[0].experts.down_proj.shape[2]), weights)


def _shape(model: LanguageModel | AdaptedModel) -> tuple[int, int]:
    """Layers and experts of each."""
    if isinstance(model, LanguageModel):
        return model.settings.layers, model.settings.num_experts
    return len(model.replaced or model.blocks), int(model.num_experts)


def _opened(path: Path, layers: list[MoELayer], weights: Weights, direct: bool) -> ExpertFile:
    """The file of these experts, which is written unless it is there."""
    if not path.exists():
        write(path, layers, weights)
        return ExpertFile(path, direct)
    file = ExpertFile(path, direct)
    try:
        if (file.header.source, file.header.weights) != (source_of(layers), weights):
            raise OffloadError(f"{path} holds other experts, or not in {weights}: delete it, or name another file")
        file.check(layers)
    except BaseException:
        file.close()
        raise
    return file
