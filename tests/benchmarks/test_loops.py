"""Real torch loops: every peer drives one, changes in mid-run happen, failures are told."""

from typing import Any

import pandas as pd
import pytest
import torch

from benchmarks import loops
from benchmarks.experiments import autorate
from benchmarks.loops import CHANGING, HELD_OUT, LOOPS, WORST, Loop, run
from experts.data import DataError

SMALL = Loop("mlp", "digits", "adamw", 1.0, 60, 32)


@pytest.mark.parametrize("peer", [*autorate.PEERS, "rule, no range test"])
@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_every_peer_learns(peer: str, optimizer: str) -> None:
    if optimizer == "sgd" and peer.startswith(("D-Adaptation", "Prodigy")):
        return
    loop = SMALL._replace(optimizer=optimizer)
    setup = autorate.AutoRateSetup(loop="", peer=peer)
    found = run(loop, autorate.drive_of(setup, loop, 0.01 if peer == autorate.TUNED else None), 0)
    assert not found["failed"]
    assert found["test"] < 2.25
    assert found["seconds"] > found["in_driver"]


@pytest.mark.parametrize("rate", [1e9, 0.0])
def test_what_does_not_learn_has_failed(rate: float) -> None:
    found = run(SMALL._replace(optimizer="sgd"), autorate.by_cosine(rate), 0)
    assert found["failed"]
    assert found["test"] <= WORST


@pytest.mark.needs_data
@pytest.mark.parametrize("name", [*LOOPS, *HELD_OUT, *CHANGING])
def test_every_loop_runs(name: str) -> None:
    loop = (LOOPS | HELD_OUT | CHANGING)[name]
    if loop.data in loops.PACKAGED:
        try:
            loops.parts(loop.data, loop.scale)
        except DataError as error:  # no network, or the package that generates it is not installed
            pytest.skip(str(error))
    found = run(loop._replace(steps=8), autorate.by_cosine(1e-3), 0)
    assert 0 < found["test"] < WORST


def test_text_is_of_whole_files_and_predicted() -> None:
    found = loops.parts("text", 1.0)
    assert [each[0].shape[1] for each in found] == [loops.CONTEXT] * 3
    assert torch.equal(found.train[0][0, 1:], found.train[1][0, :-1])
    loop = LOOPS["transformer, text, AdamW"]._replace(steps=20, batch_size=4)
    assert run(loop, autorate.by_cosine(3e-3), 0)["test"] < 5


def test_classes_come_and_batches_grow_in_mid_run() -> None:
    labels = torch.arange(1000) % 10
    shifted = list(loops._batches(SMALL._replace(shift=True), labels, 0))
    assert all(bool((labels[rows] < 5).all()) for rows in shifted[:30])
    assert {int(label) for rows in shifted[30:] for label in labels[rows]} == {*range(10)}
    grown = [len(rows) for rows in loops._batches(SMALL._replace(growing=True), labels, 0)]
    assert grown == [32] * 30 + [128] * 30


def test_the_excess_by_hand() -> None:
    def row(loop: str, peer: str, seed: int, test: float, **more: Any) -> dict[str, Any]:
        shared = {"start": "own", "failed": False, "seconds": 10.0, "in_driver": 1.0, "in_validation": 0.5}
        return {"loop": loop, "peer": peer, "seed": seed, "test": test, **shared, **more}

    first, second = list(LOOPS)[:2]
    rows = [row(loop, autorate.TUNED, seed, 1.0) for loop in (first, second) for seed in (0, 1)]
    rows += [row(first, "AutoRate", seed, 1.1) for seed in (0, 1)] + [
        row(second, "AutoRate", seed, 0.9 + seed / 5) for seed in (0, 1)
    ]
    rows += [row(first, "cosine", seed, 1.0 + seed, start="random") for seed in (0, 1)]
    tables = autorate.score(pd.DataFrame(rows))["tables"]
    by_peer = {each["peer"]: each for each in tables["Excess test loss over the tuned cosine"]}
    assert by_peer["AutoRate"]["mean"] == pytest.approx(0.05)
    assert by_peer["AutoRate"]["worst loop"] == pytest.approx(0.1)
    assert by_peer[autorate.TUNED]["AutoRate's minus this"] == pytest.approx(0.05)
    assert tables["From random rates, 1e-5 .. 1"][0]["median"] == pytest.approx(0.5)
    assert tables["What AutoRate adds to the CPU time of a training, validation apart"][0]["median"] == pytest.approx(
        0.5 / 9
    )
