"""A language model: text in and out, losses of windows, files."""

import json
import math
from pathlib import Path

import pytest
import torch

from cost.files import sums_of, write_bytes
from experts import language
from experts.data import DataError
from experts.language import corpus, tokens
from experts.language.model import SUMS, LanguageModel, sampled
from experts.language.transformer import ModelSettings, Transformer
from tests.experts.test_corpus import folder_of

TEXT = "Grüße, 😀 and some words " * 20


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> LanguageModel:
    found = corpus.read(folder_of(tmp_path_factory.mktemp("corpus"), {"one": 100, "two": 100}))
    tokenizer = tokens.train(found, 300)
    settings = ModelSettings(vocabulary=300, d_model=32, layers=2, heads=2, num_experts=4, d_ff=16, k=2, context=64)
    torch.manual_seed(0)
    network = Transformer(settings)
    ids = torch.tensor(tokenizer.encode("one 1: some words some words some words.").ids)[None]
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-2)
    for _ in range(60):
        loss = torch.nn.functional.cross_entropy(network(ids[:, :-1]).logits[0], ids[0, 1:])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return LanguageModel(network.eval().requires_grad_(False), tokenizer, {"corpus": found.sha256})


def test_any_text_is_encoded(model: LanguageModel) -> None:
    for text in (TEXT, "\x00\t\r\n", "日本", "def f(x):\n\treturn x", f"a{tokens.END}b"):
        assert model.decode(model.encode(text)) == text
    assert model.encode("") == []
    assert len(model.encode("some words")) < len("some words")


def test_bits_per_byte_are_those_of_the_whole_text(model: LanguageModel) -> None:
    short = "some words"
    ids = [0, *model.encode(short)]
    wanted = float(model.loss(ids).sum()) / math.log(2) / len(short.encode())
    assert model.bits_per_byte(short) == pytest.approx(wanted, rel=1e-6)
    long = model.encode(TEXT)
    assert len(long) > 3 * model.settings.context
    assert sum(len(each) for each in model._losses(long, None)) == len(long)
    assert model.bits_per_byte(TEXT, k=1) != model.bits_per_byte(TEXT)
    with pytest.raises(ValueError, match="empty text"):
        model.bits_per_byte("")
    with pytest.raises(ValueError, match="at least two"):
        model.loss([1])


def test_it_says_what_it_learned_alone_and_side_by_side(model: LanguageModel) -> None:
    alone = model.generate("one 1: some words some", 8, temperature=0)
    assert alone.startswith(" words some words.")
    several = model.generate(["one 1: some words some", "one"], 8, temperature=0)
    assert several[0] == alone
    written = [model.generate("one", 8, temperature=9.0, top_p=1.0, seed=seed) for seed in (3, 3, 4)]
    assert written[0] == written[1] != written[2]
    with pytest.raises(ValueError, match="from 1 to 63"):
        model.generate("one", 64)


def test_sampling_leaves_the_tail_out() -> None:
    logits = torch.log(torch.tensor([[0.6, 0.3, 0.1]])).repeat(400, 1)
    found = sampled(logits, 1.0, 0.8, torch.Generator().manual_seed(0))
    assert set(found.tolist()) == {0, 1}
    assert float((found == 0).float().mean()) == pytest.approx(2 / 3, abs=0.08)
    assert sampled(logits, 0, 0.8, None).tolist() == [0] * 400


def test_what_is_saved_is_loaded(model: LanguageModel, tmp_path: Path) -> None:
    again = language.load(model.save(tmp_path / "model"))
    assert again.metadata == model.metadata
    assert torch.equal(again.loss(model.encode(TEXT)[:60]), model.loss(model.encode(TEXT)[:60]))
    for kind, size in (("bfloat16", 0.5), ("int8", 0.31)):
        smaller = language.load(model.save(tmp_path / kind, kind))  # type: ignore[arg-type]
        assert smaller.bits_per_byte(TEXT) == pytest.approx(model.bits_per_byte(TEXT), rel=0.02)
        sizes = [(tmp_path / name / "model.safetensors").stat().st_size for name in (kind, "model")]
        assert sizes[0] / sizes[1] == pytest.approx(size, abs=0.05)
    with pytest.raises(ValueError, match="float32, bfloat16, int8"):
        model.save(tmp_path / "other", "int4")  # type: ignore[arg-type]
    assert "2 layers of 4 experts, 2 a token" in repr(again)


def test_damage_is_named(model: LanguageModel, tmp_path: Path) -> None:
    folder = model.save(tmp_path / "model")
    for name in ("metadata.json", "model.safetensors", "tokenizer.json", SUMS):
        raw = (folder / name).read_bytes()
        (folder / name).write_bytes(raw[:-5] + b"xxxxx")
        with pytest.raises(DataError, match=r"SHA|SHA256SUMS"):
            language.load(folder)
        (folder / name).write_bytes(raw)
    metadata = json.loads((folder / "metadata.json").read_text())
    metadata["settings"]["d_model"] *= 2**10
    raw = json.dumps(metadata).encode()
    write_bytes(folder / "metadata.json", raw)
    kept = {name: (folder / name).read_bytes() for name in ("model.safetensors", "tokenizer.json")}
    write_bytes(folder / SUMS, sums_of({"metadata.json": raw, **kept}))
    with pytest.raises(DataError, match="the settings are those of a larger model"):
        language.load(folder)
    with pytest.raises(DataError, match="no language model"):
        language.load(tmp_path / "nothing")
    with pytest.raises(DataError, match="no tokenizer"):
        tokens.load("{}")
    with pytest.raises(ValueError, match="at least 257"):
        tokens.train(corpus.Corpus({"train": {}}, {}), 100)


def test_what_can_be_no_folder_is_told() -> None:
    with pytest.raises(DataError, match="'a{80}' is no language model: File name too long"):
        language.load("a" * 5000)
