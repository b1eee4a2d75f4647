"""Scores of the experiments on continual learning, worked out by hand."""

import numpy as np
import pandas as pd
import pytest

from benchmarks.experiments import continual_headroom
from benchmarks.experiments.continual import methods
from benchmarks.runner.experiments import find
from experts.continual import NetworkShape, Replay
from experts.continual.buffer import Buffer
from experts.continual.inputs import Encoding
from experts.continual.network import ContinualNetwork


def test_differences_are_of_the_same_seed_and_buffer() -> None:
    def row(method: str, seed: int, accuracy: float, scenario: str | None = None) -> dict[str, object]:
        return {"stream": "split-digits", "scenario": scenario, "buffer": 200, "method": method, "seed": seed,
                "accuracy": accuracy, "forgetting": 0.1, "experts": 4, "bytes": 2000.0, "seconds": 1.0}  # fmt: skip

    rows = [row("ER", 0, 0.5), row("ER", 1, 0.7), row("DER++", 1, 0.8), row("DER++", 0, 0.8), row("ER", 0, 0.9, "task")]
    tables = find("continual").score(pd.DataFrame(rows))["tables"]
    assert list(tables) == ["split-digits, 200 raw images", "split-digits by task, 200 raw images"]
    plain, other = tables["split-digits, 200 raw images"]
    assert (plain["over ER"], plain["accuracy"], plain["kB"]) == (0, pytest.approx(0.6), 2)
    assert other["over ER"] == pytest.approx(0.2)
    assert other["over ER, 95 %"] == pytest.approx([0.2 - 1.2706, 0.2 + 1.2706], abs=1e-3)  # 12.706 * 0.1
    plain_rows = pd.DataFrame(rows[:4]).drop(columns="scenario")
    assert list(find("continual").score(plain_rows)["tables"]) == ["split-digits, 200 raw images"]


def test_headroom_is_chosen_by_other_seeds_and_judged_by_another_run() -> None:
    groups = {"constants": 2, "schedules": 1, "late": 1, "detector": 1, "rule": 1}
    frame = pd.DataFrame({
        "setup": "recurring", "seed": [0, 1], "groups": [groups, groups],
        "chosen by": [[[0.5, 0.6, 0.7, 0.1, 0.9, 0.8]], [[0.6, 0.5, 0.4, 0.1, 0.9, 0.8]]],
        "judged by": [[[0.50, 0.55, 0.65, 0.1, 0.80, 0.74]], [[0.58, 0.48, 0.38, 0.1, 0.84, 0.76]]],
    })  # fmt: skip
    (row,) = find("continual-headroom").score(frame)["tables"]["Accuracy"]
    # Seed 0 takes what was best for seed 1, the first constant; seed 1 the second one, or the schedule.
    assert row["best constant"] == pytest.approx((0.50 + 0.48) / 2)
    assert row["best schedule"] == pytest.approx((0.50 + 0.38) / 2)
    assert row["best of each context"] == pytest.approx((0.65 + 0.58) / 2)
    assert row["headroom"] == pytest.approx((0.15 + 0.20) / 2)
    assert row["headroom, 95 %"] == pytest.approx([0.175 - 0.3177, 0.175 + 0.3177], abs=1e-3)  # 12.706 * 0.025
    assert row["headroom, at most"] == pytest.approx((0.7 + 0.6) / 2 - (0.5 + 0.4) / 2)
    assert (row["best rule"], row["detector"]) == (pytest.approx(0.75), pytest.approx(0.82))
    assert row["detector - rule"] == pytest.approx(0.07)
    assert row["worth it"] == "not known"


@pytest.mark.parametrize("kind", ["known length", "recurring"])
def test_schedules_leave_tasks_out_only_where_segments_come_again(kind: str) -> None:
    setup = continual_headroom.HeadroomSetup(kind=kind, most=8)  # type: ignore[arg-type]
    groups = continual_headroom.candidates_of(setup, continual_headroom.stream_of(setup, 0))
    every = [choice for schedule in groups["schedules"] for choice in schedule]
    assert any(not choice.keep for choice in every) == (kind == "recurring")
    assert not any(choice.late or choice.confident for choice in every)


def test_bytes_of_methods_are_those_of_what_they_keep() -> None:
    buffer = Buffer(Replay("fifo", 3), 10)
    images = np.zeros((3, 1, 28, 28), np.uint8)
    buffer.add(Encoding((1, 28, 28)).encode(images), np.zeros(3, int), 0, np.random.default_rng(0))
    assert buffer.nbytes == 3 * methods.ROW
    small = Encoding((1, 28, 28), methods.SMALL_SIDE, methods.SMALL_BITS)
    network, grown = (ContinualNetwork(small.decoded, 10, NetworkShape(), count) for count in (4, 8))
    bytes_of = [4 * sum(weights.numel() for weights in each.parameters()) for each in (network, grown)]
    assert bytes_of[1] == pytest.approx(methods.SMALL_NETWORK, rel=0.01)
    assert (bytes_of[1] - bytes_of[0]) / 4 == pytest.approx(methods.PER_TASK * methods.ROW, rel=0.02)
    assert len(small.encode(images)[0]) + 4 == methods.SMALL_ROW
