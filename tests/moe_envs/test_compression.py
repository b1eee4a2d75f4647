"""MoECompression-v0 by hand: a walk over a model, its budget, its quality."""

from functools import partial
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.numpy import load_file, save_file

from agents.baselines import compression as baselines
from experts import reference_models
from experts.compression import LEVELS, size_of
from experts.compression.pieces import pieces
from experts.compression.plan import Plan

ID, MODEL = "moe_envs:MoECompression-v0", "digits-mlp"


def drawn(levels: list[int], env: Any, observation: np.ndarray) -> int:
    return levels[env.vector.place[0]]


def make(**kwargs: Any) -> Any:
    return gymnasium.make(ID, **({"model": MODEL} | kwargs)).unwrapped


def walk(env: Any, choose: Any) -> tuple[list[int], float, dict[str, Any]]:
    """The levels taken, the sum of the rewards and the last info of an episode."""
    observation, _ = env.reset()
    levels, total = [], 0.0
    for _ in range(18):
        observation, reward, done, _, info = env.step(choose(env, observation))
        levels.append(info["compression/level"])
        total += reward
    assert done
    return levels, total, info


def suggested(env: Any, observation: np.ndarray) -> int:
    return int(observation[env.observation_layout["suggested"].slice].argmax())


def test_quality_is_that_of_the_decompressed_model_and_its_file_has_the_bytes(tmp_path: Path) -> None:
    env = make(quality="accuracy and loss")
    env.reset(seed=0)
    model = reference_models.load(MODEL)
    inputs, labels = (torch.from_numpy(each) for each in reference_models.examples(MODEL).half("train"))
    generator = np.random.default_rng(0)
    for _ in range(5):
        levels, total, info = walk(env, lambda env, _: int(generator.integers(len(LEVELS))))
        file, restored = Plan.of(model, levels).compress(model, env.vector.tables.models[0].importance)
        assert len(file) == info["compression/bytes"] <= env.vector.budget[0]
        with torch.no_grad():
            scores = [
                (float((each(inputs).argmax(1) == labels).float().mean()), float(F.cross_entropy(each(inputs), labels)))
                for each in (restored, model)
            ]
        accuracy, loss = (after - before for after, before in zip(*scores, strict=True))
        assert info["compression/accuracy"] == pytest.approx(accuracy, abs=1e-6)
        assert info["compression/loss"] == pytest.approx(loss, abs=1e-5)
        assert total == pytest.approx(10 * accuracy - 3 * loss, abs=1e-4)


@pytest.mark.parametrize("action", [0, 5, 13])
def test_every_walk_ends_within_its_budget(action: int) -> None:
    env = make()
    env.reset(seed=1)
    least = sum(size_of(piece.shape, len(LEVELS) - 1) for piece in pieces(reference_models.load(MODEL)).values())
    for _ in range(20):
        _, _, info = walk(env, lambda *_: action)
        assert info["compression/bytes"] <= env.vector.budget[0]
    tight = make(budget=least + env.vector.tables.overhead)
    tight.reset(seed=0)
    levels, _, info = walk(tight, lambda *_: 0)
    assert info["compression/bytes"] == least + env.vector.tables.overhead
    assert size_of((96, 64), levels[0]) == size_of((96, 64), len(LEVELS) - 1)
    with pytest.raises(ValueError, match=f"at least {info['compression/bytes']:,}"):
        make(budget=info["compression/bytes"] - 1)


def test_the_mask_is_what_is_taken() -> None:
    env = make(budget=20_000)
    env.reset(seed=0)
    for _ in range(18):
        mask, state = env.action_masks(), env.state()
        for action in range(len(LEVELS)):
            env.restore(state)
            taken = env.step(action)[4]["compression/level"]
            assert (taken == action) == mask[action]
            assert mask[taken]
        env.restore(state)
        env.step(4)


def test_shaped_rewards_have_the_same_sum_and_additive_ones_are_the_sensitivities() -> None:
    plain, shaped, additive = make(), make(shaped=True), make(evaluation="additive")
    for env in (plain, shaped, additive):
        env.reset(seed=3)
    for draws in np.random.default_rng(0).integers(len(LEVELS), size=(3, 18)).tolist():
        results = [walk(env, partial(drawn, draws)) for env in (plain, shaped, additive)]
        assert results[0][0] == results[1][0] == results[2][0]
        assert results[0][1] == pytest.approx(results[1][1], abs=1e-12)
        found = additive.vector.tables.models[0].sensitivity
        rows = range(18), results[2][0]
        assert results[2][1] == pytest.approx((10 * found.accuracy[rows] - 3 * found.loss[rows]).sum())
        assert results[2][2]["compression/accuracy"] == 0


def test_suggested_plans_are_next_to_the_exact_allocation() -> None:
    env = make(evaluation="additive")
    tables = env.vector.tables
    env.reset(seed=5)
    for _ in range(5):
        _, total, _ = walk(env, suggested)
        room = int(env.vector.budget[0]) - tables.overhead
        best = baselines.exact(tables.sizes, tables.gains[0], room)
        bound = float(tables.gains[0][range(18), best].sum())
        assert bound - 0.05 < total <= bound + 1e-9


def test_costs_are_those_of_the_plan() -> None:
    env = make(cost_weight=0.5)
    env.reset(seed=0)
    env.vector.budget[:] = env.vector.tables.bytes  # room for the model as it is
    infos = [env.step(0)[4] for _ in range(18)]
    assert sum(info["reward/cost"] for info in infos) == pytest.approx(1.0)
    assert sum(info["cost/memory"] for info in infos) == env.vector.tables.bytes
    assert infos[-1]["compression/accuracy"] == infos[-1]["compression/loss"] == 0


def test_each_row_is_of_its_own_model(own_cache: Path) -> None:
    names = [MODEL, f"{MODEL}-1"]
    both: Any = gymnasium.make_vec(ID, 6, "vector_entry_point", model=names, cost_weight=0.3).unwrapped
    observation, _ = both.reset(seed=0)
    assert set(both.model.tolist()) == {0, 1}
    alone = []
    for row in range(6):
        env = make(model=names[both.model[row]], budget=int(both.budget[row]), cost_weight=0.3)
        alone.append((env, env.reset(seed=0)[0]))
    for actions in np.random.default_rng(0).integers(len(LEVELS), size=(18, 6)):
        np.testing.assert_array_equal(observation, [seen for _, seen in alone])
        observation, rewards, _, _, infos = both.step(actions)
        steps = [env.step(int(action)) for (env, _), action in zip(alone, actions, strict=True)]
        alone = [(env, step[0]) for (env, _), step in zip(alone, steps, strict=True)]
        np.testing.assert_allclose(infos["reward/quality"], [step[4]["reward/quality"] for step in steps], atol=1e-12)
        np.testing.assert_allclose(rewards, [step[1] for step in steps], atol=0.01)  # paid relative to the first model
    kept = {key: values.copy() for key, values in infos.items()}
    both.step(actions)  # the rows begin anew
    for key, values in kept.items():
        np.testing.assert_array_equal(infos[key], values)


def test_budgets_are_drawn_over_their_range_and_models_in_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    env: Any = gymnasium.make_vec(ID, 512, "vector_entry_point", model=[MODEL, MODEL]).unwrapped
    env.reset(seed=0)
    low, high = np.log(env.budgets)
    shares = (np.log(env.budget) - low) / (high - low)
    assert 0 <= shares.min() < 0.02
    assert 0.98 < shares.max() <= 1
    assert abs(shares.mean() - 0.5) < 0.05
    assert abs(env.model.mean() - 0.5) < 0.1


@pytest.mark.filterwarnings("ignore:.*doesn't natively support")
@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"model": "vgg"}, "fashion-mnist-conv, digits-mlp"),
        ({"model": []}, "at least one"),
        ({"model": 3}, "must be a name"),
        ({"model": f"{MODEL}\n"}, "fashion-mnist-conv, digits-mlp"),
        ({"shaped": "False"}, "True or False"),
        ({"budget": 1000.5}, "whole number of bytes"),
        ({"split": "rl_train"}, "'train', 'validation', 'test'"),
        ({"quality": "acuracy"}, "did you mean 'accuracy'"),
        ({"evaluation": "fast"}, "'model', 'additive'"),
        ({"granularity": "model"}, "'expert', 'layer'"),
        ({"costs": "live"}, "'reference', 'machine'"),
        ({"budgets": 3}, "did you mean 'budget'"),
    ],
)
def test_wrong_arguments_name_the_valid_ones(kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(**kwargs)


def test_damaged_examples_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = reference_models.FOLDER / f"{MODEL}.examples.safetensors"
    arrays = load_file(path)
    monkeypatch.setattr(reference_models, "FOLDER", tmp_path)
    save_file(arrays, tmp_path / path.name, {"sha256": "0"})
    with pytest.raises(reference_models.DataError, match="install moe-envs anew"):
        reference_models.examples(MODEL)
    (tmp_path / path.name).unlink()
    again = reference_models.examples(MODEL)  # from the data set
    np.testing.assert_array_equal(again.inputs, arrays["inputs"] / np.float32(16))
