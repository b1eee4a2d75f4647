"""MoELayerTopK-v0: quality, cost, budget, rows that do not depend on each other."""

from typing import Any

import gymnasium
import numpy as np
import pytest
import torch

from experts.data import DataError
from moe_envs.layertopk import MoELayerTopKEnv, MoELayerTopKVectorEnv

ID = "moe_envs:MoELayerTopK-v0"
TOKENS = 6


def vector(rows: int, **kwargs: Any) -> MoELayerTopKVectorEnv:
    return MoELayerTopKVectorEnv(rows, tokens=TOKENS, **kwargs)


def played(env: MoELayerTopKVectorEnv, actions: np.ndarray, **reset: Any) -> dict[str, np.ndarray]:
    """Sums over an episode in all rows of actions `[steps, n, ...]`."""
    env.reset(**reset)
    sums = {"return": np.zeros(env.num_envs), "reward/quality": 0, "reward/cost": 0}
    for action in actions:
        _, reward, ended, _, infos = env.step(action)
        sums["return"] = sums["return"] + reward
        for name in ("reward/quality", "reward/cost"):
            sums[name] = sums[name] + infos[name]
    assert ended.all()
    return {**sums, "experts": infos["layertopk/experts_used"]}


def test_all_experts_lose_nothing_and_cost_one() -> None:
    env = vector(4)
    found = played(env, np.full((TOKENS * env.layers, 4), env.k), seed=0)
    np.testing.assert_allclose(found["reward/quality"], 0, atol=1e-5)
    np.testing.assert_allclose(found["reward/cost"], 1)
    assert found["experts"].tolist() == [TOKENS * env.layers * env.k] * 4


def test_quality_is_the_change_of_the_models_own_loss_and_costs_are_the_profiles() -> None:
    env = vector(3, cost_weight=0.3)
    k = np.random.default_rng(0).integers(env.k + 1, size=(3, TOKENS, env.layers))
    found = played(env, k.transpose(1, 2, 0).reshape(-1, 3), seed=5)
    passages = env.passage
    ids = env.stepped.passages.ids[passages]
    model = env.stepped.model
    each = torch.from_numpy(np.concatenate([k, k[:, -1:]], 1))
    change = (model.loss(ids) - model.loss(ids, k=each)).mean(1).numpy()
    np.testing.assert_allclose(found["reward/quality"], change, atol=1e-4)
    costs = env.stepped.costs[:, :, 0]
    wanted = costs[np.arange(env.layers), k].sum((1, 2)) / (costs[:, env.k].sum() * TOKENS)
    np.testing.assert_allclose(found["reward/cost"], wanted)
    np.testing.assert_allclose(found["return"], found["reward/quality"] - 0.3 * found["reward/cost"])
    assert (np.diff(costs[:-1], axis=1) > 0).all()


def test_the_divergence_is_of_the_models_own_predictions() -> None:
    env = vector(3, quality="divergence")
    k = np.random.default_rng(1).integers(env.k + 1, size=(3, TOKENS, env.layers))
    found = played(env, k.transpose(1, 2, 0).reshape(-1, 3), seed=6)
    ids = torch.from_numpy(env.stepped.passages.ids[env.passage][:, :-1])
    network = env.stepped.model.network
    with torch.inference_mode():
        ours, full = (network(ids, each).logits.log_softmax(-1) for each in (torch.from_numpy(k), None))
    wanted = -torch.nn.functional.kl_div(ours, full, reduction="none", log_target=True).sum(-1).mean(1)
    np.testing.assert_allclose(found["reward/quality"], wanted, atol=1e-4)


@pytest.mark.parametrize("kwargs", [{}, {"budget": 1.5, "observation": "token"}, {"granularity": "token"}])
def test_a_row_is_the_same_alone_bit_for_bit(kwargs: dict[str, Any]) -> None:
    env = vector(11, autoreset_mode="SameStep", **kwargs)
    single = gymnasium.make(ID, tokens=TOKENS, **kwargs)
    env.action_space.seed(3)
    beside, _ = env.reset(seed=40)
    alone, _ = single.reset(seed=47)
    for _ in range(TOKENS * (1 if "granularity" in kwargs else env.layers)):
        np.testing.assert_array_equal(beside[7], alone)
        actions = env.action_space.sample()
        beside, rewards, _, _, infos = env.step(actions)
        alone, reward, ended, _, _ = single.step(actions[7])
        assert rewards[7] == reward
    assert ended
    np.testing.assert_array_equal(infos["final_obs"][7], alone)
    assert not alone.any()


def test_rows_in_different_layers_do_not_disturb_each_other() -> None:
    env, other = vector(9, autoreset_mode="Disabled"), vector(9, autoreset_mode="Disabled")
    actions = np.random.default_rng(1).integers(5, size=(12, 9))
    env.reset(seed=0)
    other.reset(seed=0)
    mask = np.zeros(9, dtype=bool)
    mask[[1, 4]] = True
    for number, action in enumerate(actions):
        if number == 3:
            env.reset(options={"reset_mask": mask})
        found = env.step(action)[0]
        wanted = other.step(action)[0]
        np.testing.assert_array_equal(found[~mask], wanted[~mask])
    assert env.places()[1][mask].tolist() == [1, 1]
    assert env.places()[1][~mask].tolist() == [0] * 7


def test_a_passage_is_replayed() -> None:
    env: Any = gymnasium.make(ID, tokens=TOKENS).unwrapped
    assert isinstance(env, MoELayerTopKEnv)
    first, _ = env.reset(seed=1, options={"passage": 17})
    assert env.vector.passage.tolist() == [17]
    env.step(0)
    np.testing.assert_array_equal(env.reset(options={"passage": 17})[0], first)
    rows = vector(2)
    rows.reset(seed=0, options={"passage": [3, 5]})
    assert rows.passage.tolist() == [3, 5]
    for wrong in (-1, 10**6, 0.5, [1, 2, 3], "a"):
        with pytest.raises(ValueError, match=r"options\['passage'\]="):
            rows.reset(options={"passage": wrong})


@pytest.mark.parametrize("granularity", ["layer", "token"])
def test_the_budget_is_a_hard_limit(granularity: str) -> None:
    env = vector(3, budget=1.25, granularity=granularity, cost_weight=0.0)
    steps = TOKENS * (env.layers if granularity == "layer" else 1)
    wish = np.full((steps, 3) if granularity == "layer" else (steps, 3, env.layers), env.k)
    env.reset(seed=0)
    assert env.action_masks().all()
    found = played(env, wish, seed=0)
    assert found["experts"].tolist() == [30] * 3  # 1.25 x 6 tokens x 4 layers
    assert env.action_masks().reshape(3, -1, env.k + 1).tolist()[0][0] == [True] + [False] * env.k


def test_all_layers_at_once_are_the_layers_one_by_one() -> None:
    one, all_at_once = vector(2), vector(2, granularity="token")
    k = np.random.default_rng(2).integers(5, size=(TOKENS, 2, one.layers))
    found = played(all_at_once, k, seed=3)
    wanted = played(one, k.transpose(0, 2, 1).reshape(-1, 2), seed=3)
    for name, values in wanted.items():
        np.testing.assert_allclose(found[name], values, atol=1e-12)


def test_what_is_not_possible_is_told() -> None:
    with pytest.raises(DataError, match="passages that come with the model have 64"):
        MoELayerTopKVectorEnv(1, tokens=65)
    with pytest.raises(ValueError, match="the context of the model is 512"):
        MoELayerTopKVectorEnv(1, tokens=600)
    with pytest.raises(DataError, match="no language model"):
        MoELayerTopKVectorEnv(1, model="nothing")


def test_the_picture_has_the_text() -> None:
    pictures = {}
    for mode, k in (("ansi", 2), ("rgb_array", 0), ("rgb_array", 4)):
        env: Any = gymnasium.make(ID, tokens=TOKENS, render_mode=mode)
        env.reset(seed=0)
        for _ in range(8):
            env.step(k)
        pictures[k] = env.render()
    vector = env.unwrapped.vector
    first, second, *_ = vector.stepped.pieces(int(vector.passage[0]))
    assert pictures[2] == f"{first}▄{second}▄"
    white, blue = pictures[0], pictures[4]
    assert white.shape == blue.shape
    assert white.shape[2] == 3
    assert blue[..., 0].mean() < white[..., 0].mean()
    assert (blue[..., 2] == white[..., 2]).mean() > 0.9
