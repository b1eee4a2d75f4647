"""The reference corpus: eleven domains of free text, from packages of Debian and from Python's own sources.

Packages are downloaded by `apt-get download` and unpacked beside the corpus; nothing is installed, no root is needed.
"""

from __future__ import annotations

import gzip
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from cost.arguments import one_line
from cost.files import save_json, sha256_of
from experts.data import DataError
from experts.language.corpus import ABOUT

DIGITS = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/"  # of numbers in dictd's indexes
ENTRIES = 8_000  # characters of dictionary entries in a document, at least
LICENCE = re.compile(r"^License: *(\S.*)$", re.MULTILINE)


class Domain(NamedTuple):
    """What a domain is read from: packages, and a function from the folders they are unpacked in to documents."""

    packages: tuple[str, ...]
    read: Callable[[list[Path]], Iterator[str]]


def scripture(folders: list[Path]) -> Iterator[str]:
    """Chapters of the King James Version, by the program of its package."""
    program, data = folders[0] / "usr/bin/bible", folders[1] / "usr/lib"
    said = subprocess.run(
        [program, "-p", data, "-l", "80", "gen1:1-rev22:21"], capture_output=True, text=True, check=True
    )
    chapters = re.split(r"\n(?=\w[\w ]*? \d+\n\n)", said.stdout)
    return (each for each in chapters if each.strip())


def dictionary(folders: list[Path]) -> Iterator[str]:
    """Entries of a dictionary of dictd, several in a document."""
    (index,) = folders[0].glob("usr/share/dictd/*.index")
    (packed,) = folders[0].glob("usr/share/dictd/*.dict.dz")
    raw, places = gzip.decompress(packed.read_bytes()), set[tuple[int, int]]()
    for line in index.read_text(errors="replace").splitlines():
        word, *numbers = line.split("\t")[:3]
        if not word.startswith("00"):  # those are about the dictionary
            places.add((_number(numbers[0]), _number(numbers[1])))
    found = ""
    for start, length in sorted(places):
        found += raw[start : start + length].decode("utf-8", errors="replace").rstrip() + "\n\n"
        if len(found) >= ENTRIES:
            yield found
            found = ""


def manual(folders: list[Path]) -> Iterator[str]:
    """Manual pages as a terminal shows them, without bold and underlined letters."""
    if not shutil.which("groff"):
        raise DataError("groff is not installed, which renders manual pages: apt-get install groff")
    pages = sorted(path for folder in folders for path in folder.glob("usr/share/man/**/man*/*.gz"))
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        yield from (text for text in pool.map(_rendered, pages) if text)


def _rendered(path: Path) -> str:
    source = gzip.decompress(path.read_bytes())
    if source.lstrip().startswith(b".so "):  # another name of a page
        return ""
    command = ["groff", "-K", "utf-8", "-mandoc", "-t", "-T", "utf8", "-P", "-cbou", "-rLL=80n"]
    return subprocess.run(command, input=source, capture_output=True, check=True).stdout.decode("utf-8", "replace")


def python(folders: list[Path]) -> Iterator[str]:
    """Modules of Python's standard library."""
    root = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(root.rglob("*.py")):
        if "site-packages" not in path.parts and "test" not in path.parts:
            yield path.read_text(encoding="utf-8", errors="replace")


def headers(folders: list[Path]) -> Iterator[str]:
    """C headers."""
    return _files(folders, "*.h")


def guides(folders: list[Path]) -> Iterator[str]:
    """Sources of Python's documentation."""
    return _files(folders, "*.rst.txt")


def glosses(folders: list[Path]) -> Iterator[str]:
    """Words with their meanings and examples, of WordNet."""
    found = ""
    for path in sorted(folders[0].glob("usr/share/wordnet/data.*")):
        for line in path.read_text(errors="replace").splitlines():
            if line.startswith("  "):
                continue
            fields, gloss = line.split(" | ", 1)
            words = fields.split(" ")
            names = words[4 : 4 + 2 * int(words[3], 16) : 2]
            found += f"{', '.join(names).replace('_', ' ')}: {gloss.strip()}\n"
            if len(found) >= ENTRIES:
                yield found
                found = ""


DOMAINS = {
    "c-headers": Domain(("linux-libc-dev", "libc6-dev", "libssl-dev", "zlib1g-dev", "libgmp-dev"), headers),
    "computing": Domain(("dict-foldoc",), dictionary),
    "dictionary": Domain(("dict-gcide",), dictionary),
    "manual-de": Domain(("manpages-de",), manual),
    "manual-en": Domain(("manpages", "manpages-dev", "git-man", "perl-doc"), manual),
    "manual-es": Domain(("manpages-es",), manual),
    "manual-fr": Domain(("manpages-fr",), manual),
    "python": Domain((), python),
    "python-guides": Domain(("python3.11-doc",), guides),
    "scripture": Domain(("bible-kjv", "bible-kjv-text"), scripture),
    "wordnet": Domain(("wordnet-base",), glosses),
}


def write(folder: Path, limit: int = 3_500_000, report: Callable[[str], object] = lambda line: None) -> Path:
    """Make the reference corpus in a new folder, of about `limit` characters a domain; raises `DataError` where a
    package cannot be had."""
    if folder.exists():
        raise DataError(f"{folder} exists: choose another one, or delete it")
    about: dict[str, object] = {"python": {"version": sys.version.split()[0], "licence": "PSF-2.0"}}
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as partial:
        made, debs = Path(partial) / "corpus", Path(partial) / "packages"
        debs.mkdir()
        for name, domain in DOMAINS.items():
            folders = [_unpacked(package, debs, about) for package in domain.packages]
            (made / name).mkdir(parents=True)
            length = count = 0
            texts = set(domain.read(folders))  # a page often has several names
            for text in sorted(texts, key=lambda text: sha256_of(text.encode())):
                if length >= limit:
                    break
                (made / name / f"{count:05d}.txt").write_text(text)
                length, count = length + len(text), count + 1
            report(f"{name}: {count:,} documents, {length:,} characters")
        save_json(made / ABOUT, {"packages": about})
        made.replace(folder)
    return folder


def _unpacked(package: str, folder: Path, about: dict[str, object]) -> Path:
    """The folder that a package is unpacked in; its version, hash and licences are noted."""
    done = subprocess.run(["apt-get", "download", package], cwd=folder, capture_output=True, text=True)
    found = sorted(folder.glob(f"{package}_*.deb"))
    if done.returncode or not found:
        said = one_line(done.stderr.strip() or "no file")
        raise DataError(f"apt-get download {package} failed: {said}; apt-get update makes the list of packages anew")
    place = folder / package
    subprocess.run(["dpkg-deb", "-x", found[0], place], check=True)
    copyright_file = place / "usr/share/doc" / package / "copyright"
    licences = LICENCE.findall(copyright_file.read_text(errors="replace")) if copyright_file.exists() else []
    about[package] = {
        "version": found[0].name.split("_")[1], "sha256": sha256_of(found[0].read_bytes()),
        "licences": sorted(set(licences)), "copyright": f"/usr/share/doc/{package}/copyright",
    }  # fmt: skip
    return place


def _files(folders: list[Path], pattern: str) -> Iterator[str]:
    for folder in folders:
        for path in sorted(folder.rglob(pattern)):
            if path.is_file():
                yield path.read_text(encoding="utf-8", errors="replace")


def _number(text: str) -> int:
    number = 0
    for digit in text:
        number = 64 * number + DIGITS.index(digit)
    return number
