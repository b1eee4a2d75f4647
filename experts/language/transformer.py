"""A decoder whose feed-forward layers are Mixtures of Experts; its parts are those of Qwen3-MoE (Yang et al. 2025).

Shape legend: B rows, T tokens, S tokens in the cache, V vocabulary, D width, H heads, F width of a head, L layers,
E experts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, NamedTuple

import torch
import torch.nn.functional as F
from annotated_types import Ge, Gt, Le
from pydantic.dataclasses import dataclass as validated
from torch import nn

from experts.layers import MoELayer
from experts.routers import Router, Routing, RoutingStatistics, TopK, TopKEach

Size = Annotated[int, Ge(1), Le(2**20)]
Few = Annotated[int, Ge(1), Le(2**12)]
Decide = Callable[[int, torch.Tensor, torch.Tensor], torch.Tensor]  # layer, inputs `[N, D]`, logits `[N, E]` to k `[N]`
Experts = int | Sequence[int] | torch.Tensor | Decide  # experts of a token: a number, one a layer, `[B, T, L]`


@validated(frozen=True, kw_only=True)
class ModelSettings:
    """Sizes of a model: `d_ff` hidden units in each of `num_experts` experts of a layer, `k` of them for a token."""

    vocabulary: Annotated[int, Ge(1), Le(2**16)] = 4096
    d_model: Size = 128
    layers: Few = 4
    heads: Few = 4
    num_experts: Few = 16
    d_ff: Size = 256
    k: Size = 4
    context: Size = 512
    rope_theta: Annotated[float, Gt(0)] = 10_000.0
    norm_eps: Annotated[float, Gt(0)] = 1e-6

    def __post_init__(self) -> None:
        if self.d_model % (2 * self.heads):
            raise ValueError(f"d_model={self.d_model} must be a multiple of twice heads={self.heads}")
        if self.k > self.num_experts:
            raise ValueError(f"k={self.k}: there are {self.num_experts} experts")


class Output(NamedTuple):
    """Logits `[B, T, V]` of the next token, the routing of each layer, whose inputs are the B * T tokens, and what the
    last norm returns, `[B, T, D]`, of which the logits are made."""

    logits: torch.Tensor
    routing: list[RoutingStatistics]
    streams: torch.Tensor


@dataclass
class Cache:
    """Keys and values `[L, B, H, S, F]` of the tokens so far, and how many each row has, `[B]`."""

    keys: torch.Tensor
    values: torch.Tensor
    lengths: torch.Tensor

    @property
    def room(self) -> int:
        """Tokens that the longest row can still take."""
        return self.keys.shape[3] - int(self.lengths.max())

    def rows(self, chosen: torch.Tensor) -> Cache:
        """A cache of some rows, which may stand twice."""
        return Cache(self.keys[:, chosen], self.values[:, chosen], self.lengths[chosen])


class Attention(nn.Module):
    """Causal attention with rotary positions and normalised queries and keys."""

    def __init__(self, settings: ModelSettings) -> None:
        super().__init__()
        width, self.heads = settings.d_model, settings.heads
        self.query, self.key, self.value, self.out = (nn.Linear(width, width, bias=False) for _ in range(4))
        self.query_norm, self.key_norm = (nn.RMSNorm(width // self.heads, settings.norm_eps) for _ in range(2))

    def forward(
        self, x_BTD: torch.Tensor, turns: tuple[torch.Tensor, torch.Tensor], places_BT: torch.Tensor,
        kept: tuple[torch.Tensor, torch.Tensor] | None,
    ) -> torch.Tensor:  # fmt: skip
        """`[B, T, D]`; `kept` are the layer's keys and values `[B, H, S, F]` in a cache, which take those of x."""
        query, key, value = (
            part(x_BTD).unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in (self.query, self.key, self.value)
        )
        query, key = turned(normed(query, self.query_norm), turns), turned(normed(key, self.key_norm), turns)
        if kept is None:
            found = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        else:
            rows_B1 = torch.arange(len(x_BTD), device=x_BTD.device)[:, None]
            for old, new in zip(kept, (key, value), strict=True):
                old[rows_B1, :, places_BT] = new.transpose(1, 2).to(old.dtype)
            size = int(places_BT.max()) + 1
            seen_B1TS = (torch.arange(size, device=x_BTD.device) <= places_BT[..., None])[:, None]
            keys, values = (each[:, :, :size].to(query.dtype) for each in kept)
            found = F.scaled_dot_product_attention(query, keys, values, attn_mask=seen_B1TS)
        answer: torch.Tensor = self.out(found.transpose(1, 2).flatten(2))
        return answer


@dataclass(frozen=True)
class LayerDecision:
    """Numbers of experts that are decided once a layer's inputs are known."""

    decide: Decide
    layer: int
    allowed: torch.Tensor | None

    def about(self, inputs_ND: torch.Tensor) -> Router:
        """The router for these inputs."""

        def router(logits_TE: torch.Tensor, generator: torch.Generator | None = None) -> Routing:
            return TopKEach(self.decide(self.layer, inputs_ND, logits_TE), self.allowed)(logits_TE, generator)

        return router


class Block(nn.Module):
    """Attention and a Mixture of Experts, each behind a norm and added to what came in."""

    def __init__(self, settings: ModelSettings) -> None:
        super().__init__()
        self.attention_norm, self.expert_norm = (nn.RMSNorm(settings.d_model, settings.norm_eps) for _ in range(2))
        self.attention = Attention(settings)
        self.moe = MoELayer(settings.d_model, settings.d_ff, settings.num_experts, settings.k)

    def forward(
        self, x_BTD: torch.Tensor, turns: tuple[torch.Tensor, torch.Tensor], places_BT: torch.Tensor,
        kept: tuple[torch.Tensor, torch.Tensor] | None, router: Router | LayerDecision | None,
    ) -> tuple[torch.Tensor, RoutingStatistics]:  # fmt: skip
        """`[B, T, D]` and the routing."""
        x_BTD = x_BTD + self.attention(self.attention_norm(x_BTD), turns, places_BT, kept)
        inputs_BTD = self.expert_norm(x_BTD)
        if isinstance(router, LayerDecision):
            router = router.about(inputs_BTD.flatten(0, 1))
        found, statistics = self.moe(inputs_BTD, router=router)
        return x_BTD + found, statistics


class Transformer(nn.Module):
    """Logits of the next token; the embedding is also the last layer."""

    frequencies: torch.Tensor

    def __init__(self, settings: ModelSettings) -> None:
        super().__init__()
        self.settings = settings
        self.embedding = nn.Embedding(settings.vocabulary, settings.d_model)
        self.blocks = nn.ModuleList(Block(settings) for _ in range(settings.layers))
        self.norm = nn.RMSNorm(settings.d_model, settings.norm_eps)
        width = settings.d_model // settings.heads
        frequencies = settings.rope_theta ** (-torch.arange(0, width, 2, dtype=torch.float32) / width)
        self.register_buffer("frequencies", frequencies, persistent=False)
        self._initialise()

    def _initialise(self) -> None:
        """Normal weights; what is added to the stream is scaled down by the number of layers (Radford et al. 2019)."""
        smaller = (2 * self.settings.layers) ** -0.5
        for name, weight in self.named_parameters():
            if weight.ndim == 2:
                last = name.endswith(("attention.out.weight", "w_out"))
                nn.init.normal_(weight, std=0.02 * (smaller if last else 1.0))

    def cache(self, rows: int, size: int | None = None, dtype: torch.dtype = torch.float32) -> Cache:
        """An empty cache for `rows` rows of at most `size` tokens (default: the context)."""
        heads, device = self.settings.heads, self.embedding.weight.device
        shape = (len(self.blocks), rows, heads, size or self.settings.context, self.settings.d_model // heads)
        keys, values = (torch.zeros(shape, dtype=dtype, device=device) for _ in range(2))
        return Cache(keys, values, torch.zeros(rows, dtype=torch.int64, device=device))

    def forward(
        self, ids_BT: torch.Tensor, k: Experts | None = None, cache: Cache | None = None,
        allowed_LE: torch.Tensor | None = None,
    ) -> Output:  # fmt: skip
        """Logits after each token.

        `k` are the experts of a token: a number from 0, one for each layer, `[B, T, L]`, or a function that decides
        (`Decide`); None for the model's own.
        With a `cache` the tokens follow those that it holds, each row at its own length, and are added to it. Only the
        experts of `allowed`, boolean `[L, E]`, are used. Raises `ValueError` where a row gets longer than the context.
        """
        rows, tokens = ids_BT.shape
        start_B = cache.lengths if cache is not None else torch.zeros(rows, dtype=torch.int64, device=ids_BT.device)
        room = self.settings.context if cache is None else cache.room
        if tokens > room:
            raise ValueError(f"{tokens} tokens, but there is room for {room} only")
        places_BT = start_B[:, None] + torch.arange(tokens, device=ids_BT.device)
        angles_BTF = places_BT[..., None] * self.frequencies
        turns = angles_BTF.cos()[:, None], angles_BTF.sin()[:, None]
        x_BTD, statistics = self.embedding(ids_BT), []
        for number, (block, router) in enumerate(zip(self.blocks, self._routers(ids_BT, k, allowed_LE), strict=True)):
            kept = None if cache is None else (cache.keys[number], cache.values[number])
            x_BTD, routing = block(x_BTD, turns, places_BT, kept, router)
            statistics.append(routing)
        if cache is not None:
            cache.lengths = start_B + tokens
        streams_BTD = self.norm(x_BTD)
        return Output(F.linear(streams_BTD, self.embedding.weight), statistics, streams_BTD)

    def _routers(
        self, ids_BT: torch.Tensor, k: Experts | None, allowed_LE: torch.Tensor | None
    ) -> Sequence[Router | LayerDecision | None]:
        """A router for each layer, None for the layer's own."""
        layers, experts = len(self.blocks), self.settings.num_experts
        masks = [None] * layers if allowed_LE is None else list(allowed_LE)
        if k is None and allowed_LE is None:
            return [None] * layers
        if callable(k) and not isinstance(k, torch.Tensor):
            return [LayerDecision(k, layer, mask) for layer, mask in enumerate(masks)]
        if isinstance(k, torch.Tensor):
            if k.shape != (*ids_BT.shape, layers):
                raise ValueError(f"k has the shape {tuple(k.shape)}, must be {(*ids_BT.shape, layers)}")
            each_token = k.flatten(0, 1).unbind(-1)
            return [TopKEach(one, mask) for one, mask in zip(each_token, masks, strict=True)]
        numbers = [self.settings.k if k is None else k] * layers if k is None or isinstance(k, int) else list(k)
        if len(numbers) != layers or not all(0 <= number <= experts for number in numbers):
            raise ValueError(f"k={k}: a number from 0 to {experts}, or one for each of {layers} layers")
        return [
            TopK(one) if one and mask is None
            else TopKEach(torch.full((ids_BT.numel(),), one, device=ids_BT.device), mask)
            for one, mask in zip(numbers, masks, strict=True)
        ]  # fmt: skip


def normed(x: torch.Tensor, norm: nn.RMSNorm) -> torch.Tensor:
    """A norm in the precision of its input, which autocast does not see to."""
    assert norm.weight is not None
    return F.rms_norm(x, norm.normalized_shape, norm.weight.to(x.dtype), norm.eps)


def turned(x_BHTF: torch.Tensor, turns: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """Rotary positions (Su et al. 2021): the first half of a head's units turned with the second."""
    cosine, sine = (each.to(x_BHTF.dtype) for each in turns)
    first, second = x_BHTF.chunk(2, dim=-1)
    return torch.cat([first * cosine - second * sine, second * cosine + first * sine], dim=-1)
