"""Bits per byte of a language model on a corpus, beside those of general compressors."""

from __future__ import annotations

import bz2
import lzma
from collections.abc import Callable
from pathlib import Path
from typing import Any

from experts.language import corpus as corpora
from experts.language.model import LanguageModel
from experts.language.transformer import Experts


def evaluate(
    model: LanguageModel, data: Path | str, split: str = "test", limit: int | None = None, most: int | None = None,
    k: Experts | None = None, report: Callable[[float], object] = lambda share: None,
) -> list[dict[str, Any]]:  # fmt: skip
    """A row for each domain of the corpus in the folder `data`, by name, and one of their means ("mean").

    `model`, `xz` and `bzip2` are bits per byte of the same text, the first `most` characters of the split; of the two
    compressors with their strongest setting, as one file. `limit` is that of `corpus.read`.
    """
    if split not in corpora.SPLITS:
        raise ValueError(f"split={split!r} is not one of {', '.join(corpora.SPLITS)}")
    text, rows = corpora.read(data, limit), list[dict[str, Any]]()
    for number, domain in enumerate(text.domains):
        said = text.text(split, domain)[:most]
        raw = said.encode()
        rows.append({
            "domain": domain, "bytes": len(raw), "model": model.bits_per_byte(said, k),
            "xz": 8 * len(lzma.compress(raw, preset=9 | lzma.PRESET_EXTREME)) / len(raw),
            "bzip2": 8 * len(bz2.compress(raw, 9)) / len(raw),
        })  # fmt: skip
        report((number + 1) / len(text.domains))
    means = {name: sum(row[name] for row in rows) / len(rows) for name in ("model", "xz", "bzip2")}
    return [*rows, {"domain": "mean", "bytes": sum(row["bytes"] for row in rows), **means}]
