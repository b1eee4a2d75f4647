"""Plans: exact bytes on disk, bit-exact round trips, models that are restored, files that are refused."""

import copy
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from experts.compression import LEVELS
from experts.compression.pieces import importance, other_parameters, pieces
from experts.compression.plan import Plan, PlanError, load_compressed
from experts.model import ConvMoEClassifier, MoEClassifier


@pytest.fixture
def model() -> MoEClassifier:
    torch.manual_seed(0)
    return MoEClassifier(64, 10, widths=(16, 8, 24), trunk=32).eval()


def mixed(model: nn.Module) -> Plan:
    return Plan.of(model, [place % len(LEVELS) for place in range(len(pieces(model)))])


def test_the_matrices_of_a_model_are_its_weights(model: MoEClassifier) -> None:
    found = pieces(model)
    assert list(found) == ["trunk.0", "gate", *(f"experts.{e}.{part}" for e in range(3) for part in ("in", "out"))]
    assert found["experts.2.in"].shape == (24, 32)
    assert found["experts.1.out"].shape == (10, 8)
    assert (found["gate"].kind, found["experts.1.out"].expert) == ("gate", 1)
    total = sum(piece.shape[0] * piece.shape[1] for piece in found.values())
    others = sum(tensor.numel() for tensor in other_parameters(model).values())
    assert total + others == sum(parameter.numel() for parameter in model.parameters())
    alone = model.experts[1]
    np.testing.assert_array_equal(found["experts.1.in"].read(), alone[0].weight.detach().numpy())
    np.testing.assert_array_equal(found["experts.1.out"].read(), alone[2].weight.detach().numpy())


def test_level_nought_is_the_model_itself(model: MoEClassifier) -> None:
    x = torch.randn(7, 64)
    restored = Plan.of(model).apply(model)
    assert restored is not model
    torch.testing.assert_close(restored(x), model(x), rtol=0, atol=0)


def test_bytes_are_those_on_disk_and_weights_come_back(model: MoEClassifier, tmp_path: Path) -> None:
    before = copy.deepcopy(model.state_dict())
    for number, plan in enumerate([mixed(model), *(Plan.of(model, level) for level in range(len(LEVELS)))]):
        raw, restored = plan.compress(model)
        path = tmp_path / f"{number}.safetensors"
        path.write_bytes(raw)
        assert plan.bytes == path.stat().st_size
        loaded = load_compressed(path, MoEClassifier(64, 10, widths=(16, 8, 24), trunk=32))
        for name, tensor in restored.state_dict().items():
            assert torch.equal(tensor, loaded.state_dict()[name])
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_a_plan_is_saved_and_loaded(model: MoEClassifier, tmp_path: Path) -> None:
    plan = mixed(model)
    plan.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json") == plan
    named = Plan.of(model, {"gate": 1, "experts.0.in": 7})
    assert [named.levels[name] for name in ("gate", "experts.0.in", "trunk.0")] == [1, 7, 0]


def test_importance_is_the_mean_square_of_the_inputs(model: MoEClassifier) -> None:
    x = torch.randn(50, 64)
    found = importance(model, x)
    np.testing.assert_allclose(found["trunk.0"], x.square().mean(0), rtol=1e-5)
    h = model.trunk(x)
    np.testing.assert_allclose(found["gate"], h.square().mean(0).detach(), rtol=1e-5)
    hidden = model.experts[2][0](h).relu().square().mean(0).detach()
    np.testing.assert_allclose(found["experts.2.out"], hidden, rtol=1e-4)
    conv = nn.Sequential(nn.Conv2d(2, 3, 3, padding=1), nn.Flatten(), nn.Linear(48, 4))
    images = torch.randn(6, 2, 4, 4)
    patches = nn.functional.unfold(images, 3, padding=1).square().mean((0, 2))
    np.testing.assert_allclose(importance(conv, images)["0"], patches, rtol=1e-5)
    assert pieces(conv)["0"].shape == (3, 18)


def test_what_is_no_plan_of_the_model_is_refused(model: MoEClassifier, tmp_path: Path) -> None:
    other = MoEClassifier(64, 10, widths=(16, 8), trunk=32)
    with pytest.raises(PlanError, match=r"another model: they differ in experts\.2\.in"):
        Plan.of(other).apply(model)
    for levels, message in (({"nothing": 1}, "has no nothing"), ([1, 2], "2 levels for the 8"), (99, "from 0 to 13")):
        with pytest.raises(PlanError, match=message):
            Plan.of(model, levels)  # type: ignore[arg-type]
    path = tmp_path / "plan.json"
    for raw, message in (
        (b"{", "not a plan"),
        (b"[]", "not a plan"),
        (b'{"others": 1, "matrices": [{}]}', "not a plan"),
    ):
        path.write_bytes(raw)
        with pytest.raises(PlanError, match=message):
            Plan.load(path)
    Plan.of(model, 3).save(path)
    whole = path.read_text()
    for old, new in (
        ('"level": 3', '"level": 3.7'), ('"level": 3', '"level": "3"'), ('"level": 3', '"level": 99'),
        ('"level": 3', '"level": -1'), ('"format": 1', '"format": 99'), ('"others": ', '"others": -'),
        ('"others": ', '"others": 1e400, "more": '), (whole, "[" * 100_000),
    ):  # fmt: skip
        path.write_text(whole.replace(old, new))
        with pytest.raises(PlanError, match="not a plan|damaged|not JSON"):
            Plan.load(path)
    content = json.loads(whole)
    content.pop("sha256")
    path.write_text(json.dumps(content | {"others": content["others"] + 1}))  # by hand: without a seal
    with pytest.raises(PlanError, match="parameters outside the matrices"):
        Plan.load(path).apply(model)
    path.write_text(json.dumps(content).replace("int4", "int3"))
    with pytest.raises(PlanError, match="another table"):
        Plan.load(path)
    with pytest.raises(PlanError, match="cannot be read"):
        Plan.load(tmp_path / "absent.json")


def test_a_damaged_file_is_refused_and_stays(model: MoEClassifier, tmp_path: Path) -> None:
    raw, _ = mixed(model).compress(model)
    path, generator = tmp_path / "model", np.random.default_rng(0)
    broken = [raw[:cut] for cut in (0, 5, 100, len(raw) - 1)] + [raw + b"x"]
    for place in generator.integers(8, len(raw), 60).tolist():
        broken.append(raw[:place] + bytes([raw[place] ^ 4]) + raw[place + 1 :])
    for content in broken:
        path.write_bytes(content)
        with pytest.raises(PlanError):
            load_compressed(path, copy.deepcopy(model))
        assert path.read_bytes() == content
    path.write_bytes(raw)
    with pytest.raises(PlanError):
        load_compressed(path, MoEClassifier(64, 10, widths=(16, 8), trunk=32))


@pytest.mark.parametrize("wrong", [float("nan"), float("inf")])
@pytest.mark.parametrize("level", [1, 3, 6, 9])
def test_what_is_not_finite_is_refused(model: MoEClassifier, wrong: float, level: int) -> None:
    known = importance(model, torch.randn(20, 64))
    with torch.no_grad():
        model.gate.weight[0, 0] = wrong
    with pytest.raises(PlanError, match="gate: weights and their importance must be finite"):
        Plan.of(model, level).compress(model)
    model.gate.weight.data.zero_()
    known["experts.1.in"][3] = wrong
    with pytest.raises(PlanError, match=r"experts\.1\.in: weights and"):
        Plan.of(model, level).compress(model, known)


def test_any_bit_of_the_header_matters(model: MoEClassifier, tmp_path: Path) -> None:
    raw, restored = mixed(model).compress(model)
    assert mixed(model).compress(model)[0] == raw
    path, refused = tmp_path / "model", 0
    bits = 8 * (8 + int.from_bytes(raw[:8], "little"))
    for bit in range(bits):
        content = bytearray(raw)
        content[bit // 8] ^= 1 << bit % 8
        path.write_bytes(content)
        try:
            loaded = load_compressed(path, copy.deepcopy(model))
        except PlanError:
            refused += 1
            continue
        for name, tensor in restored.state_dict().items():
            assert torch.equal(tensor, loaded.state_dict()[name])
    assert refused > 0.99 * bits


def test_bytes_are_exact_whatever_the_number_of_their_digits() -> None:
    torch.manual_seed(0)
    large = ConvMoEClassifier(784, 10).eval()
    overheads = set()
    for level in (0, 1, 13):
        plan = Plan.of(large, level)
        overheads.add(plan.overhead)
        assert len(plan.compress(large)[0]) == plan.bytes
    assert len(overheads) == 1
