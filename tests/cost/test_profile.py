"""Profiles: affine fits, real measurements, files that are whole or refused."""

import json
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from cost import profile as profiles
from cost.energy import JOULES_PER_FLOP, JOULES_PER_WEIGHT_BYTE
from cost.machine import fingerprint
from cost.model import Cost
from cost.profile import SIZES, Fit, Profile, ProfileError, fit, measure, measure_experts, measure_module
from cost.timing import torch_threads


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


def test_fit_never_goes_below_zero_and_is_the_best_there() -> None:
    falling = fit((1, 2, 4), np.array([4.0, 3.0, 2.0]))
    assert falling.slope == 0
    assert falling.fixed == pytest.approx((1 / 4 + 1 / 3 + 1 / 2) / (1 / 16 + 1 / 9 + 1 / 4))
    rising = fit((1, 2, 4), np.array([0.5, 2.0, 6.0]))
    assert rising.fixed == 0
    assert rising.slope == pytest.approx((1 / 0.5 + 2 / 2 + 4 / 6) / (1 / 0.25 + 4 / 4 + 16 / 36))
    assert fit((8,), np.array([3.0])) == Fit(fixed=3.0, slope=0.0)


def test_a_measured_profile_is_plausible(measured: Profile) -> None:
    small, large = measured.operations.values()
    assert min(*small.median, *large.median) > 0
    assert small.memory.fixed == pytest.approx((32 * 10 + 10) * 4)
    assert small.memory.slope == pytest.approx(10 * 4)
    flops = 2 * 32 * 10
    assert small.energy.slope > JOULES_PER_FLOP * flops
    assert large.energy.fixed == pytest.approx(JOULES_PER_WEIGHT_BYTE * large.memory.fixed)
    assert measured.energy_source.startswith("proxy")
    assert measured.fingerprint == fingerprint()


@pytest.mark.usefixtures("clock")
def test_a_slowed_expert_is_found_with_the_right_figure() -> None:
    class Slow(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            time.sleep(0.001 + 0.0001 * len(x))
            return super().forward(x)

    model = Model()
    model.experts.append(Slow(32, 10))
    found = measure_experts(model, np.ones((64, 32), dtype=np.float32), repeats=50).operations
    assert found["expert 2"].time.fixed == pytest.approx(1e-3, abs=1e-5)
    assert found["expert 2"].time.slope == pytest.approx(1e-4, rel=0.01)
    assert max(found[name].time.fixed for name in ("expert 0", "expert 1")) < 1e-5


@pytest.mark.usefixtures("clock")
def test_any_callable_prepared_or_not(own_cache: Path) -> None:
    def product(n: int) -> Callable[[], torch.Tensor]:
        left, right = torch.ones(n, 64), nn.Parameter(torch.ones(64, 32))
        return lambda: left @ right

    found = measure({"sleep": lambda n: time.sleep(n * 1e-4), "product": product}, sizes=(1, 4), repeats=50)
    assert found.operations["sleep"].time.slope == pytest.approx(1e-4, rel=0.01)
    product_ = found.operations["product"]
    assert product_.flops is not None
    assert product_.flops.slope == pytest.approx(2 * 64 * 32)
    assert (product_.memory.fixed, product_.memory.slope) == (pytest.approx(64 * 32 * 4), pytest.approx(32 * 4))
    assert found.cost("sleep", 0) == Cost()
    assert found.cost("product", 3).memory == pytest.approx((64 * 32 + 3 * 32) * 4)
    with pytest.raises(ValueError, match="sleep, product"):
        found.cost("nothing", 1)
    assert found.operations["sleep"].energy == Fit(fixed=0, slope=0)


def test_a_module_over_a_grid() -> None:
    module = nn.Sequential(nn.Linear(16, 256), nn.ReLU(), nn.Linear(256, 16))
    found = measure_module(module, torch.ones(3, 16), (1, 8), dtypes=("float32", "float64"), threads=(1, 2))
    names = ["float32, cpu, 1 thread", "float32, cpu, 2 threads", "float64, cpu, 1 thread", "float64, cpu, 2 threads"]
    assert list(found.operations) == names
    single, double = found.operations[names[0]], found.operations[names[3]]
    assert double.memory.fixed == pytest.approx(2 * single.memory.fixed)
    assert (double.dtype, double.threads, single.threads) == ("float64", 2, 1)
    assert next(module.parameters()).dtype == torch.float32
    for wrong in ((3, torch.ones(1, 16)), (module, torch.ones(0, 16))):
        with pytest.raises(ValueError, match="torch module and inputs"):
            measure_module(*wrong)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="be different"):
        measure_module(module, torch.ones(3, 16), threads=(1, 1))
    with pytest.raises(ValueError, match="floating-point"):
        measure_module(module, torch.ones(3, 16), dtypes=("int8",))


def test_large_batches_run_before_small_ones() -> None:
    seen: list[tuple[str, int]] = []
    measure({name: lambda n, name=name: lambda: seen.append((name, n)) for name in "ab"}, sizes=(1, 8), repeats=50)
    assert seen[4:8] == [("a", 8), ("b", 8), ("a", 1), ("b", 1)]


def test_measuring_leaves_threads_alone_and_needs_repeats_sizes_and_operations() -> None:
    with torch_threads(2):
        measure_experts(Model(), np.ones((64, 32), dtype=np.float32), repeats=50)
        assert torch.get_num_threads() == 2
    with pytest.raises(ValueError, match=">= 50"):
        measure({"nothing": lambda n: None}, repeats=49)
    for sizes in ((), (0, 1), (1, 1)):
        with pytest.raises(ValueError, match="sizes"):
            measure({"nothing": lambda n: None}, sizes=sizes)
    with pytest.raises(ValueError, match="threads"):
        measure({"nothing": lambda n: None}, threads=0)
    with pytest.raises(ValueError, match="must be there"):
        measure({})


def test_saved_and_loaded_it_is_the_same(measured: Profile, tmp_path: Path) -> None:
    measured.save(tmp_path / "p.json")
    assert Profile.load(tmp_path / "p.json") == measured
    assert [path.name for path in tmp_path.iterdir()] == ["p.json"]


def test_another_machines_profile_is_refused_unless_told(measured: Profile, tmp_path: Path) -> None:
    measured.model_copy(update={"fingerprint": {**measured.fingerprint, "torch": "1.0"}}).save(tmp_path / "p.json")
    with pytest.raises(ProfileError, match="torch was '1.0'"):
        Profile.load(tmp_path / "p.json")
    assert Profile.load(tmp_path / "p.json", any_machine=True).operations == measured.operations


def test_damage_is_found(measured: Profile, tmp_path: Path) -> None:
    path = tmp_path / "p.json"
    measured.save(path)
    text = path.read_text()
    for damaged in (text.replace('"spread"', '"spraed"', 1), text[:-5], "[]", "{}"):
        path.write_text(damaged)
        with pytest.raises(ProfileError, match="p.json"):
            Profile.load(path)
        assert path.read_text() == damaged
    with pytest.raises(ProfileError, match="cannot be read"):
        Profile.load(tmp_path / "absent.json")


def test_foreign_content_is_refused_and_the_first_schema_is_read(measured: Profile) -> None:
    content = measured.model_dump(mode="json")
    with pytest.raises(ProfileError, match="operations"):
        profiles.parse({**content, "operations": 3}, "x")
    with pytest.raises(ProfileError, match="schema 9"):
        profiles.parse({**content, "schema_version": 9}, "x")
    broken = json.loads(json.dumps(content))
    broken["operations"]["expert 0"]["time"]["fixed"] = float("nan")
    with pytest.raises(ProfileError, match="finite"):
        profiles.parse(broken, "x")
    shipped = Path(profiles.__file__).parents[1] / "experts" / "assets" / "digits" / "profile.json"
    assert profiles.parse(json.loads(shipped.read_text()), "x").schema_version == 1
