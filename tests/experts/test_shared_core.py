"""Shared cores: the formula by hand, errors that fall, parameters counted, files that come back, work that resumes."""

from pathlib import Path

import numpy as np
import pytest

from experts.compression.shared_core import SharedCore, fit, fit_layers, relative_error


def experts(seed: int = 0, bend: float = 0.3) -> np.ndarray:
    """Five matrices that are one core, each bent a little."""
    generator = np.random.default_rng(seed)
    core = generator.normal(size=(12, 20)).astype(np.float32)
    u, v = (generator.normal(size=(5, 12, 2)).astype(np.float32) for _ in range(2))
    return core + bend * u @ (v.transpose(0, 2, 1) @ core)


def test_the_formula_by_hand() -> None:
    generator = np.random.default_rng(0)
    core = generator.normal(size=(3, 4)).astype(np.float32)
    u_out, v_out = (generator.normal(size=(2, 3, 1)).astype(np.float32) for _ in range(2))
    u_in, v_in = (generator.normal(size=(2, 4, 1)).astype(np.float32) for _ in range(2))
    shared = SharedCore(core, u_out, v_out, u_in, v_in)
    for expert, found in enumerate(shared.weights()):
        left = np.eye(3) + u_out[expert] @ v_out[expert].T
        right = np.eye(4) + u_in[expert] @ v_in[expert].T
        np.testing.assert_allclose(found, left @ core @ right, rtol=1e-4, atol=1e-5)
    assert shared.total_parameters == 12 + 2 * (2 * 3 + 2 * 4)
    assert shared.active_parameters(1) == 12 + 2 * 3 + 2 * 4


def test_the_error_falls_from_that_of_the_mean() -> None:
    weights = experts()
    start = fit(weights, 2, steps=0)
    np.testing.assert_allclose(start.weights(), np.broadcast_to(weights.mean(0), weights.shape), atol=1e-6)
    errors = [relative_error(fit(weights, 2, steps).weights(), weights) for steps in (0, 100, 1500)]
    assert errors[0] > errors[1] > errors[2]
    assert errors[2] < 0.1 * errors[0]


def test_work_is_kept_layer_by_layer(tmp_path: Path) -> None:
    layers = {"in": experts(1), "out": experts(2)}
    first = fit_layers(layers, 2, tmp_path, steps=20, progress=False)
    kept, lost = sorted(tmp_path.iterdir())
    before = kept.stat().st_mtime_ns
    lost.unlink()
    again = fit_layers(layers, 2, tmp_path, steps=20, processes=2, progress=False)
    for name, shared in first.items():
        assert again[name].to_bytes() == shared.to_bytes()
        np.testing.assert_array_equal(again[name].weights(), shared.weights())
    assert kept.stat().st_mtime_ns == before
    other = fit_layers({"in": 7 * layers["in"]}, 2, tmp_path, steps=20, progress=False)["in"]
    assert other.to_bytes() != first["in"].to_bytes()
    kept.write_bytes(kept.read_bytes()[:40])
    with pytest.raises(ValueError, match=f"{kept.name}: not a shared core"):
        fit_layers(layers, 2, tmp_path, steps=20, progress=False)


def test_what_is_wrong_is_named() -> None:
    with pytest.raises(ValueError, match="rank=13: must be from 1 to 12"):
        fit(experts(), 13)
    with pytest.raises(ValueError, match="not a shared core"):
        SharedCore.from_bytes(b"no")
