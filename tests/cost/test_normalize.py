"""The normaliser: its arithmetic by hand, its bounds as a law, its files, and its two wrappers."""

from pathlib import Path

import gymnasium
import numpy as np
import pytest
from gymnasium.vector import AutoresetMode
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from cost.normalize import (
    BOUND,
    METHODS,
    CostNormalizer,
    NormalizeCost,
    NormalizeCostVector,
    NormalizerError,
)

each_method = pytest.mark.parametrize("method", METHODS)
finite = st.floats(-1e6, 1e6, allow_nan=False)
batches = st.lists(arrays(np.float64, st.tuples(st.integers(0, 20), st.just(2)), elements=finite), min_size=1)


def series(count: int = 5000) -> np.ndarray:
    """Times as a machine gives them: a narrow mode and a long tail, beside a constant."""
    generator = np.random.default_rng(0)
    times = 2e-5 * (1 + 0.1 * generator.standard_normal(count)) + (generator.random(count) < 0.005) * 4e-3
    return np.column_stack([times, np.full(count, 1024.0)])


def test_mean_and_variance_by_hand() -> None:
    normalizer = CostNormalizer(["a"], percentile=100)
    for batch in ([[1.0], [2.0]], [[3.0]], [[6.0], [8.0]]):
        normalizer.update(np.array(batch))
    assert normalizer.mean == pytest.approx(4)
    assert normalizer.variance == pytest.approx(np.var([1, 2, 3, 6, 8]))
    assert normalizer.normalize(np.array([8.0])) == pytest.approx(4 / np.std([1, 2, 3, 6, 8]))


def test_exponential_averages_by_hand() -> None:
    normalizer = CostNormalizer(["a"], "ema", ema=0.9, percentile=100)
    normalizer.update(np.array([[1.0], [3.0]]))
    normalizer.update(np.array([[12.0]]))
    assert normalizer.mean == pytest.approx(0.9 * 2 + 0.1 * 12)
    assert normalizer.variance == pytest.approx(0.9 * 1 + 0.9 * 0.1 * 10**2)


def test_least_and_most() -> None:
    normalizer = CostNormalizer(["a"], "min-max", percentile=100)
    normalizer.update(np.array([[2.0], [4.0], [10.0]]))
    np.testing.assert_allclose(normalizer.normalize(np.array([[2.0], [6.0], [10.0], [99.0]]))[:, 0], [0, 0.5, 1, 1])


@each_method
@given(batches)
@settings(deadline=None, max_examples=50)
def test_nothing_is_beyond_three_sigma_nor_not_finite(method: str, costs: list[np.ndarray]) -> None:
    normalizer = CostNormalizer(["a", "b"], method)
    for batch in costs:
        normalized = normalizer(batch)
        assert normalized.shape == batch.shape
        assert np.isfinite(normalized).all()
        assert (np.abs(normalized) <= BOUND).all()


@each_method
def test_a_long_tail_is_clipped_at_the_percentile_and_a_constant_is_zero(method: str) -> None:
    costs = series()
    normalizer = CostNormalizer(["a", "b"], method)
    for batch in np.array_split(costs, 100):
        normalizer.update(batch)
    normalized = normalizer.normalize(costs)
    assert normalizer.high[0] == pytest.approx(np.percentile(costs[:, 0], 99), rel=0.1)
    assert normalized[:, 0].std() > 0.1
    np.testing.assert_array_equal(normalized[:, 1], 0)


def test_how_the_rows_are_batched_does_not_matter_to_mean_and_variance() -> None:
    costs = np.flip(np.sort(series(500), axis=0), axis=0)  # the largest first: nothing is clipped
    one, many = CostNormalizer(["a", "b"], percentile=100), CostNormalizer(["a", "b"], percentile=100)
    one.update(costs)
    for row in costs:
        many.update(row)
    np.testing.assert_allclose(one.mean, many.mean)
    np.testing.assert_allclose(one.variance, many.variance, atol=1e-16)


@each_method
def test_saved_and_loaded_it_goes_on_bit_for_bit(method: str, tmp_path: Path) -> None:
    costs = series()
    normalizer = CostNormalizer(["a", "b"], method, reservoir=200)
    normalizer.update(costs[:3000])
    normalizer.save(tmp_path / "n.json")
    again = CostNormalizer.load(tmp_path / "n.json")
    np.testing.assert_array_equal(normalizer(costs[3000:]), again(costs[3000:]))
    assert normalizer.state_dict() == again.state_dict()
    empty = CostNormalizer.from_state_dict(CostNormalizer(["a", "b"], method).state_dict())
    np.testing.assert_array_equal(empty.normalize(costs), 0)


def test_frozen_it_is_the_same_on_floats_and_arrays() -> None:
    costs = series()
    normalizer = CostNormalizer(["a", "b"])
    normalizer.update(costs)
    frozen = normalizer.frozen("a")
    expected = normalizer.normalize(costs)[:, 0]
    np.testing.assert_array_equal(frozen(costs[:, 0]), expected)
    assert [frozen(cost) for cost in costs[:, 0].tolist()] == expected.tolist()


def test_what_it_refuses(tmp_path: Path) -> None:
    normalizer = CostNormalizer(["a", "b"])
    normalizer.update(np.ones((3, 2)))
    before = normalizer.state_dict()
    for wrong in (np.array([[1, np.nan]]), np.array([[1, np.inf]])):
        with pytest.raises(ValueError, match="b is .*not finite"):
            normalizer.update(wrong)
    with pytest.raises(ValueError, match=r"\[..., 2\] for a, b"):
        normalizer.update(np.ones(3))
    assert normalizer.state_dict() == before
    with pytest.raises(ValueError, match="for a, b, not for c"):
        normalizer.frozen("c")
    with pytest.raises(ValueError, match="seen no costs"):
        CostNormalizer(["a"]).frozen()
    with pytest.raises(ValueError, match="z-norm, ema, min-max"):
        CostNormalizer(method="robust")
    with pytest.raises(ValueError, match="ema=2"):
        CostNormalizer(ema=2)
    normalizer.save(tmp_path / "n.json")
    text = (tmp_path / "n.json").read_text()
    for damaged in (text.replace("1.0", "2.0"), text[:-9], "[]"):
        (tmp_path / "n.json").write_text(damaged)
        with pytest.raises(NormalizerError, match="n.json"):
            CostNormalizer.load(tmp_path / "n.json")
    for state in ({}, {**before, "schema": 9}, {**before, "mean": [1.0]}, {**before, "reservoir": []}):
        with pytest.raises(ValueError, match=r"normaliser|schema|costs must|parts"):
            CostNormalizer.from_state_dict(state)


@pytest.mark.parametrize("mode", list(AutoresetMode))
def test_the_wrappers_pay_with_normalised_costs(mode: AutoresetMode) -> None:
    kwargs = {"bundle": "digits", "batch_size": 4}
    single = NormalizeCost(gymnasium.make("moe_envs:MoERouting-v0", **kwargs), CostNormalizer(), 0.5)
    vector = NormalizeCostVector(
        gymnasium.make_vec("moe_envs:MoERouting-v0", 1, vectorization_mode="vector_entry_point",
                           autoreset_mode=mode.value, **kwargs), CostNormalizer(), 0.5)  # fmt: skip
    single.reset(seed=3)
    vector.reset(seed=3)
    for step in range(4):
        _, reward, terminated, _, info = single.step(step % 3)
        _, rewards, *_ = vector.step(np.array([step % 3]))
        assert rewards[0] == reward
        expected = np.mean([info[f"normalized/cost/{name}"] for name in ("time", "memory", "energy")])
        assert reward == pytest.approx(info["reward/quality"] - 0.5 * expected)
    assert terminated
    assert single.normalizer.state_dict() == vector.normalizer.state_dict()
    single.learning = False
    single.reset()
    single.step(0)
    assert single.normalizer.count == 4


def test_inside_the_reward_of_an_environment(tmp_path: Path) -> None:
    id_, kwargs = "moe_envs:MoERouting-v0", {"bundle": "digits", "batch_size": 8, "cost_weight": 0.3}
    plain, normalizer = gymnasium.make(id_, **kwargs), CostNormalizer(["reward/cost"])
    plain.reset(seed=0)
    costs = [plain.step(step % 8)[4]["reward/cost"] for step in range(8)]
    normalizer.update(np.array(costs)[:, None])
    normalizer.save(tmp_path / "n.json")
    env = gymnasium.make(id_, **kwargs, normalizer=str(tmp_path / "n.json"))
    vector = gymnasium.make_vec(
        id_, 1, vectorization_mode="vector_entry_point", **kwargs, normalizer=str(tmp_path / "n.json")
    )
    env.reset(seed=0)
    vector.reset(seed=0)
    for step in range(8):
        _, reward, _, _, info = env.step(step % 8)
        assert info["reward/cost"] == costs[step]
        assert info["reward/normalized_cost"] == normalizer.normalize(np.array([costs[step]]))[0]
        assert reward == info["reward/quality"] - 0.3 * info["reward/normalized_cost"]
        assert vector.step(np.array([step % 8]))[1][0] == reward
    with pytest.raises(NormalizerError, match="absent.json cannot be read"):
        gymnasium.make(id_, **kwargs, normalizer=str(tmp_path / "absent.json"))
