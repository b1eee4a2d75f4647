"""Corpora: what a document is, which split it is in, what is said of a folder that is none."""

import gzip
from pathlib import Path

import pytest

from experts.data import DataError
from experts.language import corpus, debian


def folder_of(root: Path, domains: dict[str, int]) -> Path:
    for domain, count in domains.items():
        (root / domain / "deep").mkdir(parents=True)
        for number in range(count):
            (root / domain / "deep" / f"{number}.txt").write_text(f"{domain} {number}: " + "some words " * 30)
    return root


def test_a_folder_is_read_and_split_by_document(tmp_path: Path) -> None:
    found = corpus.read(folder_of(tmp_path, {"one": 400, "two": 300}))
    assert found.domains == ("one", "two")
    every = [text for split in corpus.SPLITS for domain in found.domains for text in found.documents[split][domain]]
    assert len(every) == len(set(every)) == 700
    share = sum(map(len, found.documents["train"].values())) / 700
    assert share == pytest.approx(corpus.SHARES[0], abs=0.05)
    assert found.text("test", "one").startswith("one ")


def test_a_corpus_that_grows_keeps_its_splits(tmp_path: Path) -> None:
    before = corpus.read(folder_of(tmp_path / "a", {"one": 100}))
    after = corpus.read(folder_of(tmp_path / "b", {"one": 200}))
    for split in corpus.SPLITS:
        assert set(before.documents[split]["one"]) <= set(after.documents[split]["one"])
    assert before.sha256 != after.sha256
    assert before.sha256 == corpus.read(tmp_path / "a").sha256


def test_the_limit_is_of_all_splits_and_long_texts_are_cut(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, {"one": 300})
    whole, part = corpus.read(folder), corpus.read(folder, limit=40_000)
    assert sum(len(part.text(split, "one")) for split in corpus.SPLITS) < 42_000
    assert set(part.documents["train"]["one"]) < set(whole.documents["train"]["one"])
    (folder / "one" / "long.txt").write_text("".join(f"{number} " for number in range(40_000)))
    assert max(len(text) for text in corpus.read(folder).documents["train"]["one"]) <= corpus.MOST


@pytest.mark.parametrize(("domains", "message"), [({}, "one folder for each domain"), ({"a": 2}, "too few documents")])
def test_what_is_no_corpus_is_told(tmp_path: Path, domains: dict[str, int], message: str) -> None:
    with pytest.raises(DataError, match=message):
        corpus.read(folder_of(tmp_path, domains))


def test_hidden_folders_are_no_domains_and_a_limit_that_is_too_low_is_told(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, {"one": 100, ".git": 100})
    assert corpus.read(folder).domains == ("one",)
    with pytest.raises(DataError, match="limit=900: so few characters of "):
        corpus.read(folder, limit=900)


def test_damaged_metadata_are_named(tmp_path: Path) -> None:
    folder_of(tmp_path, {"one": 100})
    (tmp_path / corpus.ABOUT).write_text("[1]")
    with pytest.raises(DataError, match=r"about\.json must hold"):
        corpus.read(tmp_path)
    (tmp_path / corpus.ABOUT).write_text("{")
    with pytest.raises(DataError, match=r"about\.json cannot be read"):
        corpus.read(tmp_path)


def test_dictionaries_headers_and_wordnet_are_read(tmp_path: Path) -> None:
    place = tmp_path / "usr/share/dictd"
    place.mkdir(parents=True)
    entries = [f"word{number}\n   " + "a meaning " * 100 + "\n" for number in range(20)]
    starts = [sum(len(each) for each in entries[:number]) for number in range(20)]

    def digits(number: int) -> str:
        return debian.DIGITS[number // 4096] + debian.DIGITS[number // 64 % 64] + debian.DIGITS[number % 64]

    lines = [f"word{n}\t{digits(starts[n])}\t{digits(len(entries[n]))}" for n in range(20)] + ["00-about\tA\tB"]
    (place / "x.index").write_text("\n".join(lines))
    (place / "x.dict.dz").write_bytes(gzip.compress("".join(entries).encode()))
    found = list(debian.dictionary([tmp_path]))
    assert len(found) == 2  # the rest is shorter than a document
    assert found[0].startswith("word0\n")
    (tmp_path / "a.h").write_text("int a;")
    assert list(debian.headers([tmp_path])) == ["int a;"]
    words = tmp_path / "usr/share/wordnet"
    words.mkdir()
    line = "00001740 03 n 02 entity 0 being_there 0 003 ~ 00001930 n 0000 | that which is; 'it is'"
    (words / "data.noun").write_text("  1 licence\n" + "\n".join([line] * 200))
    assert next(debian.glosses([tmp_path])).startswith("entity, being there: that which is; 'it is'\n")


def test_a_corpus_of_a_name_that_is_taken_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="exists"):
        debian.write(tmp_path)
