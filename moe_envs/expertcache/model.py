"""The language model, its streams of text and the demand for its experts in MoEExpertCache-v0."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from cost.timing import torch_threads
from experts import library, profiles
from experts.data import DataError
from experts.language import LanguageModel
from experts.language.passages import Passages
from experts.offload.demand import Demand, best, needed_next
from experts.offload.model import rounded_copy
from experts.offload.store import expert_bytes
from moe_envs.core.stepped import SteppedModel, located, read
from moe_envs.expertcache.memory import FITTED
from moe_envs.layertopk.observations import projection

SHUFFLES = {"rl_train": 8}  # how often each passage stands in a stream


class CachedModel(SteppedModel):
    """A model over streams `[M, S]` of S passages, whose experts have the precision `weights` and cost
    `loads [K + 1, 3]` in s, B and J to be loaded, 0 to K at once."""

    def __init__(
        self, model: LanguageModel, passages: Passages, streams: np.ndarray, expert_size: int, loads: np.ndarray
    ) -> None:
        super().__init__(model, passages)
        self.streams, self.expert_size, self.loads = streams, expert_size, loads
        self.expert_bytes = np.full(self.layers, expert_size)
        self.projection = projection(self.width)
        self._needed: dict[int, np.ndarray] = {}
        self.demand: Demand

    @classmethod
    def of(
        cls, model: str, text: str | None, split: str, tokens: int, passages: int, weights: str, costs: str
    ) -> CachedModel:
        """The same for the same arguments, as long as the files of the model are the same."""
        return _made(*located(model), text, split, tokens, passages, weights, costs)

    def logits(self, stream: np.ndarray) -> np.ndarray:
        """Router logits `[m, T, L, E]` of streams in the model as it is; T counts all tokens."""
        with torch_threads(1):
            found = self.asked(self.streams[stream].ravel())
        return found.reshape(len(stream), -1, self.layers, self.experts)

    def needed_next(self, stream: int) -> np.ndarray:
        """`needed_next` of a stream in the model as it is, `[T, L, E]`."""
        if stream not in self._needed:
            self._needed[stream] = needed_next(best(self.logits(np.array([stream]))[0], self.k), self.experts)
        return self._needed[stream]


@lru_cache(maxsize=4)
def _made(
    path: str, stamp: int, text: str | None, split: str, tokens: int, passages: int, weights: str, costs: str
) -> CachedModel:
    model, found = read(path, stamp, text, split, tokens)
    kind: Any = weights
    size = expert_bytes(model.settings.d_model, model.settings.d_ff, kind)
    loads = profiles.of_loads(model, Path(path), costs, kind, size)
    made = CachedModel(_rounded(path, stamp, weights), found, streams_of(len(found.ids), passages, split), size, loads)
    if split == "rl_train":
        made.demand = Demand.fit(made.logits(np.arange(min(FITTED, len(made.streams)))), made.k)
    else:
        made.demand = _made(path, stamp, text, "rl_train", tokens, passages, weights, costs).demand
    return made


@lru_cache(maxsize=4)
def _rounded(path: str, stamp: int, weights: Any) -> LanguageModel:
    return rounded_copy(library.load("language", path), weights)


def streams_of(count: int, passages: int, split: str) -> np.ndarray:
    """Numbers of passages `[M, S]` that follow each other; within a shuffle no passage stands twice."""
    if count < passages:
        raise DataError(f"passages={passages}: split {split!r} has {count} passages only")
    random = np.random.default_rng(0)
    found = [random.permutation(count)[: count // passages * passages] for _ in range(SHUFFLES.get(split, 1))]
    return np.concatenate(found).reshape(-1, passages)
