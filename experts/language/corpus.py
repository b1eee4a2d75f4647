"""Text of several domains, split by document.

A corpus is a folder with a folder of text files for each domain; a file is a document. Which split a document is in
depends on its text alone, so that no text is in two splits, and a corpus that grows keeps its splits.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cost.files import sha256_of
from experts.data import DataError

SPLITS = ("train", "rl_train", "validation", "test")
SHARES = (0.84, 0.06, 0.04, 0.06)
LEAST, MOST = 200, 2**16  # characters of a document: shorter ones are left out, longer ones are cut into several
ABOUT = "about.json"  # in the folder: sources and licences


@dataclass(frozen=True)
class Corpus:
    """Documents by split and domain, in an order drawn by their hashes; `about` has the sources and their licences."""

    documents: dict[str, dict[str, tuple[str, ...]]]
    about: dict[str, Any]

    @property
    def domains(self) -> tuple[str, ...]:
        """Names of the domains, in alphabetical order."""
        return tuple(self.documents[SPLITS[0]])

    @property
    def sha256(self) -> str:
        """Of all documents with their splits and domains."""
        return sha256_of(json.dumps(self.documents, sort_keys=True).encode())

    def text(self, split: str, domain: str) -> str:
        """All documents of a domain in a split, with an empty line between two."""
        return "\n\n".join(self.documents[split][domain])


def read(folder: Path | str, limit: int | None = None) -> Corpus:
    """The corpus of a folder, of about `limit` characters a domain in all splits together. Folders whose names begin
    with "." are no domains.

    Raises `DataError` where there is no domain, or one has no document in one of the splits.
    """
    root = Path(folder)
    try:
        folders = sorted(each for each in root.glob("[!.]*") if each.is_dir())
    except OSError as error:
        raise DataError(f"{str(root)[:80]} is no folder of text files: {error.strerror}") from error
    if not folders:
        raise DataError(f"{root} has no folder of text files: a corpus is a folder with one folder for each domain")
    documents: dict[str, dict[str, tuple[str, ...]]] = {split: {} for split in SPLITS}
    for domain in folders:
        for split, found in _split(_documents(domain), limit).items():
            if not found and limit is not None:
                raise DataError(f"limit={limit}: so few characters of {domain} have no document in the split {split!r}")
            if not found:
                raise DataError(
                    f"{domain} has too few documents: none is in the split {split!r}. About 50 text files of "
                    f"{LEAST} characters and more are enough, or fewer that are longer than {MOST:,} characters"
                )
            documents[split][domain.name] = found
    return Corpus(documents, _about(root))


def _documents(folder: Path) -> dict[str, str]:
    """Different documents of a domain by their hashes, in the order of these."""
    found = {}
    for path in sorted(each for each in folder.rglob("*") if each.is_file()):
        text = path.read_bytes().decode("utf-8", errors="replace").replace("\r\n", "\n").strip()
        for start in range(0, len(text), MOST):
            part = text[start : start + MOST].strip()
            if len(part) >= LEAST:
                found[hashlib.sha256(part.encode()).hexdigest()] = part
    return dict(sorted(found.items()))


def _split(documents: dict[str, str], limit: int | None) -> dict[str, tuple[str, ...]]:
    """Documents by split, until there are `limit` characters of them."""
    found: dict[str, list[str]] = {split: [] for split in SPLITS}
    length = 0
    for key, text in documents.items():
        if limit is not None and length >= limit:
            break
        length += len(text)
        found[_split_of(key)].append(text)
    return {split: tuple(texts) for split, texts in found.items()}


def _split_of(key: str) -> str:
    """The split of a document, by the end of its hash, whose beginning orders the documents."""
    place, edge = int(key[-8:], 16) / 2**32, 0.0
    for split, share in zip(SPLITS, SHARES, strict=True):
        edge += share
        if place < edge:
            return split
    return SPLITS[-1]


def _about(folder: Path) -> dict[str, Any]:
    path = folder / ABOUT
    if not path.exists():
        return {}
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read: {error}") from error
    if not isinstance(found, dict):
        raise DataError(f"{path} must hold a JSON object")
    return found
