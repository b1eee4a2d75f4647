"""MoEExpertCache-v0: what the memory holds, quality, cost, rows that do not depend on each other."""

from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch

from experts.data import DataError
from experts.offload import Trace, replay
from experts.routers import Routing, RoutingStatistics
from moe_envs.expertcache import MoEExpertCacheVectorEnv

ID = "moe_envs:MoEExpertCache-v0"
SMALL: dict[str, Any] = {"tokens": 8, "passages": 2}


def vector(rows: int, **kwargs: Any) -> MoEExpertCacheVectorEnv:
    return MoEExpertCacheVectorEnv(rows, **{**SMALL, **kwargs})


def played(env: MoEExpertCacheVectorEnv, choose: Any, **reset: Any) -> dict[str, np.ndarray]:
    """Sums over an episode in all rows; `choose(observation)` returns the actions."""
    observation, _ = env.reset(**reset)
    sums: dict[str, Any] = {"return": 0.0, "reward/quality": 0.0, "reward/cost": 0.0, "cost/time": 0.0}
    for _ in range(env.tokens * env.layers):
        observation, reward, ended, _, infos = env.step(choose(observation))
        sums["return"] = sums["return"] + reward
        for name in list(sums)[1:]:
            sums[name] = sums[name] + infos[name]
    assert ended.all()
    return {**sums, "loads": infos["expertcache/loads_per_token"], "hits": infos["expertcache/hit_rate"]}


def everything(env: MoEExpertCacheVectorEnv) -> Any:
    return lambda observation: np.ones((env.num_envs, env.k), dtype=np.int8)


def nothing(env: Any) -> Any:
    return lambda observation: np.zeros((env.num_envs, env.k), dtype=np.int8)


def test_with_everything_loaded_nothing_is_lost_and_each_miss_is_paid() -> None:
    env = vector(4, cost_weight=0.3)
    found = played(env, everything(env), seed=0)
    np.testing.assert_allclose(found["reward/quality"], 0, atol=1e-5)
    np.testing.assert_allclose(found["return"], found["reward/quality"] - 0.3 * found["reward/cost"])
    np.testing.assert_allclose(found["loads"], (1 - found["hits"]) * env.k * env.layers)
    assert (found["hits"] > 0).all()
    full = vector(4, capacity=env.experts)
    found = played(full, everything(full), seed=0)
    assert found["hits"].tolist() == [1.0] * 4
    assert not found["reward/cost"].any()


def test_costs_are_those_of_the_storage() -> None:
    env = vector(2, costs="simulated memory card", weights="int8")
    loads = env.stepped.loads
    np.testing.assert_allclose(loads[:, 0], np.arange(env.k + 1) * (1e-3 + env.stepped.expert_size / 40e6))
    taken = np.zeros(2)
    observation, _ = env.reset(seed=1)
    for _ in range(env.tokens * env.layers):
        observation, _, _, _, infos = env.step(everything(env)(observation))
        np.testing.assert_allclose(infos["cost/time"], loads[infos["expertcache/loads"], 0])
        np.testing.assert_allclose(infos["cost/memory"], infos["expertcache/loads"] * env.stepped.expert_size)
        taken += infos["reward/cost"]
    np.testing.assert_allclose(taken, infos["expertcache/loads_per_token"] / (env.k * env.layers))
    assert env.memory == 6 * env.layers * env.stepped.expert_size


def test_lru_loads_what_the_replay_of_the_routing_loads() -> None:
    env = vector(3, eviction="lru", capacity=5, tokens=32)
    found = played(env, everything(env), options={"stream": [0, 1, 5]})
    for row, stream in enumerate((0, 1, 5)):
        logits = env.stepped.logits(np.array([stream]))[0]
        wanted = np.argsort(-logits, axis=-1, kind="stable")[..., : env.k]
        layers, size = np.tile(np.arange(env.layers), len(wanted)), np.full(env.layers, 10)
        trace = Trace(layers, wanted.reshape(-1, env.k), env.experts, size, np.ones(len(layers), dtype=bool))
        cold = replay(trace, "lru", 5 / env.experts)
        assert abs(cold.loads / env.tokens - found["loads"][row]) <= 5 * env.layers / env.tokens  # it begins empty


def test_belady_loads_least() -> None:
    loads = {}
    for eviction in ("belady", "predicted", "lru", "static"):
        env = vector(16, eviction=eviction, tokens=32, split="validation")
        loads[eviction] = played(env, everything(env), seed=0)["loads"].mean()
    assert min(loads, key=loads.__getitem__) == "belady"
    assert loads["belady"] < 0.8 * loads["predicted"]
    assert loads["predicted"] < loads["lru"] < loads["static"]


def test_the_divergence_is_that_of_the_model_with_those_experts() -> None:
    env = vector(2, passages=1, weights="float32", fallback="skip")
    draw = np.random.default_rng(0)
    members = np.zeros((2, env.tokens, env.layers, env.experts), dtype=bool)
    env.reset(seed=3)
    quality = np.zeros(2)
    for step in range(env.tokens * env.layers):
        bits = draw.integers(2, size=(2, env.k))
        wanted = env.wanted()
        there = np.take_along_axis(env.residents(), wanted, 1) | (bits > 0)
        np.put_along_axis(members[:, step // env.layers, step % env.layers], wanted, there, axis=1)
        _, _, _, _, infos = env.step(bits.astype(np.int8))
        quality += infos["reward/quality"]
    ids = torch.from_numpy(env.stepped.passages.ids[env.stepped.streams[env.stream, 0]][:, :-1])
    network = env.stepped.model.network

    def routed(layer: int) -> Any:
        def router(logits: torch.Tensor, generator: Any = None) -> Routing:
            chosen = torch.from_numpy(members[:, :, layer].reshape(-1, env.experts))
            best = torch.zeros_like(chosen).scatter(1, logits.topk(env.k).indices, True)
            odds = logits.softmax(-1)
            weights = torch.where(chosen, odds / (odds * best).sum(-1, keepdim=True), 0)
            return Routing(weights, chosen, RoutingStatistics(logits, chosen, chosen))

        return router

    with torch.inference_mode():
        full = network(ids).logits.log_softmax(-1)
        before = [block.moe.router for block in network.blocks]  # type: ignore[union-attr]
        for layer, block in enumerate(network.blocks):
            block.moe.router = routed(layer)  # type: ignore[union-attr,assignment]
        ours = network(ids).logits.log_softmax(-1)
        for block, router in zip(network.blocks, before, strict=True):
            block.moe.router = router  # type: ignore[union-attr,assignment]
    wanted_quality = -torch.nn.functional.kl_div(ours, full, reduction="none", log_target=True).sum(-1).mean(1)
    np.testing.assert_allclose(quality, wanted_quality, atol=1e-4)


def test_substitutes_lose_less_than_nothing_in_their_place() -> None:
    found = {}
    for fallback in ("substitute", "skip"):
        env = vector(32, fallback=fallback, split="validation")
        found[fallback] = played(env, lambda observation: np.zeros((32, 4), dtype=np.int8), seed=0)
        assert not found[fallback]["loads"].any()
    assert found["skip"]["reward/quality"].mean() < found["substitute"]["reward/quality"].mean() < 0


def test_the_memory_never_holds_more_than_fits_and_masks_tell_what_is_missing() -> None:
    env = vector(5, capacity=3)
    env.reset(seed=0)
    env.action_space.seed(0)
    for _ in range(40):
        missing = ~np.take_along_axis(env.residents(), env.wanted(), 1)
        assert env.action_masks().tolist() == missing.tolist()
        env.step(env.action_space.sample())
        assert env.state()["arrays"]["_resident"].sum(-1).max() <= 3
    learned = vector(5, eviction="learned")
    learned.reset(seed=0)
    assert learned.action_masks().shape == (5, 2 * learned.k + 3)


@pytest.mark.parametrize("source", ["model", "trace"])
def test_learned_eviction_of_one_kind_is_that_rule(source: str) -> None:
    for number, rule in enumerate(("predicted", "lru", "ema")):
        fixed, learned = (vector(3, eviction=each, source=source) for each in (rule, "learned"))
        wanted = played(fixed, everything(fixed), seed=4)
        actions = np.column_stack([np.ones((3, 4), dtype=np.int64), np.full(3, number)])
        found = played(learned, lambda observation, actions=actions: actions, seed=4)
        assert found["loads"].tolist() == wanted["loads"].tolist()


@pytest.mark.parametrize(
    "kwargs",
    [
        {},
        {"eviction": "learned", "capacity": 3},
        {"quality": "log-likelihood"},
        {"source": "trace"},
        {"source": "trace", "eviction": "learned"},
    ],
)
def test_a_row_is_the_same_alone_bit_for_bit(kwargs: dict[str, Any]) -> None:
    env = vector(11, autoreset_mode="SameStep", **kwargs)
    single = gymnasium.make(ID, **SMALL, **kwargs)
    env.action_space.seed(3)
    beside, _ = env.reset(seed=40)
    alone, _ = single.reset(seed=47)
    for _ in range(env.tokens * env.layers):
        np.testing.assert_array_equal(beside[7], alone)
        actions = env.action_space.sample()
        beside, rewards, _, _, infos = env.step(actions)
        alone, reward, ended, _, _ = single.step(actions[7])
        assert rewards[7] == reward
    assert ended
    np.testing.assert_array_equal(infos["final_obs"][7], alone)
    assert not alone.any()


def recorded(rows: int, **kwargs: Any) -> Any:
    return MoEExpertCacheVectorEnv(rows, **{**SMALL, "source": "trace", **kwargs})


def written(path: Path, tokens: int, layers: int = 3, experts: int = 12, k: int = 2) -> np.ndarray:
    """A trace in which a token's experts in the second and third layer follow from those before; returns its requests
    `[T, L, K]`."""
    draw, requests = np.random.default_rng(0), np.zeros((tokens, layers, k), dtype=np.int64)
    for token in range(tokens):
        requests[token, 0] = draw.permutation(experts)[:k]
        for layer in range(1, layers):
            requests[token, layer] = (requests[token, layer - 1] + 3) % experts
    lines = ["# route_trace v1", f"# model=a n_layer={layers} n_expert={experts} n_expert_used={k}"]
    lines += [f"# layer={layer} expert_bytes={1000 * (layer + 1)} dense_bytes=5" for layer in range(layers)]
    lines += ["turn,phase,step,layer,slot,expert"]
    lines += [f"0,1,{t},{layer},{slot},{requests[t, layer, slot]}"
              for t in range(tokens) for layer in range(layers) for slot in range(k)]  # fmt: skip
    path.write_text("\n".join(lines))
    return requests


def test_recorded_routing_loads_what_the_replay_loads() -> None:
    env = recorded(3, eviction="lru", capacity=5, tokens=32)
    found = played(env, nothing(env), options={"stream": [0, 1, 5]})
    model = vector(3, eviction="lru", capacity=5, tokens=32, weights="float32")
    really = played(model, everything(model), options={"stream": [0, 1, 5]})
    assert found["loads"].tolist() == really["loads"].tolist()  # float32: the routing is the same in both
    assert not found["reward/quality"].any()
    np.testing.assert_allclose(found["reward/cost"], found["loads"] / (env.k * env.layers))


def test_loads_in_advance_cost_what_the_layer_does_not_hide() -> None:
    for overlap in (0.0, 1.5):
        env = recorded(4, overlap=overlap)
        env.reset(seed=0)
        env.action_space.seed(1)
        one = env.stepped.loads[0, 1, 0]
        for _ in range(env.tokens * env.layers):
            layer = env._layer.copy()
            *_, infos = env.step(env.action_space.sample())
            ahead = infos["expertcache/prefetched"]
            hidden = (ahead - overlap).clip(0)
            np.testing.assert_allclose(infos["cost/time"], (infos["expertcache/loads"] + hidden) * one, atol=1e-12)
            moved = (infos["expertcache/loads"] + ahead) * env.stepped.expert_bytes[layer]
            np.testing.assert_allclose(infos["cost/memory"], moved)


def test_what_is_loaded_in_advance_is_there_in_the_next_layer() -> None:
    env = recorded(5, capacity=5)
    env.reset(seed=0)
    for _ in range(3 * env.layers):
        candidates, there = env._candidates(env._rows)
        assert env.action_masks().tolist() == there.tolist()
        first = np.zeros((5, env.k), dtype=np.int8)
        first[:, 0] = 1
        *_, infos = env.step(first)
        assert infos["expertcache/prefetched"].tolist() == there[:, 0].tolist()
        assert env.residents()[np.arange(5), candidates[:, 0]].all()
        assert env.state()["arrays"]["_resident"].sum(-1).max() <= 5
    assert recorded(1, capacity=16).reset(seed=0)[0][0, :4].tolist() == [0.0] * 4  # nothing is missing


def test_what_follows_is_predicted_and_loaded_in_advance(tmp_path: Path) -> None:
    requests = written(tmp_path / "a.csv", 400)
    kwargs: dict[str, Any] = {"trace": str(tmp_path / "a.csv"), "capacity": 4, "tokens": 20, "passages": 1}
    env = recorded(2, split="test", overlap=2.0, **kwargs)
    assert env.stepped.streams.shape == (4, 20, 3, 2)
    np.testing.assert_array_equal(env.stepped.streams.reshape(-1, 3, 2), requests[320:])
    assert env.stepped.expert_bytes.tolist() == [1000, 2000, 3000]
    assert env.memory == 4 * 6000
    without = played(env, nothing(env), seed=0)
    likely = played(env, lambda observation: (observation[:, : env.k] > 0.5).astype(np.int8), seed=0)
    assert (likely["hits"] > without["hits"] + 0.3).all()  # two of three layers follow from the one before
    assert (likely["cost/time"] < 0.7 * without["cost/time"]).all()
    known = recorded(2, split="test", overlap=2.0, eviction="belady", **kwargs)
    best = played(known, lambda observation: (observation[:, : env.k] > 0.5).astype(np.int8), seed=0)
    assert (best["hits"] > 0.95).all()
    train = recorded(1, **kwargs).stepped.streams
    assert set(train.ravel()) <= set(requests[:240].ravel())
    np.testing.assert_array_equal(train[0], requests[:20])
    np.testing.assert_array_equal(train[-1], requests[220:240])


def test_predictors_are_fitted_to_tokens_of_their_own(tmp_path: Path) -> None:
    draw, lines = np.random.default_rng(3), ["# route_trace v1", "# model=a n_layer=2 n_expert=16 n_expert_used=2"]
    lines += ["# layer=0 expert_bytes=9 dense_bytes=5", "# layer=1 expert_bytes=9 dense_bytes=5"]
    lines += ["turn,phase,step,layer,slot,expert"]
    for token in range(1500):  # layers do not depend on each other
        lines += [f"0,1,{token},{layer},{slot},{expert}" for layer in range(2)
                  for slot, expert in enumerate(draw.permutation(16)[:2])]  # fmt: skip
    (tmp_path / "a.csv").write_text("\n".join(lines))
    env = recorded(1, trace=str(tmp_path / "a.csv"), tokens=32, passages=2, split="validation")
    env.reset(seed=0)
    chances = []
    for _ in range(env.tokens * env.layers):
        chances.append(env._chance[0].copy())
        env.step(np.zeros((1, 2), dtype=np.int8))
    assert np.abs(np.array(chances)[20:] - 2 / 16).mean() < 0.03  # nothing can be known


@pytest.mark.parametrize("capacity", [1, 2, 4])
def test_one_layer_and_little_memory(capacity: int, tmp_path: Path) -> None:
    written(tmp_path / "a.csv", 60, layers=1, k=3)
    env = recorded(4, trace=str(tmp_path / "a.csv"), capacity=capacity, eviction="lru")
    env.reset(seed=0)
    for _ in range(15):
        (candidates, there), layer = env._candidates(env._rows), env._layer
        assert env.action_masks().tolist() == there.tolist()
        first = candidates[np.arange(4), 0]
        ahead = there[:, 0] & (env.stepped.streams[env.stream, env._token, layer] != first[:, None]).all(1)
        env.step(np.ones((4, 3), dtype=np.int8))
        assert env._resident[np.arange(4), layer, first][ahead].all()  # the most probable stays
    short = recorded(3, tokens=1, passages=1)  # one token: nothing is fitted to a first half
    observation, _ = short.reset(seed=0)
    for _ in range(short.layers):
        assert np.isfinite(observation).all()
        assert (short._resident.sum(2) == 6).all()
        observation, *_ = short.step(np.zeros((3, short.k), dtype=np.int8))


def test_what_is_no_recorded_routing_is_told(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="trace='nothing' cannot be read: No such file"):
        recorded(1, trace="nothing")
    written(tmp_path / "short.csv", 4)
    with pytest.raises(DataError, match="4 tokens are too few for three splits"):
        recorded(1, trace=str(tmp_path / "short.csv"), split="test")
    lines = (tmp_path / "short.csv").read_text().splitlines()
    (tmp_path / "cut.csv").write_text("\n".join(lines[:-1]))
    with pytest.raises(DataError, match="each token must ask for 2 experts in each layer"):
        recorded(1, trace=str(tmp_path / "cut.csv"))
    with pytest.raises(ValueError, match="argument='fallback' is not one of"):
        recorded(1, fallback="skip")
    with pytest.raises(ValueError, match="source='traces' is not one of 'model', 'trace'; did you mean 'trace'"):
        vector(1, source="traces")


def test_streams_are_replayed_and_passages_stand_once_in_a_split() -> None:
    env = vector(2, split="test")
    first, _ = env.reset(seed=1, options={"stream": [4, 9]})
    assert env.stream.tolist() == [4, 9]
    np.testing.assert_array_equal(env.reset(options={"stream": [4, 9]})[0], first)
    assert len(np.unique(env.stepped.streams)) == env.stepped.streams.size
    with pytest.raises(ValueError, match=r"options\['stream'\]=-1: there are"):
        env.reset(options={"stream": -1})


def test_what_is_not_possible_is_told() -> None:
    for wrong in (17, 2.5):
        with pytest.raises(ValueError, match=f"capacity={wrong}: a whole number up to the 16 experts"):
            vector(1, capacity=wrong)
    assert [vector(1, capacity=each).capacity for each in (0.01, 0.375, 1, 16)] == [1, 6, 1, 16]
    with pytest.raises(DataError, match="split 'test' has 704 passages only"):
        vector(1, passages=800, split="test")
