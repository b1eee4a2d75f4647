"""Training of a language model: the same bits after an interruption, random numbers of experts, damaged runs."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cost.files import load_json
from experts import language
from experts.data import DataError
from experts.language import pretraining, reference
from experts.language.evaluation import evaluate
from experts.language.pretraining import PretrainingSettings, Windows, rate_at
from experts.language.transformer import ModelSettings
from moe_envs.layertopk import MoELayerTopKVectorEnv
from tests.experts.test_corpus import folder_of

SIZE = ModelSettings(vocabulary=300, d_model=32, layers=2, heads=2, num_experts=4, d_ff=16, k=2, context=32)
SETTINGS = PretrainingSettings(steps=12, batch_size=8, parts=2, threads=2, precision="float32")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return folder_of(tmp_path_factory.mktemp("corpus"), {"one": 200, "two": 200})


def run(data: Path, folder: Path, settings: PretrainingSettings = SETTINGS, **options: Any) -> language.LanguageModel:
    return pretraining.train(data, folder, SIZE, settings, save_every=2, validate_every=4, **options)


class Stop(Exception):
    pass


def test_interrupted_at_three_places_the_bits_are_the_same(data: Path, tmp_path: Path) -> None:
    whole = run(data, tmp_path / "whole")

    def stopping(at: float) -> pretraining.Report:
        def report(share: float, line: str) -> None:
            if share >= at:
                raise Stop

        return report

    with pytest.raises(Stop):
        run(data, tmp_path / "cut", report=stopping(3 / 12))
    for place in (5 / 12, 10 / 12):
        with pytest.raises(Stop):
            pretraining.resume(tmp_path / "cut", stopping(place))
    again = pretraining.resume(tmp_path / "cut")
    assert all(torch.equal(a, b) for a, b in zip(whole.network.parameters(), again.network.parameters(), strict=True))
    curves = [[{**row, "seconds": 0} for row in each.metadata["curve"]] for each in (whole, again)]
    assert curves[0] == curves[1]
    assert [row["step"] for row in curves[0]] == [4, 8, 12]
    loaded = language.load(tmp_path / "cut" / pretraining.MODEL)
    assert loaded.bits_per_byte("one 1: some words") == again.bits_per_byte("one 1: some words")
    lines = (tmp_path / "cut" / pretraining.CURVE).read_text().splitlines()
    assert lines[0] == "step,seconds,train,validation,validation k=1,one,two"
    assert len(lines) == 4


def test_a_killed_training_goes_on(data: Path, tmp_path: Path) -> None:
    program = (
        "import sys; from pathlib import Path; from tests.experts.test_pretraining import run, SETTINGS\n"
        "from dataclasses import replace\n"
        "run(Path(sys.argv[1]), Path(sys.argv[2]), replace(SETTINGS, steps=400))"
    )
    process = subprocess.Popen([sys.executable, "-c", program, str(data), str(tmp_path / "run")])
    checkpoint = tmp_path / "run" / pretraining.CHECKPOINT
    for _ in range(6000):
        if checkpoint.exists() or process.poll() is not None:
            break
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert checkpoint.exists()
    found = pretraining.resume(tmp_path / "run")
    assert found.metadata["curve"][-1]["step"] == 400
    assert found.metadata["curve"][-1]["validation"] < 2.0


def test_fewer_experts_are_trained_by_a_share_of_the_windows(data: Path, tmp_path: Path) -> None:
    trained = {}
    for share in (0.0, 0.5):
        settings = PretrainingSettings(steps=150, batch_size=8, random_share=share, load_balancing=0.02)
        rows = evaluate(run(data, tmp_path / str(share), settings), data, k=0)
        trained[share] = rows[-1]["model"]
        assert [row["domain"] for row in rows] == ["one", "two", "mean"]
        assert rows[-1]["xz"] > 0
    assert trained[0.5] < trained[0.0]


def test_threads_do_not_change_the_bits(data: Path, tmp_path: Path) -> None:
    one, two = (run(data, tmp_path / str(n), replace(SETTINGS, threads=n, steps=4)) for n in (1, 2))
    assert one.sha256 == two.sha256


def test_an_interrupted_rebuild_goes_on_and_a_finished_one_begins_anew(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MOE_ENVS_CACHE", str(tmp_path / "cache"))
    settings = replace(SETTINGS, steps=3)
    sizes: dict[str, Any] = {"data": data, "model": SIZE, "settings": settings}

    def stop(share: float, line: str) -> None:
        raise Stop

    with pytest.raises(Stop):
        reference.build(tmp_path / "model", **sizes, report=stop)
    with pytest.raises(ValueError, match="run with other settings or of another corpus"):
        reference.build(tmp_path / "model", data, SIZE, SETTINGS)
    shares: list[float] = []
    built = reference.build(tmp_path / "model", **sizes, report=lambda share, line: shares.append(share))
    assert shares[-1] == 1
    assert language.load(tmp_path / "model").sha256 == built.sha256
    assert {each.name for each in (tmp_path / "model").iterdir()} == {
        each.name for each in language.find("language").iterdir()
    }
    env = MoELayerTopKVectorEnv(2, model=str(tmp_path / "model"), tokens=8)
    assert env.stepped.layers == SIZE.layers
    assert not list((tmp_path / "cache").rglob(pretraining.RUN))


def test_a_window_is_seen_once_an_epoch() -> None:
    windows = Windows(np.arange(1000, dtype=np.uint16), 16, seed=3)
    seen = torch.cat([windows.batch(number, 1) for number in range(windows.count)])
    starts = seen[:, 0].tolist()
    assert len(set(starts)) == len(starts)
    assert torch.equal(seen[:, 1:], seen[:, :-1] + 1)
    assert set(np.diff(sorted(starts))) == {16}
    assert torch.equal(windows.batch(3, 4), torch.cat([windows.batch(6, 2), windows.batch(7, 2)]))
    with pytest.raises(DataError, match="at least 33"):
        Windows(np.arange(20, dtype=np.uint16), 16, seed=0)


def test_the_rate_rises_and_falls() -> None:
    settings = PretrainingSettings(steps=100, warmup=0.1)
    assert rate_at(0, settings) == pytest.approx(0.1)
    assert rate_at(10, settings) == pytest.approx(0.9)
    assert rate_at(99, settings) == pytest.approx(0.01)


def test_a_run_that_is_there_is_not_overwritten_and_damage_is_named(data: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    run(data, folder)
    with pytest.raises(ValueError, match="holds a run"):
        run(data, folder)
    for name in (pretraining.RUN, pretraining.CHECKPOINT, "tokenizer.json"):
        raw = (folder / name).read_bytes()
        (folder / name).write_bytes(raw[:-9] + b"xxxxxxxxx")
        with pytest.raises(DataError, match="damaged|JSON"):
            pretraining.resume(folder)
        (folder / name).write_bytes(raw)
    about = load_json(folder / pretraining.RUN, DataError, "")
    assert about["corpus"] == json.loads((folder / "model" / "metadata.json").read_text())["corpus"]
    with pytest.raises(DataError, match="cannot be read"):
        pretraining.resume(tmp_path / "nothing")


def test_a_training_that_cannot_begin_leaves_no_run(data: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="device"):
        run(data, tmp_path / "run", replace(SETTINGS, device="gpu"))
    few = folder_of(tmp_path / "few", {"one": 100})
    with pytest.raises(DataError, match="tokens to train on"):
        pretraining.train(few, tmp_path / "run", replace(SIZE, context=2**12), SETTINGS)
    run(data, tmp_path / "run", replace(SETTINGS, steps=1))
    with pytest.raises(DataError, match="'train' is a column of"):
        run(folder_of(tmp_path / "named", {"train": 100}), tmp_path / "other")


def test_a_report_that_fails_is_no_damaged_run(data: Path, tmp_path: Path) -> None:
    def fail(share: float, line: str) -> None:
        raise TypeError("of the caller")

    for call in (lambda: run(data, tmp_path, report=fail), lambda: pretraining.resume(tmp_path, fail)):
        with pytest.raises(TypeError, match="of the caller"):
            call()


def test_a_corpus_that_changed_is_refused(tmp_path: Path) -> None:
    data = folder_of(tmp_path / "corpus", {"one": 200})
    run(data, tmp_path / "run")
    (data / "one" / "more.txt").write_text("another document " * 30)
    with pytest.raises(DataError, match="has changed"):
        pretraining.resume(tmp_path / "run")


def test_a_loss_that_is_not_finite_stops_the_run(data: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="lower learning_rate"):
        run(data, tmp_path, PretrainingSettings(steps=30, batch_size=4, learning_rate=1e30, warmup=0, clip=1e30))
