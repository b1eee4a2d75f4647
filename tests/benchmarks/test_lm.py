"""The command moe-lm, from a corpus to text."""

import json
import re
import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner

from agents import runs
from benchmarks.cli.lm import app
from experts import language
from experts.language import debian
from tests.experts.test_corpus import folder_of

runner = CliRunner()
SIZES = [word for size in ("vocabulary=300", "d_model=16", "layers=2", "heads=2", "num_experts=3", "d_ff=8", "k=2",
         "context=32") for word in ("-m", size)]  # fmt: skip
SETTINGS = [word for each in ("steps=20", "batch_size=2", "threads=1") for word in ("-s", each)]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A corpus and a run."""
    place = tmp_path_factory.mktemp("lm")
    data = folder_of(place / "corpus", {"one": 100, "two": 100})
    done = runner.invoke(app, ["train", "--data", str(data), "--out", str(place / "run"), *SIZES, *SETTINGS,
                               "--json", str(place / "result.json")])  # fmt: skip
    assert done.exit_code == 0, done.output
    result = json.loads((place / "result.json").read_text())
    assert result["step"] == 20
    assert result["model"]["num_experts"] == 3
    assert "nats a token" in done.output
    return data, place / "run"


def test_a_run_is_evaluated_by_domain_beside_compressors(made: tuple[Path, Path], tmp_path: Path) -> None:
    data, run = made
    done = runner.invoke(app, ["eval", str(run), "--data", str(data), "--most", "2000", "--json", str(tmp_path / "e")])
    assert done.exit_code == 0, done.output
    rows = json.loads((tmp_path / "e").read_text())
    assert [row["domain"] for row in rows] == ["one", "two", "mean"]
    for number, other in (("0", "1"), ("1,2", "2,0")):
        results = []
        for k in (number, other):
            done = runner.invoke(app, ["eval", str(run), "--data", str(data), "--k", k, "--json", "-"])
            results.append(json.loads(done.stdout)[-1]["model"])
        assert results[0] != results[1]


def test_a_run_writes_text(made: tuple[Path, Path]) -> None:
    done = runner.invoke(app, ["generate", str(made[1]), "one 1:", "--tokens", "5", "--temperature", "0"])
    model = language.load(made[1] / "model")
    written = "one 1:" + model.generate("one 1:", 5, temperature=0) + "\n"
    assert done.output == written
    less = ["--memory", "20kB", "--policy", "lfu", "--prefetch"]
    done = runner.invoke(app, ["generate", str(made[1]), "one 1:", "--tokens", "5", "--temperature", "0", *less])
    assert done.stdout == written
    assert re.search(r"\d experts of [\d,]+ bytes fit; [\d.]+% of [\d,]+ requests were in memory or", done.stderr)


def test_a_trained_policy_decides_what_is_loaded(tmp_path: Path) -> None:
    settings = {"n_envs": 2, "n_steps": 4, "batch_size": 8, "total_timesteps": 8}
    for env, kwargs in (
        ("MoEExpertCache-v0", {"tokens": 2, "passages": 1, "fallback": "skip"}),
        ("MoELayerTopK-v0", {"tokens": 2}),
    ):
        runs.train(f"moe_envs:{env}", "ppo", 0, tmp_path / env, kwargs, settings)
    words = ["generate", "language", "In the", "--tokens", "4", "--weights", "int4", "--memory"]
    done = runner.invoke(app, [*words, "2MB", "--policy", f"policy:{tmp_path / 'MoEExpertCache-v0'}"])
    assert done.exit_code == 0, done.output
    assert "requests were in memory or coming" in done.stderr
    done = runner.invoke(app, [*words, "2MB", "--policy", f"policy:{tmp_path / 'MoEExpertCache-v0'}", "--k", "2"])
    assert "takes neither --k nor --prefetch" in str(done.exception)
    lru, static = (runner.invoke(app, [*words, "2MB", "--policy", each]) for each in ("lru", "static"))
    assert static.exit_code == 0, static.output
    assert static.stdout == lru.stdout
    for memory, env, message in (("2MB", "MoELayerTopK-v0", "is a run of moe_envs:MoELayerTopK-v0, not of"),
                                 ("200kB", "MoEExpertCache-v0", "not even one expert of each layer")):  # fmt: skip
        done = runner.invoke(app, [*words, memory, "--policy", f"policy:{tmp_path / env}"])
        assert message in str(done.exception)


def test_a_finished_run_resumes_to_the_same(made: tuple[Path, Path], tmp_path: Path) -> None:
    shutil.copytree(made[1], tmp_path / "run")
    done = runner.invoke(app, ["train", "--resume", str(tmp_path / "run")])
    assert done.exit_code == 0, done.output
    assert language.load(tmp_path / "run" / "model").sha256 == language.load(made[1] / "model").sha256


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["train"], "give --data and --out"),
        (["train", "--resume", "x", "-s", "steps=3"], "keeps its settings"),
        (["generate", "language", "--k", "a"], "one for each layer as"),
        (["generate", "language", "--weights", "int8"], "--weights needs --memory"),
        (["generate", "language", "--memory", "2QB"], "must be a number of bytes"),
        (["generate", "language", "--memory", "2MB", "--policy", "x"], "is not one of lru"),
        (["generate", "language", "--memory", "2MB", "--weights", "x"], "is not one of float32"),
        (["generate", "language", "--memory", "2kB"], "not even one expert"),
        (["eval", "language", "--data", "nothing"], "has no folder of text files"),
    ],
)
def test_wrong_words_are_told(words: list[str], message: str) -> None:
    done = runner.invoke(app, words)
    assert done.exit_code == 1
    assert message in str(done.exception)


def test_a_corpus_is_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the one domain that needs no package."""
    monkeypatch.setattr(debian, "DOMAINS", {"python": debian.DOMAINS["python"]})
    done = runner.invoke(app, ["corpus", "--out", str(tmp_path / "corpus"), "--limit", "20000"])
    assert done.exit_code == 0, done.output
    about = json.loads((tmp_path / "corpus" / "about.json").read_text())
    assert about["packages"]["python"]["licence"] == "PSF-2.0"
    assert len(list((tmp_path / "corpus" / "python").iterdir())) > 1
