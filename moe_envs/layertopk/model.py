"""The language model, the passages and the costs of MoELayerTopK-v0; what is computed once is kept."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from cost.model import Cost
from experts import language, library, profiles
from experts.data import DataError
from experts.language import corpus as corpora
from experts.language import passages as texts
from experts.language.stepping import Stepper
from moe_envs.layertopk.observations import projection


class SteppedModel:
    """A model over the passages of a split, with the costs of each number of experts.

    `costs [L, K + 1, 3]` are a row's in s, B, J for a token in a layer, in a batch of `batch` rows; `reference` is the
    cost of a passage with K experts.
    """

    def __init__(self, model: language.LanguageModel, passages: texts.Passages, costs: np.ndarray) -> None:
        settings = model.settings
        self.model, self.passages, self.costs = model, passages, costs
        self.layers, self.k, self.experts, self.width = (
            settings.layers,
            settings.k,
            settings.num_experts,
            settings.d_model,
        )
        self.size = passages.ids.shape[1] - 1
        self.stepper = Stepper(model.network, self.size)
        self.reference = Cost(*(costs[:, self.k].sum(0) * self.size).tolist())
        self.projection = projection(self.width)
        self._full = np.full((len(passages.ids), self.size), np.nan, dtype=np.float32)
        self._last: np.ndarray | None = None  # normed streams [N, T, D] with K experts, once they are needed

    @classmethod
    def of(cls, model: str, text: str | None, split: str, tokens: int, costs: str, batch: int) -> SteppedModel:
        """The same for the same arguments, as long as the files are the same."""
        path = language.find(model)
        stamp = (path / "SHA256SUMS").stat().st_mtime_ns if (path / "SHA256SUMS").exists() else 0
        return _made(str(path), stamp, text, split, tokens, costs, batch)

    def empty_cache(self, rows: int) -> np.ndarray:
        """Keys or values `[L, n, H, S, F]`; rows come second."""
        heads = self.model.settings.heads
        return np.zeros((self.layers, rows, heads, self.size, self.width // heads), dtype=np.float32)

    def check_passages(self, asked: Any, rows: int) -> np.ndarray:
        """Numbers of passages `[n]`; raises `ValueError` for those that are not there."""
        found = np.asarray(asked)
        if found.dtype.kind not in "iu" or found.shape not in ((), (rows,)):
            raise ValueError(f"options['passage']={asked!r}: must be a whole number, or one for each of {rows} rows")
        if found.min() < 0 or found.max() >= len(self.passages.ids):
            raise ValueError(f"options['passage']={asked!r}: there are {len(self.passages.ids)} passages, from 0 on")
        return np.broadcast_to(found, (rows,)).astype(np.int64)

    def embed(self, passage: np.ndarray, token: np.ndarray) -> np.ndarray:
        """Streams `[m, D]` before the first layer."""
        return self.stepper.embed(self.passages.ids[passage, token])

    def losses(self, stream: np.ndarray, passage: np.ndarray, token: np.ndarray) -> np.ndarray:
        """Losses `[m]` in nats of the tokens after these."""
        return self.stepper.losses(stream, self.passages.ids[passage, token + 1])

    def full_losses(self, passage: np.ndarray) -> np.ndarray:
        """Losses `[m, T]` in nats with K experts everywhere."""
        for number in np.unique(passage[np.isnan(self._full[passage, 0])]):
            self._full[number] = self.model.loss(self.passages.ids[number]).numpy()
        return np.asarray(self._full[passage])

    def divergences(self, stream: np.ndarray, passage: np.ndarray, token: np.ndarray) -> np.ndarray:
        """Divergence `[m]` in nats of what follows these tokens from what follows with K experts everywhere."""
        if self._last is None:
            self._last = np.full((*self._full.shape, self.width), np.nan, dtype=np.float32)
        for number in np.unique(passage[np.isnan(self._last[passage, 0, 0])]):
            self._last[number] = self.model.streams(self.passages.ids[number, :-1]).numpy()
        return self.stepper.divergences(stream, self._last[passage, token])

    def pieces(self, passage: int) -> list[str]:
        """Texts of a passage's tokens, with line breaks and tabs as in a string of Python."""
        decoded = [self.model.decode([int(token)]) for token in self.passages.ids[passage, :-1]]
        return [piece.replace("\n", "\\n").replace("\t", "\\t") for piece in decoded]


@lru_cache(maxsize=8)
def _made(path: str, stamp: int, text: str | None, split: str, tokens: int, costs: str, batch: int) -> SteppedModel:
    model = library.load("language", path)
    if tokens > model.settings.context:
        raise ValueError(f"tokens={tokens}: the context of the model is {model.settings.context}")
    if text is None:
        found = texts.load(Path(path), split)
        if tokens >= found.ids.shape[1]:
            longest = found.ids.shape[1] - 1
            raise DataError(f"tokens={tokens}: passages that come with the model have {longest}; give text=CORPUS")
        found = texts.Passages(found.ids[:, : tokens + 1], found.domain, found.domains)
    else:
        found = texts.cut(corpora.read(text), model.tokenizer, split, tokens)
    return SteppedModel(model, found, profiles.of_language(model, Path(path), costs, batch))
