"""A language model over the passages of a split, run a layer of a token at a time; what is computed once is kept."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

import numpy as np
import torch

from experts import language, library
from experts.data import DataError
from experts.language import corpus as corpora
from experts.language import passages as texts
from experts.language.stepping import Stepper


class SteppedModel:
    """A model and passages of `size` tokens; rows of `passage` and `token` say where the environment's rows stand."""

    def __init__(self, model: language.LanguageModel, passages: texts.Passages) -> None:
        settings = model.settings
        self.model, self.passages = model, passages
        self.layers, self.k, self.experts, self.width = (
            settings.layers,
            settings.k,
            settings.num_experts,
            settings.d_model,
        )
        self.size = passages.ids.shape[1] - 1
        self.stepper = Stepper(model.network, self.size)
        self._full = np.full((len(passages.ids), self.size), np.nan, dtype=np.float32)
        self._predicted: tuple[np.ndarray, np.ndarray] | None = None  # `Stepper.predicted` [N, T], once it is needed

    def empty_cache(self, rows: int) -> np.ndarray:
        """Keys or values `[L, n, H, S, F]`; rows come second."""
        heads = self.model.settings.heads
        return np.zeros((self.layers, rows, heads, self.size, self.width // heads), dtype=np.float32)

    def embed(self, passage: np.ndarray, token: np.ndarray) -> np.ndarray:
        """Streams `[m, D]` before the first layer."""
        return self.stepper.embed(self.passages.ids[passage, token])

    def losses(self, stream: np.ndarray, passage: np.ndarray, token: np.ndarray) -> np.ndarray:
        """Losses `[m]` in nats of the tokens after these."""
        return self.stepper.losses(stream, self.passages.ids[passage, token + 1])

    def full_losses(self, passage: np.ndarray) -> np.ndarray:
        """Losses `[m, T]` in nats of the model as it is."""
        for number in np.unique(passage[np.isnan(self._full[passage, 0])]):
            self._full[number] = self.model.loss(self.passages.ids[number]).numpy()
        return np.asarray(self._full[passage])

    def divergences(self, stream: np.ndarray, passage: np.ndarray, token: np.ndarray) -> np.ndarray:
        """Divergence `[m]` in nats of what follows these tokens from what follows in the model as it is."""
        if self._predicted is None:
            shape = self._full.shape
            self._predicted = np.empty((*shape, self.width), np.float32), np.full(shape, np.nan, np.float32)
        means, negentropy = self._predicted
        for number in np.unique(passage[np.isnan(negentropy[passage, 0])]):
            normed = self.model.streams(self.passages.ids[number, :-1])
            means[number], negentropy[number] = self.stepper.predicted(normed)
        return self.stepper.divergences(stream, means[passage, token], negentropy[passage, token])

    def asked(self, passages: np.ndarray) -> np.ndarray:
        """Router logits `[m, T, L, E]` of passages in the model as it is."""
        with torch.inference_mode():
            routing = self.model.network(torch.from_numpy(self.passages.ids[passages, :-1])).routing
        found: np.ndarray = torch.stack([each.logits for each in routing], 1).numpy()
        return found.reshape(len(passages), self.size, self.layers, self.experts)

    def pieces(self, passage: int) -> list[str]:
        """Texts of a passage's tokens, with line breaks and tabs as in a string of Python."""
        decoded = [self.model.decode([int(token)]) for token in self.passages.ids[passage, :-1]]
        return [piece.replace("\n", "\\n").replace("\t", "\\t") for piece in decoded]


def check_numbers(what: str, asked: object, count: int, rows: int) -> np.ndarray:
    """Numbers `[n]` below `count` from `options[what]`; raises `ValueError` for those that are not there."""
    found = np.asarray(asked)
    if found.dtype.kind not in "iu" or found.shape not in ((), (rows,)):
        raise ValueError(f"options[{what!r}]={asked!r}: must be a whole number, or one for each of {rows} rows")
    if found.min() < 0 or found.max() >= count:
        raise ValueError(f"options[{what!r}]={asked!r}: there are {count} {what}s, from 0 on")
    return np.broadcast_to(found, (rows,)).astype(np.int64)


def located(model: str) -> tuple[str, int]:
    """Folder of a language model, and when it was written."""
    path = language.find(model)
    return str(path), (path / "SHA256SUMS").stat().st_mtime_ns if (path / "SHA256SUMS").exists() else 0


@lru_cache(maxsize=8)
def read(
    path: str, stamp: int, text: str | None, split: str, tokens: int
) -> tuple[language.LanguageModel, texts.Passages]:
    """The `located` language model and passages of `tokens` tokens, of a corpus or of those that come with it; the same
    objects for the same arguments."""
    model = library.load("language", path)
    if tokens > model.settings.context:
        raise ValueError(f"tokens={tokens}: the context of the model is {model.settings.context}")
    if text is not None:
        return model, texts.cut(corpora.read(text), model.tokenizer, split, tokens)
    found = texts.load(Path(path), split)
    if tokens >= found.ids.shape[1]:
        longest = found.ids.shape[1] - 1
        raise DataError(f"tokens={tokens}: passages that come with the model have {longest}; give text=CORPUS")
    return model, texts.Passages(found.ids[:, : tokens + 1], found.domain, found.domains)
