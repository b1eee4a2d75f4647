"""Byte-pair encoding of text (Sennrich et al. 2016), of bytes, so that any text can be encoded."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec
from typing import TYPE_CHECKING

import numpy as np

from experts.data import DataError
from experts.language.corpus import Corpus

if TYPE_CHECKING:
    from tokenizers import Tokenizer

END = "<|end|>"  # between documents, token 0
LEAST = 257  # tokens: all bytes, and the end


def train(corpus: Corpus, vocabulary: int) -> Tokenizer:
    """A tokenizer of so many tokens, of the corpus's training documents."""
    _require_library()
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    if vocabulary < LEAST:
        raise ValueError(f"vocabulary={vocabulary}: must be at least {LEAST}")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary, special_tokens=[END], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    tokenizer.train_from_iterator(_texts(corpus), trainer)
    tokenizer.encode_special_tokens = True
    return tokenizer


def load(text: str) -> Tokenizer:
    """A tokenizer from its JSON; raises `DataError` for anything else."""
    _require_library()
    from tokenizers import Tokenizer

    try:
        found = Tokenizer.from_str(text)
    except Exception as error:  # the library raises nothing narrower
        raise DataError(f"this is no tokenizer: {error}") from error
    if found.token_to_id(END) != 0:
        raise DataError(f"this tokenizer has no token {END} as its first")
    found.encode_special_tokens = True  # END within a text is text
    return found


def encoded(tokenizer: Tokenizer, documents: tuple[str, ...]) -> np.ndarray:
    """Tokens `[n]` of documents, an `END` before each, as uint16."""
    parts = [
        np.array([0, *each.ids], dtype=np.uint16)
        for each in tokenizer.encode_batch(list(documents), add_special_tokens=False)
    ]
    return np.concatenate(parts) if parts else np.zeros(0, dtype=np.uint16)


def _require_library() -> None:
    if find_spec("tokenizers") is None:
        raise ImportError("the language model needs tokenizers: pip install 'moe-envs[lm]'")


def _texts(corpus: Corpus) -> Iterator[str]:
    for documents in corpus.documents["train"].values():
        yield from documents
