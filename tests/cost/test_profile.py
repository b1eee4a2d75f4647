"""Profiles: affine fits, real measurements, files that are whole or refused."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from cost import profile as profiles
from cost.machine import fingerprint
from cost.model import Cost, CostModel, RelativeCost
from cost.profile import SIZES, Profile, ProfileError, fit, measure_experts


class Model:
    def __init__(self) -> None:
        self.trunk = nn.Identity()
        self.experts = [nn.Linear(32, 10), nn.Sequential(nn.Linear(32, 512), nn.ReLU(), nn.Linear(512, 10))]


@pytest.fixture(scope="module")
def measured() -> Profile:
    return measure_experts(Model(), np.ones((64, 32), dtype=np.float32), repeats=60)


@given(st.floats(1e-6, 1e-3), st.floats(1e-9, 1e-5))
@settings(deadline=None)
def test_fit_finds_an_affine_law(fixed: float, slope: float) -> None:
    found = fit(SIZES, fixed + slope * np.array(SIZES))
    assert found.fixed == pytest.approx(fixed, rel=1e-6)
    assert found.slope == pytest.approx(slope, rel=1e-3, abs=fixed * 1e-9)
    assert found.residual < 1e-6


def test_fit_never_goes_below_zero() -> None:
    assert fit((1, 2, 4), np.array([4.0, 3.0, 2.0])).slope == 0
    assert fit((1, 2, 4), np.array([0.5, 2.0, 6.0])).fixed == 0


def test_a_measured_profile_is_plausible(measured: Profile) -> None:
    small, large = measured.operations.values()
    assert 0 < small.time.fixed < 1e-3
    assert large.time.slope > small.time.slope
    assert small.memory.fixed == pytest.approx((32 * 10 + 10) * 4)
    assert small.memory.slope == pytest.approx(10 * 4)
    flops = 2 * 32 * 10
    assert small.energy.slope > profiles.JOULES_PER_FLOP * flops
    assert large.energy.fixed == pytest.approx(profiles.JOULES_PER_WEIGHT_BYTE * large.memory.fixed)
    assert measured.energy_source.startswith("proxy")
    assert measured.fingerprint == fingerprint()


def test_measuring_leaves_threads_alone_and_needs_repeats() -> None:
    torch.set_num_threads(2)
    try:
        measure_experts(Model(), np.ones((64, 32), dtype=np.float32), repeats=50)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(1)
    with pytest.raises(ValueError, match=">= 50"):
        measure_experts(Model(), np.ones((64, 32), dtype=np.float32), repeats=49)


def test_saved_and_loaded_it_is_the_same(measured: Profile, tmp_path: Path) -> None:
    measured.save(tmp_path / "p.json")
    assert profiles.load(tmp_path / "p.json") == measured
    assert [path.name for path in tmp_path.iterdir()] == ["p.json"]
    profiles.require_this_machine(measured, "p.json")


def test_damage_is_found(measured: Profile, tmp_path: Path) -> None:
    path = tmp_path / "p.json"
    measured.save(path)
    text = path.read_text()
    for damaged in (text.replace('"repeats": 60', '"repeats": 61'), text[:-5], "[]", "{}"):
        path.write_text(damaged)
        with pytest.raises(ProfileError, match="p.json"):
            profiles.load(path)
    with pytest.raises(ProfileError, match="cannot be read"):
        profiles.load(tmp_path / "absent.json")


def test_foreign_content_and_other_machines_are_refused(measured: Profile) -> None:
    content = measured.model_dump(mode="json")
    with pytest.raises(ProfileError, match="operations"):
        profiles.parse({**content, "operations": 3}, "x")
    with pytest.raises(ProfileError, match="schema 9"):
        profiles.parse({**content, "schema_version": 9}, "x")
    broken = json.loads(json.dumps(content))
    broken["operations"]["expert 0"]["time"]["fixed"] = float("nan")
    with pytest.raises(ProfileError, match="finite"):
        profiles.parse(broken, "x")
    other = profiles.parse({**content, "fingerprint": {**measured.fingerprint, "torch": "1.0"}}, "x")
    with pytest.raises(ProfileError, match="torch was '1.0'"):
        profiles.require_this_machine(other, "x")


def test_cost_model_by_hand() -> None:
    model = CostModel(np.array([[1.0, 10, 100], [2, 20, 200]]), np.array([[0.1, 1, 10], [0.2, 2, 20]]))
    assert model.cost(1, 0) == Cost()
    assert model.cost(1, 3) == Cost(2 + 0.2 * 3, 20 + 2 * 3, 200 + 20 * 3)
    np.testing.assert_allclose(model.batch(np.array([[0, 3], [2, 1]]))[:, 0], [2.6, 1.2 + 2.2])
    fixed, slope = model.subsets()
    np.testing.assert_allclose(fixed[:, 0], [0, 1, 2, 3])
    np.testing.assert_allclose(slope[3], [0.3, 3, 30])


def test_relative_cost_is_one_for_the_reference() -> None:
    relative = RelativeCost(Cost(2, 4, 8), Cost(0.5, 0.25, 0.25))
    assert relative(2.0, 4.0, 8.0) == 1
    assert relative(4.0, 0.0, 0.0) == 1
    np.testing.assert_array_equal(relative(np.array([2.0, 0]), np.array([4.0, 4]), np.array([8.0, 0])), [1, 0.25])
    for reference, weights in (
        (Cost(0, 1, 1), Cost(1, 1, 1)),
        (Cost(1, 1, 1), Cost()),
        (Cost(1, 1, 1), Cost(-1, 3, 3)),
    ):
        with pytest.raises(ValueError, match="0"):
            RelativeCost(reference, weights)
