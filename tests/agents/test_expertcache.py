"""Rules for MoEExpertCache-v0, and policies in the offloading runtime."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch

from agents.baselines import find, rollout_classifier
from agents.baselines.expertcache import FINE, Always, MinimumWeight, Prefetch, RuleTuning, bound
from agents.baselines.rollout_classifier import RolloutSettings
from agents.deploy.expertcache import CacheControl, fit_demand, fit_static
from agents.evaluate import evaluate
from agents.ppo import PPO
from experts.language import load
from experts.offload import OffloadedModel
from moe_envs.expertcache import MoEExpertCacheVectorEnv

ID = "moe_envs:MoEExpertCache-v0"
SMALL: dict[str, Any] = {"tokens": 4, "passages": 2}


@pytest.fixture(scope="module")
def rules() -> dict[str, Any]:
    return find(ID).baselines(ID, report=lambda share: None, streams=4, **SMALL)


def test_tuned_rules_and_the_bound(rules: dict[str, Any]) -> None:
    assert len(rules) == 5 + 2 + 6 + 5
    returns = {
        name: evaluate(rule, ID, 32, split="validation", **SMALL)["return"].mean() for name, rule in rules.items()
    }
    best = evaluate(bound(ID, streams=4, **SMALL), ID, 32, split="validation", **SMALL)["return"].mean()
    assert best > max(returns.values())
    assert returns["minimum weight per layer, predicted"] > returns["all loaded, predicted"]
    assert returns["all loaded, predicted"] > returns["nothing loaded"] > returns["nothing loaded or substituted"]
    assert max(returns, key=returns.__getitem__) not in ("at random", "all loaded, static")


class Hill(RuleTuning):
    """Scores that are the highest at `top`, and the rules that were scored."""

    def __init__(self, top: list[float]) -> None:
        self.layers, self.top, self.scored = len(top), np.array(top), list[Any]()

    def scores(self, rules: Sequence[Any]) -> np.ndarray:
        self.scored += [rule.key for rule in rules]
        return np.array([-np.abs(rule.thresholds - self.top).sum() for rule in rules])


def test_thresholds_climb_to_the_top_from_anywhere() -> None:
    hill = Hill([0.22, 0.28, 0.19, 0.13])
    starts = [0.1] * 4, [0.211, 0.273, 0.181, 0.15], [0.7, 0, 1, 0.2]
    found = hill.climbed([MinimumWeight(each, future) for each, future in zip(starts, (0, 0, 0.4), strict=True)])
    assert [rule.thresholds.tolist() for rule in found] == [hill.top.tolist()] * 3
    assert [rule.future for rule in found] == [0, 0, 0.4]
    assert len(set(hill.scored)) == len(hill.scored)  # none twice
    hill.top[1] = 0.3
    assert hill.climbed(found[:1], FINE)[0].thresholds == pytest.approx(hill.top)


def test_rules_by_hand() -> None:
    env = MoEExpertCacheVectorEnv(6, **SMALL)
    observation, _ = env.reset(seed=0)
    layout = env.observation_layout
    rule = MinimumWeight([0.3] * 4)
    rule.watch(env)
    assert rule.predict(observation)[0].tolist() == (observation[:, layout["weights"].slice] >= 0.3).tolist()
    rule = MinimumWeight([0.3] * 4, future=0.5)
    rule.watch(env)
    worth = observation[:, layout["weights"].slice] + 0.5 * observation[:, layout["gain"].slice]
    assert rule.predict(observation)[0].tolist() == (worth >= 0.3).tolist()


def test_rules_for_recorded_routing() -> None:
    kwargs: dict[str, Any] = {"source": "trace", "tokens": 16, "passages": 2}
    rules = find(ID).baselines(ID, report=lambda share: None, streams=4, **kwargs)
    assert len(rules) == 5 + 3 + 3 + 1
    rules["bound"] = bound(ID, streams=4, **kwargs)
    returns = {
        name: evaluate(rule, ID, 32, split="validation", **kwargs)["return"].mean() for name, rule in rules.items()
    }
    best = "most probable, predicted"
    assert max(returns, key=returns.__getitem__) == "bound"
    assert returns[best] == max(value for name, value in returns.items() if name != "bound")
    assert returns["nothing in advance, predicted"] > returns["nothing in advance, static"] > returns["at random"]


def test_rules_are_tuned_on_whole_episodes() -> None:
    whole, cut = (bound(ID, streams=2, **SMALL, **more) for more in ({}, {"max_episode_steps": 3}))
    assert isinstance(whole, MinimumWeight)
    assert isinstance(cut, MinimumWeight)
    assert whole.key == cut.key


def test_what_rules_load_in_advance() -> None:
    env: Any = MoEExpertCacheVectorEnv(6, source="trace", capacity=2, **SMALL)
    env.reset(seed=0)
    for _ in range(env.layers + 1):
        observation, *_ = env.step(np.zeros((6, env.k), dtype=np.int8))
    chance, again = (observation[:, env.observation_layout[name].slice] for name in ("chance", "again"))
    assert (np.diff(chance) <= 0).all()
    assert 0 < again.mean() < 1
    for rule, wanted in (
        (Prefetch(0), np.zeros_like(chance, dtype=bool)),
        (Prefetch(2), (chance > 0) & (np.arange(env.k) < 2)),
        (Prefetch(env.k, 0.2), chance >= 0.2),
        (Prefetch(env.k, again=True), again > 0),
    ):
        rule.watch(env)
        assert rule.predict(observation)[0].tolist() == wanted.tolist()


def test_a_policy_in_the_runtime_does_what_it_does_in_the_environment(rules: dict[str, Any]) -> None:
    kwargs = {**SMALL, "passages": 1, "weights": "int8", "split": "test"}
    learner = PPO("MlpPolicy", ID, env_kwargs=SMALL, n_envs=2, seed=1, n_steps=4, batch_size=8)
    makers = {
        "rule": rules["minimum weight per layer, predicted"],
        "bias": rules["bias towards memory"],
        "PPO": learner,
        "classifier": rollout_classifier.trained(ID, 0, RolloutSettings(streams=2), **SMALL),
    }
    for maker in makers.values():
        env = MoEExpertCacheVectorEnv(1, **kwargs, quality="log-likelihood")
        if hasattr(maker, "watch"):
            maker.watch(env)
        observation, _ = env.reset(seed=0, options={"stream": 3})
        quality = 0.0
        for _ in range(env.tokens * env.layers):
            observation, _, _, _, infos = env.step(maker.predict(observation, deterministic=True)[0])
            quality += float(infos["reward/quality"][0])
        loads = float(infos["expertcache/loads_per_token"][0]) * env.tokens
        ids = torch.from_numpy(env.stepped.passages.ids[env.stepped.streams[3]])
        full = float(env.stepped.model.loss(ids).mean())
        model = load("language")
        control = CacheControl(maker, model, env.capacity, env.stepped.demand)
        with OffloadedModel(model, env.memory, control, weights="int8") as offloaded:
            before = offloaded.statistics()["loads"]
            assert before == env.capacity * env.layers
            cache, losses = model.network.cache(1, size=env.tokens), []
            for place in range(env.tokens):
                with torch.inference_mode():
                    logits = model.network(ids[:, place : place + 1], None, cache).logits[:, 0]
                losses.append(float(torch.nn.functional.cross_entropy(logits, ids[:, place + 1])))
                assert len(offloaded.pool.resident) <= env.capacity * env.layers
            assert offloaded.statistics()["loads"] - before == loads
        assert full - np.mean(losses) == pytest.approx(quality, abs=2e-4)


def test_requests_are_counted_and_memory_that_is_too_small_leaves_the_model_as_it_was() -> None:
    model, ids = load("language"), torch.arange(20)[None] + 100
    demand = fit_demand(model, ids)
    with torch.inference_mode():
        wanted = model.network(ids).logits
    with pytest.raises(ValueError, match="memory=2000000: the policy keeps experts of 14,155,776 bytes"):
        OffloadedModel(model, 2_000_000, CacheControl(Always(True), model, 6, demand))
    with pytest.raises(ValueError, match="prefetch is for rules of eviction"):
        OffloadedModel(model, 15_000_000, CacheControl(Always(True), model, 6, demand), prefetch="last")
    with torch.inference_mode():
        assert torch.equal(model.network(ids).logits, wanted)
    with OffloadedModel(model, 15_000_000, CacheControl(Always(True), model, 6, demand)) as offloaded:
        assert offloaded.statistics()["requests"] == 0
        with torch.inference_mode():
            model.network(ids[:, :1])
        found = offloaded.statistics()
        assert (found["requests"], found["loads"] - 24) == (16, 16 - found["hits"])
        with pytest.raises(ValueError, match="takes neither k nor allowed"):
            model.network(ids, 2)


def test_the_static_rule_keeps_what_is_asked_for_most() -> None:
    model, ids = load("language"), torch.arange(40)[None] + 100
    with torch.inference_mode():
        asked = [each.members.sum(0) for each in model.network(ids).routing]
    rule = fit_static(model, ids)(32)
    for expert in range(8):
        rule.inserted((1, expert))
    least = min(range(8), key=lambda expert: int(asked[1][expert]))
    assert int(asked[1][rule.victim((1, 9), ())[1]]) == int(asked[1][least]) < int(asked[1][:8].max())


def test_a_prompt_gets_all_that_it_asks_for() -> None:
    model, ids = load("language"), torch.arange(40)[None] + 100
    with torch.inference_mode():
        wanted = model.network(ids).logits
        demand = fit_demand(model, ids)
        control = CacheControl(Always(False), model, 2, demand)
        with OffloadedModel(model, 8 * 600_000, control) as offloaded:
            found = model.network(ids).logits
            assert len(offloaded.pool.resident) <= 8
    torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4)


def test_another_policy_is_told() -> None:
    model = load("language")
    demand = fit_demand(model, torch.arange(40)[None] + 100)
    with pytest.raises(ValueError, match="capacity=0: must be from 1 to 16"):
        CacheControl(Always(True), model, 0, demand)
    with pytest.raises(ValueError, match="eviction='belady' is not one of 'predicted', 'lru'"):
        CacheControl(Always(True, eviction="belady"), model, 4, demand)
    other = PPO("MlpPolicy", ID, env_kwargs={**SMALL, "eviction": "learned"}, n_envs=1, n_steps=4, batch_size=4)
    with pytest.raises(ValueError, match="must be trained in MoEExpertCache-v0 without learned eviction"):
        CacheControl(other, model, 4, demand)


@pytest.mark.parametrize("source", ["model", "trace"])
def test_a_policy_with_learned_eviction_starts_by_predicted_demand(source: str) -> None:
    returns = []
    for eviction in ("predicted", "learned"):
        kwargs = {**SMALL, "source": source, "capacity": 3, "eviction": eviction}
        sizes = {"equivariant": True, "residual": True, "net_arch": [8]}
        policy = PPO("MlpPolicy", ID, env_kwargs=kwargs, n_envs=2, n_steps=4, batch_size=4, policy_kwargs=sizes)
        for name in {"policy.weight", "extra.weight"} & policy.network.weights.keys():
            policy.network.weights[name][:] = 0
        returns.append(evaluate(policy, ID, 8, **kwargs)["return"].tolist())
        policy.learn(16)
        assert np.isfinite(policy.network.flat.numpy()).all()
    assert returns[0] == returns[1]
    assert len(set(returns[0])) > 1


def test_rules_for_recorded_routing_decide_nothing_in_the_runtime() -> None:
    model = load("language")
    demand = fit_demand(model, np.random.default_rng(0).integers(2048, size=(2, 8)))
    with pytest.raises(ValueError, match="a rule for recorded routing"):
        CacheControl(Prefetch(1), model, 6, demand)
