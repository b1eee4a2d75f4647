"""Rules for the number of experts, the oracle, and policies in the model."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from agents.baselines import find, layertopk
from agents.baselines.adak import AdaK, AdaKSettings, trained
from agents.baselines.layertopk import GRIDS, Routed, TopKRule, Tuning, adaptive_k, counted, static
from agents.deploy.layertopk import AdaptiveK
from agents.evaluate import evaluate
from agents.ppo import PPO
from experts import language
from moe_envs.layertopk import MoELayerTopKVectorEnv

ID = "moe_envs:MoELayerTopK-v0"
SMALL = {"tokens": 4}
SEEN = Routed(
    np.log(np.array([[0.6, 0.2, 0.1, 0.05], [0.2, 0.19, 0.18, 0.17]])),
    np.array([0.5, 1.8]), np.array([0, 1]),
)  # fmt: skip
PRICES = np.array([[0.0, 0.01, 0.02, 0.03, 0.04], [0.0, 0.1, 0.2, 0.4, 0.6]])


@pytest.mark.parametrize(
    ("kind", "thresholds", "wanted"),
    [
        ("top-p", [0.7, 0.7], [2, 4]),
        ("top-p", [0.1, 0.3], [1, 2]),
        ("minimum probability", [0.1, 0.18], [3, 3]),
        ("minimum weight", [0.2, 0.25], [2, 2]),
        ("ratio (NAEE)", [0.3, 0.9], [2, 3]),
        ("worth", [0.05, 1.0], [1, 2]),
        ("entropy", [0.5, 1.0], [2, 3]),
    ],
)
def test_rules_by_hand(kind: str, thresholds: list[float], wanted: list[int]) -> None:
    assert counted(kind, thresholds, 16, PRICES)(SEEN).tolist() == wanted


def test_fixed_rules_by_hand() -> None:
    assert static([3, 1])(SEEN).tolist() == [3, 1]
    assert adaptive_k(SEEN).tolist() == [1, 4]


def test_a_rule_costs_and_loses_in_whole_passages_what_it_does_step_by_step() -> None:
    tuning = Tuning({**SMALL, "cost_weight": 0.2}, passages=2)
    rule = tuning.counted("top-p", [0.5, 0.3, 0.6, 0.4])
    loss, cost, experts = tuning.loss(rule)
    env = MoELayerTopKVectorEnv(len(tuning.ids), split="validation", cost_weight=0.2, **SMALL)
    policy = TopKRule(rule)
    policy.watch(env)
    domain = env.stepped.passages.domain
    asked = np.concatenate([np.flatnonzero(domain == each)[:2] for each in np.unique(domain)])
    observation, _ = env.reset(seed=0, options={"passage": asked})
    quality = charged = 0.0
    for _ in range(4 * env.layers):
        observation, _, _, _, infos = env.step(policy.predict(observation)[0])
        quality, charged = quality + infos["reward/quality"], charged + infos["reward/cost"]
    assert np.mean(quality) == pytest.approx(float(env.stepped.model.loss(tuning.ids).mean()) - loss, abs=1e-4)
    assert np.mean(charged) == pytest.approx(cost)
    assert infos["layertopk/experts_used"].mean() == pytest.approx(experts * 4 * env.layers)


@pytest.fixture(scope="module")
def rules() -> dict[str, Any]:
    return find(ID).baselines(ID, report=lambda share: None, passages=1, cost_weight=0.2, **SMALL)


def test_tuned_rules_and_the_oracle(rules: dict[str, Any]) -> None:
    assert len(rules) == 5 + 1 + 2 * len(GRIDS) + 3
    returns = {
        name: evaluate(rule, ID, 64, split="validation", cost_weight=0.2, **SMALL)["return"].mean()
        for name, rule in rules.items()
    }
    oracle = layertopk.bound(ID, passages=1, cost_weight=0.2, **SMALL)
    assert oracle.kind == "bound"
    best = evaluate(oracle, ID, 64, split="validation", cost_weight=0.2, **SMALL)["return"].mean()
    assert best > max(returns.values())
    assert returns["static per layer"] > returns["k = 0"]
    assert max(returns, key=returns.__getitem__) != "random"


def test_under_a_budget_rules_keep_experts_for_later(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layertopk, "MENU", 10)  # of more numbers those on a greedy way are tried
    env = MoELayerTopKVectorEnv(2, budget=1.0, **SMALL)
    observation, _ = env.reset(seed=0)
    greedy, thrifty = TopKRule(static([4] * 4)), TopKRule(static([4] * 4), reserve=1.0)
    for rule, wanted in ((greedy, [4] * 4 + [0] * 12), (thrifty, [1] * 16)):
        rule.watch(env)
        observation, _ = env.reset(seed=0)
        taken = []
        for _ in range(16):
            observation, _, _, _, infos = env.step(rule.predict(observation)[0])
            taken.append(int(infos["layertopk/experts"][0]))
        assert taken == wanted
    budget: Any = {"budget": 1.0, "cost_weight": 0.0, **SMALL}
    rules = find(ID).baselines(ID, report=lambda share: None, passages=2, **budget)
    found = {name: evaluate(rule, ID, 32, split="validation", **budget) for name, rule in rules.items()}
    assert all(frame["layertopk/experts_used"].max() <= 16 for frame in found.values())
    judge = layertopk.Judge(budget, 2)  # where rules are tuned
    returns = {name: judge.score(rule) for name, rule in rules.items()}
    assert returns["worth per layer, paced"] >= returns["k = 4"] > returns["random"]
    assert returns["predicted change of the loss"] > returns["random"]
    with pytest.raises(ValueError, match="keeps experts for later"):
        AdaptiveK(env.stepped.model, thrifty)
    oracle = layertopk.bound(ID, passages=2, **budget)
    assert 3 < len(oracle.menu) <= 1 + 16 * 4
    assert evaluate(oracle, ID, 8, budget=1.0, **SMALL)["layertopk/experts_used"].max() <= 16


def test_a_rule_in_the_model_decides_as_in_whole_passages(rules: dict[str, Any]) -> None:
    model = language.load("language")
    rule = rules["top-p per layer"]
    adaptive = AdaptiveK(model, rule)
    ids = torch.tensor([model.encode("The quick brown fox jumps over the lazy dog. " * 2)])

    def top_p(layer: int, inputs_ND: torch.Tensor, logits_NE: torch.Tensor) -> torch.Tensor:
        odds = logits_NE.softmax(-1).sort(-1, descending=True).values[:, :4]
        return (odds.cumsum(-1) - odds < thresholds[layer]).sum(-1)

    thresholds = [0.3, 0.5, 0.2, 0.6]
    rule = TopKRule(counted("top-p", thresholds, 16, np.zeros((4, 5))))
    by_hand, found = model.loss(ids, k=top_p), model.loss(ids, k=AdaptiveK(model, rule))
    torch.testing.assert_close(found, by_hand)
    assert not torch.allclose(found, model.loss(ids))
    assert model.generate("The", 8, k=adaptive, temperature=0)
    numbers = AdaptiveK(model, TopKRule(static([2, 0, 1, 4])))
    assert numbers.calibrate(ids) == {0: 2, 1: 0, 2: 1, 3: 4}
    one = AdaptiveK(model, lambda layer, inputs, logits: torch.ones(len(logits), dtype=torch.int64))
    torch.testing.assert_close(model.loss(ids, k=one), model.loss(ids, k=1))
    torch.testing.assert_close(model.loss(ids, k=numbers), model.loss(ids, k=[2, 0, 1, 4]))
    predicted = rules["predicted change of the loss"]
    whole, own = (evaluate(predicted, ID, 4, observation=each, **SMALL) for each in ("passage", "token"))
    assert own["return"].tolist() == whole["return"].tolist()
    with pytest.raises(ValueError, match="Predicted decides in its environment only"):
        AdaptiveK(model, rules["predicted change of the loss"])
    with pytest.raises(ValueError, match="takes the policy as k"):
        numbers.active()


def test_a_learner_in_the_model_decides_as_in_its_environment() -> None:
    kwargs = {"observation": "token", **SMALL}
    agent = PPO("MlpPolicy", ID, env_kwargs=kwargs, n_envs=4, n_steps=16, batch_size=32, n_epochs=1, ent_coef=0.1)
    agent.learn(128)
    env = MoELayerTopKVectorEnv(3, split="test", **kwargs)
    observation, _ = env.reset(seed=0)
    ids = env.stepped.passages.ids[env.passage]
    model, taken = env.stepped.model, []
    for _ in range(4 * env.layers):
        actions = agent.predict(observation, deterministic=True)[0]
        taken.append(actions)
        observation, *_ = env.step(actions)
    found: list[torch.Tensor] = []
    adaptive = AdaptiveK(model, agent)

    def watched(layer: int, inputs_ND: torch.Tensor, logits_NE: torch.Tensor) -> torch.Tensor:
        found.append(adaptive(layer, inputs_ND, logits_NE))
        return found[-1]

    model.loss(ids, k=watched)
    decided = torch.stack([each.view(3, 4) for each in found], -1)  # [B, T, L]
    assert decided.permute(1, 2, 0).reshape(16, 3).tolist() == np.stack(taken).tolist()
    other = PPO("MlpPolicy", ID, env_kwargs=SMALL, n_envs=4, n_steps=16, batch_size=32, n_epochs=1)
    with pytest.raises(ValueError, match='observation="token"'):
        AdaptiveK(model, other)
    recurrent = PPO("GruPolicy", ID, env_kwargs=kwargs, n_envs=4, n_steps=16, batch_size=32, n_epochs=1)
    with pytest.raises(ValueError, match="is recurrent"):
        AdaptiveK(model, recurrent)


def test_ada_k_learns_what_experts_are_worth() -> None:
    model = language.load("language")
    env = MoELayerTopKVectorEnv(16, cost_weight=0.2, tokens=16)
    ids = env.stepped.passages.ids
    prices = 0.2 * env.relative_costs() * env.tokens
    found: dict[str, Any] = {}
    for name, factor in (("cheap", 0.0), ("dear", 20.0)):
        settings = AdaKSettings(steps=40, batch_size=8, start_steps=5, learning_rate=1e-2)
        found[name] = AdaK(model).learn(ids, factor * prices, settings)
    experts = {}
    for name in ("cheap", "dear"):
        policy = found[name]
        frame = evaluate(policy, ID, 16, tokens=16)
        experts[name] = frame["layertopk/experts_used"].mean()
        assert model.loss(ids[:2], k=policy).isfinite().all()
    assert experts["dear"] < 0.3 * experts["cheap"]
    tight = AdaK(model).learn(ids, 0 * prices, replace(settings, steps=60, dual_rate=0.02), budget=1.0)
    assert 0.5 < evaluate(tight, ID, 16, tokens=16)["layertopk/experts_used"].mean() / (16 * env.layers) < 1.5
    scores = iter([0.0, 3.0, 1.0, 2.0, 3.0])
    seen = []

    def judge() -> float:
        seen.append(judged.allocators[0].weight.detach().clone())
        return next(scores)

    judged = AdaK(model)
    judged.learn(ids, 0 * prices, replace(settings, steps=4, looks=4), judge=judge)
    assert len(seen) == 5
    assert torch.equal(judged.allocators[0].weight, seen[1])  # the best, and of equal ones the first
    for quality in ("log-likelihood", "divergence"):
        policy = trained(ID, 0, 2, tokens=8, quality=quality)
        found[quality] = [each.weight.detach() for each in policy.allocators]
    assert not torch.equal(found["divergence"][0], found["log-likelihood"][0])


def test_a_policy_in_a_model_of_transformers() -> None:
    pytest.importorskip("transformers", reason="pip install moe-envs[hf]")
    from experts.huggingface import adapt
    from tests.experts.test_huggingface import tiny

    theirs = tiny("Qwen3Moe").requires_grad_(True)
    adaptive = AdaptiveK(adapt(theirs), TopKRule(static([1, 2])))
    ids = torch.randint(60, (2, 9), generator=torch.Generator().manual_seed(1))
    with adaptive.active():
        found = theirs(ids).logits
    with adapt(theirs).choosing([1, 2]):
        torch.testing.assert_close(found, theirs(ids).logits)
    assert adaptive.calibrate(ids) == {0: 1, 1: 2}
