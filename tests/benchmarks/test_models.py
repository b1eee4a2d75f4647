"""Corruptions, measures and setups against numbers worked out by hand; then a whole matrix, as a person runs it."""

import json
from itertools import combinations, pairwise
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.experiments import models as experiment
from benchmarks.experiments.models import measures
from benchmarks.experiments.models.corruptions import KINDS, corrupt, digest
from benchmarks.experiments.models.setups import ModelSetup as Setup
from benchmarks.experiments.models.setups import make
from benchmarks.results import pareto
from benchmarks.runner import runner
from benchmarks.runner.matrix import Matrix
from benchmarks.runner.rows import read
from experts import data
from experts.compression.plan import Plan


def images(count: int = 50) -> np.ndarray:
    return data.load("digits")["test"][0][:count]


@pytest.mark.parametrize("kind", KINDS)
def test_corruptions_are_of_their_seed_and_grow_with_the_level(kind: str) -> None:
    clean = images()
    levels = [corrupt(clean, kind, level, 17) for level in range(1, 6)]
    hashes = [digest(each) for each in levels]
    assert hashes == [digest(corrupt(clean, kind, level, 17)) for level in range(1, 6)]
    assert len({*hashes, digest(clean)}) == 6
    away = [np.abs(each - clean).mean() for each in levels]
    assert all(first < second for first, second in pairwise(away))
    assert all(each.dtype == np.float32 and each.min() >= 0 and each.max() <= 1 for each in levels)
    drawn = kind not in ("blur", "brightness", "contrast")  # the others draw nothing
    assert (digest(corrupt(clean, kind, 3, 42)) != hashes[2]) == drawn


def test_corruptions_do_what_they_say() -> None:
    grey = np.full((2000, 81), 0.4, dtype=np.float32)
    assert corrupt(grey, "gaussian-noise", 5, 0).std() == pytest.approx(0.10, rel=0.02)
    assert corrupt(grey, "shot-noise", 5, 0).std() == pytest.approx((0.4 / 50) ** 0.5, rel=0.02)
    assert corrupt(grey, "brightness", 2, 0) == pytest.approx(0.5, abs=1 / 255)
    halves = np.tile(np.float32([0.2, 0.8]), (1, 8)).reshape(1, 16)
    assert corrupt(halves, "contrast", 2, 0) == pytest.approx((halves - 0.5) / 2 + 0.5, abs=1 / 255)
    spot = np.zeros((300, 15, 15), dtype=np.float32)
    spot[:, 7, 7] = 1
    moved = corrupt(spot.reshape(300, -1), "shift", 4, 0).reshape(-1, 15, 15)
    rows, columns = (moved.sum(axis) @ np.arange(15) / moved.sum((1, 2)) for axis in (2, 1))
    assert np.hypot(rows - 7, columns - 7) == pytest.approx(2.0, abs=0.05)
    assert abs((columns - 7).mean()) < 0.3
    bar = np.zeros((1, 15, 15), dtype=np.float32)
    bar[0, 7, 11] = 1
    turned = corrupt(bar.reshape(1, -1), "rotation", 5, 0).reshape(15, 15)
    row, column = turned.sum(1) @ np.arange(15) / turned.sum(), turned.sum(0) @ np.arange(15) / turned.sum()
    assert abs(np.rad2deg(np.arctan2(row - 7, column - 7))) == pytest.approx(20, abs=1)


@pytest.mark.parametrize(
    ("kind", "level", "width"), [("fog", 1, 64), ("blur", 0, 64), ("blur", 6, 64), ("blur", 1, 9 * 7)]
)
def test_there_are_no_other_corruptions(kind: str, level: int, width: int) -> None:
    with pytest.raises(ValueError, match="corruption|no square image"):
        corrupt(np.zeros((2, width), dtype=np.float32), kind, level, 0)


def test_quality_by_hand() -> None:
    logits = np.log(np.array([[0.7, 0.2, 0.1], [0.5, 0.3, 0.2]]))
    found = measures.quality(logits, np.array([0, 2]))
    assert (found["accuracy"], found["top5"]) == (0.5, 1.0)
    assert found["loss"] == pytest.approx(-(np.log(0.7) + np.log(0.2)) / 2)
    assert found["top2_gap"] == pytest.approx((0.5 + 0.2) / 2)
    entropies = [-sum(p * np.log(p) for p in row) for row in ((0.7, 0.2, 0.1), (0.5, 0.3, 0.2))]
    assert found["entropy"] == pytest.approx(np.mean(entropies))
    ranked = np.arange(10.0)[None].repeat(10, 0)
    assert measures.quality(ranked, np.arange(10))["top5"] == 0.5


def test_a_temperature_mends_what_is_too_sure() -> None:
    generator = np.random.default_rng(0)
    honest = generator.normal(size=(20_000, 4)) * 2
    chances = np.exp(honest) / np.exp(honest).sum(1, keepdims=True)
    labels = (chances.cumsum(1) > generator.random((20_000, 1))).argmax(1)
    divisor = measures.temperature(3 * honest[:10_000], labels[:10_000])
    assert divisor == pytest.approx(3, rel=0.05)
    found = measures.calibration(3 * honest[10_000:], labels[10_000:], divisor)
    assert found["ece"] > 0.1
    assert found["ece_calibrated"] < 0.02
    assert found["mce_calibrated"] < found["mce"]
    assert sum(found["reliability"]["counts"]) == 10_000


def test_costs_are_of_as_many_batches_for_all() -> None:
    met: list[torch.Size] = []

    def classify(x: torch.Tensor) -> torch.Tensor:
        met.append(x.shape)
        return x @ torch.ones(64, 10)

    found = measures.batch_costs(classify, torch.from_numpy(images(30)))
    assert met == [(256, 64)] * 44  # 2 to warm up, 40 timed, one for energy, one for memory
    assert 0 < found["batch_ms"] <= found["batch_p95_ms"]
    assert found["noisy"] == (found["batch_p95_ms"] > 2 * found["batch_ms"])
    assert found["memory_bytes"] == 4 * (64 * 10 + 256 * 10)
    assert found["energy_j"] > 0


def test_of_two_ways_the_cheaper_counts_for_each_cost(monkeypatch: pytest.MonkeyPatch) -> None:
    def dense(x: torch.Tensor) -> torch.Tensor:
        return x

    def sparse(x: torch.Tensor) -> torch.Tensor:
        return x

    found = {
        dense: {"batch_ms": 1.0, "batch_p95_ms": 4.0, "noisy": True, "energy_j": 3.0, "memory_bytes": 7},
        sparse: {"batch_ms": 2.0, "batch_p95_ms": 2.0, "noisy": False, "energy_j": 2.0, "memory_bytes": 9},
    }
    monkeypatch.setattr(measures, "batch_costs", lambda classify, inputs: found[classify])
    assert measures.least_costs({"dense": dense, "sparse": sparse}, torch.zeros(1)) == {
        **found[dense], "energy_j": 2.0, "memory_bytes": 7, "fastest": "dense", "thriftiest": "sparse",
    }  # fmt: skip


def test_what_does_not_concern_a_kind_is_as_if_it_were_not_said() -> None:
    assert Setup(kind="graph", level="int2", timesteps=9, cost_weight=0.4) == Setup(kind="graph")
    assert Setup(kind="rl-router", k=7, timesteps=9) == Setup(kind="rl-router", timesteps=9) != Setup(kind="rl-router")
    assert Setup(kind="compressed", level="int2") != Setup(kind="compressed")


def test_setups_are_what_they_say(tmp_path: Path) -> None:
    x, y = map(torch.from_numpy, data.load("digits")["test"])
    common = {"data": "digits", "timesteps": 2048}
    plain, one, small = (
        make(Setup(**common, **more), 17, tmp_path) for more in ({}, {"k": 1}, {"kind": "compressed", "level": "int2"})
    )
    models = sorted(path.name for path in (tmp_path / "models").glob("*.safetensors"))
    assert len(models) == 1  # trained once
    routed, driven, graph, adamw = (
        make(Setup(**common, kind=kind), 17, tmp_path) for kind in ("rl-router", "metaopt", "graph", "adamw")
    )
    again = make(Setup(**common, kind="rl-router"), 17, tmp_path)
    with torch.no_grad():
        assert (plain.classify(x).argmax(1) == y).float().mean() > 0.8
        assert not torch.equal(plain.classify(x), one.classify(x))
        assert routed.experts_per_input(x).tolist() == [1] * len(x)
        assert routed.parameters > plain.parameters + 64 * 32  # the projection of its features at least
        assert routed.bytes == 4 * routed.parameters
        assert torch.equal(again.classify(x), routed.classify(x))
        trained = [subject.classify(x) for subject in (plain, adamw, driven)]
        assert not any(torch.equal(one, other) for one, other in combinations(trained, 2))
        for subject in (plain, one, small, routed, driven, graph):
            first, second = (classify(x) for classify in subject.ways.values())
            torch.testing.assert_close(first, second)
    assert graph.parameters == plain.parameters + 8 * 8
    assert plain.bytes == 4 * plain.parameters
    assert small.bytes < 0.2 * plain.bytes
    with pytest.raises(ValueError, match="no level 'int3'; there are float32; int8"):
        make(Setup(**common, kind="compressed", level="int3"), 17, tmp_path)


def test_compressed_bytes_are_those_of_the_file(tmp_path: Path) -> None:
    from experts.checkpoints import load_model
    from experts.model import MoEClassifier

    made = make(Setup(data="digits", kind="compressed", level="int4", gate_level="int8"), 3, tmp_path)
    (path,) = (tmp_path / "models").glob("*.safetensors")
    model = load_model(path, MoEClassifier)
    plan = Plan.of(model, {name: 1 if name == "gate" else 3 for name in Plan.of(model).levels})
    assert made.bytes == plan.bytes == len(plan.compress(model)[0])


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("models")
    setups = {"top-2": {}, "top-1": {"k": 1}, "int2": {"kind": "compressed", "level": "int2"}}
    splits = ["test", "gaussian-noise-3", "shift-1", "shift-3"]
    wanted = Matrix(experiment="models", seeds=[17, 42], splits=splits, setups=setups, settings={"data": "digits"})
    assert runner.run(wanted, out, processes=2) == 24
    assert runner.rebuild(out)
    return out


def test_setups_of_a_seed_meet_the_same_images(report: Path) -> None:
    rows = read(report / "raw.jsonl")
    hashes = {(row.seed, row.split, row.metrics["sha256"]) for row in rows}
    assert len(hashes) == 8
    clean = [row for row in rows if row.split == "test"]
    assert {row.metrics["sha256"] for row in clean} == {digest(data.load("digits")["test"][0])}
    assert {row.metrics["stability"] for row in clean} == {1.0}


def test_the_report_says_what_the_rows_say(report: Path) -> None:
    rows = read(report / "raw.jsonl")
    result = json.loads((report / "results.json").read_text())
    by_name = {row["setup"]: row for row in result["rows"]}
    mine = {(row.seed, row.split): row.metrics for row in rows if row.setup == "top-2"}
    found = by_name["top-2"]
    clean = [mine[seed, "test"]["accuracy"] for seed in (17, 42)]
    assert found["accuracy"] == pytest.approx(np.mean(clean))
    other = [row.metrics["accuracy"] for row in rows if (row.setup, row.split) == ("int2", "test")]
    points = 100 * (np.array(other) - clean)
    assert by_name["int2"]["points"] == pytest.approx(points.mean())
    half = 12.706 * abs(points[0] - points[1]) / 2  # Student's t of one degree of freedom
    assert by_name["int2"]["points_ci95"] == pytest.approx([points.mean() - half, points.mean() + half], rel=1e-3)
    drops = {
        kind: 100 * np.mean([mine[seed, "test"]["accuracy"] - mine[seed, f"{kind}-3"]["accuracy"] for seed in (17, 42)])
        for kind in ("gaussian-noise", "shift")
    }
    assert found["drop"] == pytest.approx(np.mean(list(drops.values())))
    assert (found["worst_kind"], found["worst_drop"]) == ("shift", pytest.approx(drops["shift"]))
    corrupted = [np.mean([m["accuracy"] for (s, split), m in mine.items() if s == seed and split != "test"])
                 for seed in (17, 42)]  # fmt: skip
    shares = np.array(corrupted) / clean
    assert found["relative_robustness"] == pytest.approx(shares.mean())
    assert sum(row["rank"] for row in by_name.values()) == pytest.approx(1 + 2 + 3)
    text = (report / "report.md").read_text()
    assert f"| top-2 | {found['accuracy']:.2%} |" in text
    assert "24 of 24 runs" in text
    for picture in ("robustness.png", "reliability.png", "pareto.png"):
        assert f"]({picture})" in text
        assert (report / picture).read_bytes().startswith(b"\x89PNG")
    volumes = result["hypervolume_batch_ms"]
    least = min(row["batch_ms"] for row in by_name.values() if row["batch_ms"] * 1.05 >= found["batch_ms"])
    assert (50 - found["batch_ms"]) * found["accuracy"] <= volumes["top-2"] <= (50 - least) * found["accuracy"]
    assert volumes["all"] >= max(value for name, value in volumes.items() if name != "all")


def test_rows_of_one_seed_and_of_clean_images_alone_are_reported(report: Path) -> None:
    import pandas as pd

    rows = [row for row in read(report / "raw.jsonl") if (row.seed, row.split) == (17, "test")]
    frame = pd.DataFrame([{"setup": r.setup, "seed": r.seed, "split": r.split, **r.arguments, **r.metrics, **r.measured}
                          for r in rows])  # fmt: skip
    result = experiment.score(frame)
    assert "Corrupted" not in experiment.text(result)
    assert experiment.plot(frame, result, report / "alone" if (report / "alone").mkdir() is None else report) == [
        "reliability.png", "pareto.png",
    ]  # fmt: skip


def test_a_report_of_what_is_there_so_far(report: Path) -> None:
    import pandas as pd

    rows = [row for row in read(report / "raw.jsonl") if row.split == "test" or row.setup == "top-2"]
    frame = pd.DataFrame([{"setup": r.setup, "seed": r.seed, "split": r.split, **r.arguments, **r.metrics, **r.measured}
                          for r in rows])  # fmt: skip
    result = experiment.score(frame)
    assert [("rank" in row, "curves" in row) for row in result["rows"]] == [
        (True, True),
        (False, False),
        (False, False),
    ]
    assert "Corrupted" in experiment.text(result)
    experiment.plot(frame, result, report)
    nothing = frame[frame["split"] != "test"]
    assert "No run on clean images" in experiment.text(experiment.score(nothing))
    assert experiment.plot(nothing, experiment.score(nothing), report) == []


def test_costs_that_are_nearly_the_same_are_ties() -> None:
    costs = np.array([1.04, 3.0, 1.0, 1.08, 3.1])
    assert pareto.tied(costs, 0.05).tolist() == [1.0, 3.0, 1.0, 1.08, 3.0]


def test_recommendations_by_hand() -> None:
    points = np.array([[1.0, 0.5], [2.0, 0.85], [10.0, 0.9], [5.0, 0.4]])
    assert pareto.recommended(points) == {"quality": 2, "balanced": 1, "thrifty": 0}
    assert pareto.recommended(points[:1]) == {"quality": 0, "balanced": 0, "thrifty": 0}
