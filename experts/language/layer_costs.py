"""Operations of a language model's layer, for its profile."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import cycle
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from cost.operations import Work
from experts.language.model import LanguageModel
from experts.language.transformer import Transformer
from experts.routers import TopKEach

SEEN = 32  # tokens in the cache


def operations(model: LanguageModel) -> dict[str, Work]:
    """Attention, router and experts for each number of them, and the output layer, each for n rows of one token, on
    streams that the middle layer has for text drawn from the model.

    Each call is of the next layer, as in a model that writes: weights come from as far as they do there.
    """
    network = model.network
    streams = _streams(model)

    def rows(n: int) -> torch.Tensor:
        return streams[torch.linspace(0, len(streams) - 1, n).round().long()]

    def attention(n: int) -> Callable[[], object]:
        cache = network.cache(n, size=SEEN + 1)
        places = torch.full((n, 1), SEEN)
        angles = places[..., None] * network.frequencies
        turns, kept = (angles.cos()[:, None], angles.sin()[:, None]), (cache.keys[0], cache.values[0])
        x, blocks = rows(n)[:, None], _in_turn(network)

        def run() -> None:
            block = next(blocks)
            with torch.inference_mode():
                x + block.attention(block.attention_norm(x), turns, places, kept)

        return run

    def experts(k: int) -> Work:
        def work(n: int) -> Callable[[], object]:
            x, blocks = rows(n), _in_turn(network)
            router = TopKEach(torch.full((n,), k))  # as where each token has a number of its own

            def run() -> None:
                block = next(blocks)
                with torch.inference_mode():
                    block.moe(block.expert_norm(x), router=router)

            return run

        return work

    def head(n: int) -> Callable[[], object]:
        x = rows(n)

        def run() -> None:
            with torch.inference_mode():
                F.linear(network.norm(x), network.embedding.weight)

        return run

    numbers = {f"experts {k}": experts(k) for k in range(model.settings.k + 1)}
    return {"attention": attention, **numbers, "head": head}


def _in_turn(network: Transformer) -> Iterator[Any]:
    return cycle(network.blocks)


def _streams(model: LanguageModel) -> torch.Tensor:
    """Inputs of the middle layer `[N, D]` on text that the model writes."""
    network, found = model.network, list[torch.Tensor]()
    size = min(64, model.settings.context - 2)
    texts = model.generate([""] * 8, size, temperature=1.0)
    block: Any = network.blocks[len(network.blocks) // 2]
    handle = block.register_forward_pre_hook(lambda module, given: found.append(given[0].flatten(0, 1).clone()))
    for text in texts:
        ids = np.array([[0, *model.encode(text)][:size]])
        with torch.inference_mode():
            network(torch.from_numpy(ids))
    handle.remove()
    return torch.cat(found).clone()
