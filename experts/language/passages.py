"""Passages of text of equal length, by domain: what the environments of the language model run on."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from safetensors.numpy import save as to_bytes

from cost.files import read_arrays, sealed, write_bytes
from experts.data import DataError
from experts.language import tokens
from experts.language.corpus import Corpus

if TYPE_CHECKING:
    from tokenizers import Tokenizer

FILE = "passages.safetensors"  # in a model's folder
SPLITS = {"rl_train": 128, "validation": 48, "test": 64}  # passages of a domain that are kept


@dataclass(frozen=True)
class Passages:
    """Tokens `[N, T + 1]` of N passages, the domain of each, `[N]`, and the names of the domains."""

    ids: np.ndarray
    domain: np.ndarray
    domains: tuple[str, ...]


def cut(
    corpus: Corpus, tokenizer: Tokenizer, split: str, size: int = 64, count: int | None = None, seed: int = 0
) -> Passages:
    """Passages of `size` tokens and the one after, drawn from the text of each domain, `count` of a domain (default:
    that of `SPLITS`) or as many as there are; raises `DataError` where a domain has none."""
    random, parts = np.random.default_rng(seed), list[np.ndarray]()
    for domain in corpus.domains:
        text = tokens.encoded(tokenizer, corpus.documents[split][domain])
        starts = random.permutation((len(text) - 1) // size)[: SPLITS[split] if count is None else count] * size
        if not len(starts):
            raise DataError(f"domain {domain!r} has {len(text)} tokens in split {split!r}, a passage has {size}")
        parts.append(text[starts[:, None] + np.arange(size + 1)])
    number = np.repeat(np.arange(len(parts)), [len(part) for part in parts])
    return Passages(np.concatenate(parts).astype(np.int64), number, corpus.domains)


def save(folder: Path, corpus: Corpus, tokenizer: Tokenizer) -> None:
    """Write passages of all splits into a model's folder."""
    arrays: dict[str, np.ndarray] = {}
    for split in SPLITS:
        found = cut(corpus, tokenizer, split)
        arrays |= {f"{split}/ids": found.ids.astype(np.uint16), f"{split}/domain": found.domain.astype(np.uint8)}
    settings = "\n".join(corpus.domains)
    write_bytes(folder / FILE, to_bytes(arrays, sealed(arrays, settings)))


def load(folder: Path, split: str) -> Passages:
    """Passages of a split that `save` wrote; raises `DataError` where they are absent, damaged or foreign."""
    metadata, arrays = read_arrays(folder / FILE, DataError, "give a corpus, or build the model again")
    try:
        ids, domain = (arrays[f"{split}/{name}"].astype(np.int64) for name in ("ids", "domain"))
        names = tuple(metadata["settings"].split("\n"))
        if ids.ndim != 2 or domain.shape != ids.shape[:1] or ids.shape[1] < 2 or domain.max() >= len(names):
            raise ValueError(f"arrays of {ids.shape} and {domain.shape}")
    except (KeyError, ValueError) as error:
        raise DataError(f"{folder / FILE} holds no passages of split {split!r}: {error}") from error
    return Passages(ids, domain, names)
