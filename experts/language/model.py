"""A language model as it is used: text in, text and losses out; saved as a folder under SHA-256."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import TypeAdapter, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load as tensors_in
from safetensors.torch import save as to_bytes

from cost.arguments import one_line
from cost.files import digest, healed, read_verified, replacing, sums_of, write_bytes
from experts import zoo
from experts.compression.quantize import dequantize, quantize, quantized_bytes
from experts.data import DataError
from experts.language import tokens
from experts.language.transformer import Experts, ModelSettings, Transformer

if TYPE_CHECKING:
    from tokenizers import Tokenizer

SHIPPED = zoo.ASSETS / "_language"
FORMAT, SUMS = 1, "SHA256SUMS"
METADATA, WEIGHTS, TOKENIZER = "metadata.json", "model.safetensors", "tokenizer.json"
Weights = Literal["float32", "bfloat16", "int8"]
COLD = 1e-4  # temperatures and shares below it leave one token
MOST = 1e5  # a weight of a model that can be run
WINDOW = 0.5  # share of the context that a text's windows overlap, so that each token is judged after many others


class LanguageModel:
    """A network with its tokenizer. `metadata` says what it was trained on and how."""

    def __init__(self, network: Transformer, tokenizer: Tokenizer, metadata: dict[str, Any]) -> None:
        if tokenizer.get_vocab_size() > network.settings.vocabulary:
            size = network.settings.vocabulary
            raise DataError(f"the tokenizer has {tokenizer.get_vocab_size()} tokens, the network {size}")
        self.network, self.tokenizer, self.metadata = network, tokenizer, metadata

    @property
    def settings(self) -> ModelSettings:
        """Sizes of the network."""
        return self.network.settings

    def __repr__(self) -> str:
        count, own = sum(each.numel() for each in self.network.parameters()), self.settings
        return f"LanguageModel({count:,} parameters, {own.layers} layers of {own.num_experts} experts, {own.k} a token)"

    @cached_property
    def sha256(self) -> str:
        """Of the weights."""
        return digest(self.network.state_dict())

    def encode(self, text: str) -> list[int]:
        """Tokens of a text."""
        return list(self.tokenizer.encode(text, add_special_tokens=False).ids)

    def decode(self, ids: list[int]) -> str:
        """The text of tokens; of part of a letter's bytes a replacement character."""
        return str(self.tokenizer.decode(ids))

    @torch.inference_mode()
    def loss(self, ids: Any, k: Experts | None = None) -> torch.Tensor:
        """Negative log-likelihood in nats of each token after the first, `[B, T - 1]`, of ids `[B, T]` or `[T]`."""
        given = self._given(ids)
        rows = given if given.ndim == 2 else given[None]
        if rows.shape[1] < 2:
            raise ValueError(f"{rows.shape[1]} tokens: a loss needs at least two")
        logits = self.network(rows[:, :-1], k if not isinstance(k, torch.Tensor) else k[:, :-1]).logits
        found = F.cross_entropy(logits.float().flatten(0, 1), rows[:, 1:].flatten(), reduction="none")
        return found.view(len(rows), -1) if given.ndim == 2 else found

    @torch.inference_mode()
    def streams(self, ids: Any) -> torch.Tensor:
        """What the last norm returns after each token of ids `[T]`, `[T, D]`; the embedding makes logits of it."""
        return self.network(self._given(ids)[None]).streams[0]

    @torch.inference_mode()
    def divergence(self, ids: Any, k: Experts) -> torch.Tensor:
        """Kullback-Leibler divergence in nats `[B, T]` of what k experts predict after each token of ids `[B, T]` from
        what the model's own number predicts."""
        given = self._given(ids)
        aim, found = (self.network(given, each).logits.float().log_softmax(-1) for each in (None, k))
        return F.kl_div(found, aim, reduction="none", log_target=True).sum(-1)

    def _given(self, ids: Any) -> torch.Tensor:
        return torch.as_tensor(np.asarray(ids), dtype=torch.int64, device=self.network.embedding.weight.device)

    def bits_per_byte(self, text: str, k: Experts | None = None) -> float:
        """Bits that the model needs for a byte of a text, beginning with nothing known."""
        if not text:
            raise ValueError("an empty text has no bits per byte")
        total = sum(float(each.sum()) for each in self._losses(self.encode(text), k))
        return total / math.log(2) / len(text.encode())

    def _losses(self, ids: list[int], k: Experts | None) -> Iterator[torch.Tensor]:
        """Losses of all tokens, in windows of the context; each window but the first begins in the one before."""
        context = self.settings.context
        ids, start, done = [0, *ids], 0, 1
        while done < len(ids):
            window = ids[start : start + context + 1]
            yield self.loss(window, k)[done - start - 1 :]
            done = start + len(window)
            start += max(1, int(context * WINDOW))

    @torch.inference_mode()
    def generate(
        self, prompt: str | list[str], tokens: int = 100, k: Experts | None = None, *, temperature: float = 0.8,
        top_p: float = 0.95, seed: int | None = 0,
    ) -> Any:  # fmt: skip
        """The text of at most so many tokens after a prompt, or after each of several, which are decoded side by side.

        `temperature=0` takes the most likely token. A text ends where the model ends a document. Prompts and answers
        must fit into the context; of longer prompts the end is used.
        """
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        room = self.settings.context - tokens
        if room < 1 or tokens < 1:
            raise ValueError(f"tokens={tokens}: must be from 1 to {self.settings.context - 1}, the context less one")
        given = [[0, *self.encode(each)][-room:] for each in prompts]
        cache, last = self.network.cache(len(given)), []
        for row, ids in enumerate(given):  # prompts of different lengths: one after the other
            one = self.network.cache(1, size=len(ids))
            last.append(self.network(self._given([ids]), k, one).logits[0, -1])
            cache.keys[:, row, :, : len(ids)], cache.values[:, row, :, : len(ids)] = one.keys[:, 0], one.values[:, 0]
            cache.lengths[row] = len(ids)
        generator = torch.Generator().manual_seed(seed) if seed is not None else None
        logits, found = torch.stack(last), [list[int]() for _ in given]
        running = torch.ones(len(given), dtype=torch.bool)
        for step in range(tokens):
            chosen = sampled(logits.float().cpu(), temperature, top_p, generator)
            running &= chosen != 0
            for row in running.nonzero()[:, 0].tolist():
                found[row].append(int(chosen[row]))
            if step == tokens - 1 or not running.any():
                break
            logits = self.network(self._given(chosen[:, None]), k, cache).logits[:, -1]
        texts = [self.decode(each) for each in found]
        return texts[0] if isinstance(prompt, str) else texts

    def save(self, folder: Path | str, weights: Weights = "float32") -> Path:
        """Write the model into a folder, in place of one that may be there, its weights in float32, bfloat16 or int8
        with a scale for each row."""
        if weights not in get_args(Weights):
            raise ValueError(f"weights={weights!r} is not one of {', '.join(get_args(Weights))}")
        state = {name: _packed(value.cpu(), weights) for name, value in self.network.state_dict().items()}
        metadata = {**self.metadata, "format": FORMAT, "settings": asdict(self.settings), "weights": weights}
        members = {
            METADATA: json.dumps(metadata, indent=1).encode(),
            WEIGHTS: to_bytes(state),
            TOKENIZER: self.tokenizer.to_str().encode(),
        }
        target = Path(folder)
        with replacing(target) as new:
            for name, raw in (members | {SUMS: sums_of(members)}).items():
                write_bytes(new / name, raw)
        return target


def find(name_or_path: Path | str) -> Path:
    """The folder of a model: by name, those that are shipped (`SHIPPED`) first and those in the user's cache next; or
    as it is. Raises `DataError` for what can be no name of a folder."""
    try:
        for folder in (SHIPPED, zoo.cache_folder() / "language"):
            if zoo.NAME.fullmatch(str(name_or_path)) and healed(folder / str(name_or_path)).is_dir():
                return folder / str(name_or_path)
        return healed(Path(name_or_path))
    except OSError as error:
        raise DataError(f"{str(name_or_path)[:80]!r} is no language model: {error.strerror}") from error


def load(name_or_path: Path | str) -> LanguageModel:
    """A model by name or folder, every byte verified; raises `DataError` where something is absent, altered or
    foreign."""
    path = find(name_or_path)
    try:
        sums = {name: sha256 for sha256, name in map(str.split, (path / SUMS).read_text().splitlines())}
    except (OSError, ValueError) as error:
        known = ", ".join(sorted(each.name for each in SHIPPED.glob("[!.]*"))) or "none"
        raise DataError(
            f"{path} is no language model, nor is it the name of one (shipped: {known}): {error}"
        ) from error
    mend = f"its SHA-256 is not the one in {SUMS}"
    raw = {
        name: read_verified(path / name, sums.get(name, ""), DataError, mend) for name in (METADATA, WEIGHTS, TOKENIZER)
    }
    try:
        metadata = json.loads(raw[METADATA])
        if metadata.pop("format") != FORMAT:
            raise DataError(f"{path / METADATA} is of another format than {FORMAT}")
        settings = TypeAdapter(ModelSettings).validate_python(metadata.pop("settings"))
        metadata.pop("weights")
        of_experts = settings.layers * settings.num_experts * settings.d_ff
        if (settings.vocabulary + of_experts) * settings.d_model > len(raw[WEIGHTS]):  # before memory is taken for it
            raise RuntimeError("the settings are those of a larger model")
        with torch.random.fork_rng(devices=[]):  # first weights are drawn, and replaced
            network = Transformer(settings)
        shapes = {name: value.shape for name, value in network.state_dict().items()}
        network.load_state_dict(
            {name: _unpacked(value, shapes[name]) for name, value in tensors_in(raw[WEIGHTS]).items()}
        )
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, ValidationError) as error:
        raise DataError(f"{path / METADATA} is not that of a language model: {one_line(error)}") from error
    except (RuntimeError, SafetensorError) as error:
        raise DataError(f"{path / WEIGHTS} does not fit its settings: {one_line(error)}") from error
    require_sound(network, path / WEIGHTS)
    tokenizer = tokens.load(raw[TOKENIZER].decode("utf-8", errors="replace"))
    return LanguageModel(network.eval().requires_grad_(False), tokenizer, metadata)


def require_sound(network: Transformer, where: Path) -> None:
    """Raise `DataError` for weights that cannot be run."""
    if not all(bool((value.abs() < MOST).all()) for value in network.state_dict().values()):  # False for NaN
        raise DataError(f"{where} has weights that are not finite, or above {MOST:g}")


def _packed(weight: torch.Tensor, weights: Weights) -> torch.Tensor:
    if weights == "int8" and weight.ndim == 2:
        return torch.frombuffer(bytearray(quantize(weight.float().numpy(), 8)), dtype=torch.uint8)
    return weight.to(torch.bfloat16 if weights == "bfloat16" else torch.float32).contiguous()


def _unpacked(stored: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    if stored.dtype != torch.uint8:
        return stored.float()
    if len(shape) != 2 or len(stored) != quantized_bytes((shape[0], shape[1]), 8):
        raise RuntimeError(f"{len(stored)} bytes for a weight {tuple(shape)}")
    return torch.from_numpy(dequantize(stored.numpy(), (shape[0], shape[1]), 8))


def sampled(
    logits_BV: torch.Tensor, temperature: float, top_p: float, generator: torch.Generator | None
) -> torch.Tensor:
    """A token for each row `[B]`: of the most likely ones whose probabilities sum to `top_p` (Holtzman et al. 2020)."""
    if temperature < COLD:
        return logits_BV.argmax(-1)
    order_BV = logits_BV.argsort(-1, descending=True)
    odds_BV = (logits_BV.gather(-1, order_BV) / temperature).softmax(-1)
    odds_BV = odds_BV.masked_fill(odds_BV.cumsum(-1) - odds_BV >= max(top_p, COLD), 0.0)
    place_B1 = torch.multinomial(odds_BV, 1, generator=generator)
    return order_BV.gather(-1, place_B1)[:, 0]
