"""MoERouting-v0 on numbers worked out by hand."""

from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest

from cost.model import Cost, CostModel
from cost.profile import Profile
from experts import bundle
from experts.bundle.streams import deal

ID = "moe_envs:MoERouting-v0"


def env_and_costs(**kwargs: Any) -> tuple[Any, CostModel]:
    env = gymnasium.make(ID, bundle="digits", **kwargs).unwrapped
    return env, Profile.model_validate(bundle.load("digits").profile).cost_model()


def test_fixed_cost_is_paid_once_a_batch_and_again_in_the_next() -> None:
    env, costs = env_and_costs(batch_size=3)
    env.reset(seed=0)
    for expert, first in ((4, True), (4, False), (7, True)):
        info = env.step(expert)[4]
        expected = costs.slope[expert] + first * costs.fixed[expert]
        np.testing.assert_allclose([info["cost/time"], info["cost/memory"], info["cost/energy"]], expected, rtol=1e-12)
    env.reset()
    np.testing.assert_allclose(env.step(4)[4]["cost/time"], costs.fixed[4, 0] + costs.slope[4, 0], rtol=1e-12)


def test_a_subset_pays_for_each_of_its_experts() -> None:
    env, costs = env_and_costs(action="subset")
    env.reset(seed=0)
    members = np.array([1, 0, 0, 1, 0, 0, 0, 1], dtype=np.int8)
    info = env.step(members)[4]
    assert info["cost/memory"] == pytest.approx((costs.fixed + costs.slope)[[0, 3, 7], 1].sum())
    assert info["routing/experts_used"] == 3


def test_the_empty_subset_costs_nothing_and_is_never_correct() -> None:
    env, _ = env_and_costs(action="subset")
    env.reset(seed=0)
    _, reward, _, _, info = env.step(np.zeros(8, dtype=np.int8))
    assert (reward, info["reward/quality"], info["reward/cost"], info["cost/energy"]) == (0.0, 0.0, 0.0, 0.0)


def test_cost_one_is_the_mean_batch_of_the_top_2_gate() -> None:
    env = gymnasium.make_vec(ID, 1024, vectorization_mode="vector_entry_point", bundle="digits", action="top-m")
    env.reset(seed=0)
    total = sum(env.step(np.ones(1024, dtype=np.int64))[4]["reward/cost"] for _ in range(32))
    assert total.mean() == pytest.approx(1.0, abs=0.02)


def test_quality_is_what_the_model_answers() -> None:
    """The tabulated outcome of a subset equals the argmax of the model's own mix of the experts' logits."""
    import torch

    from experts import data, model

    loaded = bundle.load("digits")
    inputs, labels = data.load("digits")["test"]
    gate, outputs = model.tabulate(loaded.model(), torch.from_numpy(inputs))
    env, _ = env_and_costs(split="test")
    outcomes = env.vector.tables.outcomes(np.arange(len(labels)))
    for code in (1, 2, 128, 3, 0b10100101, 255):
        members = (torch.tensor(code) >> torch.arange(8) & 1).bool().expand(len(labels), 8)
        correct = model.mix(gate, outputs, members).argmax(1).numpy() == labels
        assert (outcomes[:, code] == correct).mean() > 0.997  # ties of rounding apart


def test_observation_parts_say_what_their_names_say() -> None:
    env, _ = env_and_costs(batch_size=4, observation="features")
    first, _ = env.reset(seed=3)
    inputs = env.batch_inputs()
    env.reset(seed=3)
    tables, parts = bundle.load("digits").split("rl_train"), env.observation_layout
    observations = [first, *(env.step(action)[0] for action in (6, 6, 2, 1))]
    for observation, index in zip(observations, inputs, strict=False):
        np.testing.assert_array_equal(observation[parts["features"].slice], tables.features[index])
        gate = tables.gate_logits[index] - tables.gate_logits[index].mean()
        np.testing.assert_allclose(observation[parts["gate_logits"].slice], gate, atol=1e-5)
        mean = 3 * tables.features[inputs].astype(np.float32).mean(0)
        np.testing.assert_allclose(observation[parts["batch_features"].slice], mean, atol=1e-5)
        assert observation[parts["batch_gate"].slice].mean() == pytest.approx(1, abs=1e-5)
    np.testing.assert_array_equal(observations[3][parts["experts_used"].slice], [0, 0, 1, 0, 0, 0, 1, 0])
    assert [o[parts["progress"].slice].item() for o in observations] == [0, 0.25, 0.5, 0.75, 1]
    assert not observations[4][parts["features"].slice].any()
    assert observations[0][parts["cost"].slice] == 0 < observations[1][parts["cost"].slice]


def test_worth_and_plan_by_brute_force() -> None:
    """The pool of positive plans has the largest return by the estimates among all 255 pools."""
    env, costs = env_and_costs(batch_size=4, cost_weight=0.4)
    loaded, parts = bundle.load("digits"), env.observation_layout
    for seed in range(5):
        first, _ = env.reset(seed=seed)
        batch = env.batch_inputs()
        env.reset(seed=seed)
        seen = [first, *(env.step(6)[0] for _ in range(4))]
        relative = env.vector.tables.relative
        fixed, slope = (4 * 0.4 * relative(*part.T) for part in (costs.fixed, costs.slope))
        chances = loaded.in_batches("rl_train", batch[None])[0]
        worth = np.array([observation[parts["worth"].slice] for observation in seen])
        np.testing.assert_allclose(worth[:4], chances - slope, atol=1e-5)
        assert not worth[4].any()
        pools = {code: [e for e in range(8) if code >> e & 1] for code in range(1, 256)}
        returns = {code: worth[:4, pool].max(1).sum() - fixed[pool].sum() for code, pool in pools.items()}
        plan, detour = first[parts["plan"].slice], first[parts["detour"].slice]
        best = max(returns, key=returns.__getitem__)
        assert pools[best] == (plan > 0).nonzero()[0].tolist() == (detour == 0).nonzero()[0].tolist()
        for expert in range(8):
            with_it, without = (max(v for c, v in returns.items() if (c >> expert & 1) == k) for k in (1, 0))
            assert plan[expert] == pytest.approx(np.clip(with_it - without, -4, 4), abs=1e-4)
        prices = np.array([observation[parts["prices"].slice] for observation in seen])
        np.testing.assert_allclose(prices[0], fixed + slope, rtol=1e-5)
        np.testing.assert_allclose(prices[1], fixed * (np.arange(8) != 6) + slope, rtol=1e-5)


@pytest.mark.parametrize("stream", ["topical", "iid"])
def test_deck_is_fixed_and_topical_batches_have_few_classes(stream: str) -> None:
    labels = np.repeat(np.arange(10), 50)
    deck = deal(labels, 32, stream, count=500)
    np.testing.assert_array_equal(deck, deal(labels, 32, stream, count=500))
    classes = np.array([len(set(labels[batch])) for batch in deck])
    assert np.median(classes) <= 4 if stream == "topical" else classes.mean() > 8
    shares = np.bincount(labels[deck.ravel()], minlength=10) / deck.size
    np.testing.assert_allclose(shares, 0.1, atol=0.04)


def test_a_class_that_is_absent_is_never_dealt() -> None:
    labels = np.array([3, 3, 7, 7, 7])
    assert set(labels[deal(labels, 16, "topical", count=100)].ravel()) == {3, 7}


def test_pictures_show_what_was_chosen() -> None:
    env, _ = env_and_costs(render_mode="ansi", batch_size=4)
    env.reset(seed=0)
    for action in (0, 7, 7):
        env.step(action)
    lines = env.render().splitlines()
    assert len(lines) == 9
    assert lines[0].split()[-1][1:] == ".."
    assert lines[7].split()[-1][0] == "."
    assert "input 3 of 4" in lines[8]
    env, _ = env_and_costs(render_mode="rgb_array")
    env.reset(seed=0)
    before = env.render()
    env.step(7)
    after = env.render()
    assert before.shape == after.shape
    assert before.dtype == np.uint8
    assert (before != after).any()


def test_machine_costs_are_measured_once_and_refused_elsewhere(own_cache: Path) -> None:
    from cost.profile import ProfileError
    from experts import profiles

    loaded = bundle.load("digits")
    first = gymnasium.make(ID, bundle="digits", costs="machine").unwrapped
    path = profiles.machine_path(loaded)
    written = path.read_bytes()
    second = gymnasium.make(ID, bundle="digits", costs="machine").unwrapped
    assert path.read_bytes() == written
    assert first.vector.reward == second.vector.reward  # type: ignore[attr-defined]
    Profile.model_validate({**profiles.select(loaded, "machine").model_dump(), "fingerprint": {"cpu": "other"}}).save(
        path
    )
    with pytest.raises(ProfileError, match="'other'.*moe-profile"):
        gymnasium.make(ID, bundle="digits", costs="machine")


def test_cost_arithmetic() -> None:
    assert Cost(1, 2, 3) + 2 * Cost(1, 1, 1) == Cost(3, 4, 5)
