"""Rollout classification: what a choice is worth, played again by hand, and what is learned from it."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from agents.baselines import rollout_classifier
from agents.baselines.expertcache import ID, MinimumWeight
from agents.baselines.rollout_classifier import (
    LoadChoices,
    MinusWorth,
    RolloutClassifier,
    RolloutSettings,
    best_thresholds,
    choices,
    fitted,
    trained,
)
from agents.deploy.expertcache import control_of_run
from agents.evaluate import evaluate
from experts.language import load
from experts.offload import OffloadedModel
from moe_envs.expertcache import MoEExpertCacheVectorEnv

KWARGS = {"capacity": 4, "tokens": 3, "passages": 1}
SMALL = RolloutSettings(streams=6, networks=2)


def test_the_worth_of_a_load_is_the_difference_of_two_returns_of_the_token() -> None:
    kwargs = {**KWARGS, "split": "validation"}
    env = MoEExpertCacheVectorEnv(1, autoreset_mode="Disabled", **kwargs)
    rule, streams = MinimumWeight(env.advised()), np.array([5, 2])
    found = choices(kwargs, rule, streams)
    assert found.worth.shape == (3 * env.layers * 2, env.k)
    assert (found.worth != 0).any(0).all()
    rule.watch(env)
    for token, layer, stream, place in ((0, 0, 0, 1), (1, 2, 1, 0), (2, 3, 0, 3), (2, 1, 1, 2)):
        returns = []
        for load_it in (False, True):
            observation, _ = env.reset(seed=0, options={"stream": int(streams[stream])})
            total = 0.0
            for step in range((token + 1) * env.layers):
                bits = rule.bits(observation, slice(None))
                if step == token * env.layers + layer:
                    missing = env.action_masks()[0, place]
                    bits[0, place] = load_it
                observation, reward, *_ = env.step(bits.astype(np.int8))
                total += float(reward[0])
            returns.append(total * env.tokens)
        row = (token * env.layers + layer) * 2 + stream
        assert found.layer[row] == layer
        assert found.worth[row, place] == pytest.approx((returns[1] - returns[0]) * missing, abs=1e-6)


def test_thresholds_take_what_pays() -> None:
    weights = np.array([[0.5, 0.3], [0.5, 0.1], [0.4, 0.2], [0.3, 0.1]])
    worth = np.array([[1.0, -0.2], [1.0, -0.2], [-1.0, 2.0], [0.5, -1.0]])
    first, second = best_thresholds(_choices_of(weights, np.array([0, 0, 1, 1]), worth))
    assert 0.3 < first <= 0.5
    assert 0.1 < second <= 0.2


def test_it_learns_what_thresholds_cannot_see() -> None:
    random = np.random.default_rng(0)

    def drawn() -> LoadChoices:
        weights = random.random((3000, 2))
        seen = np.hstack([weights, random.standard_normal((3000, 1))]).astype(np.float32)
        worth = np.where(seen[:, 2:] > 0, 1.0, -1.0) * np.ones_like(weights)
        return _choices_of(weights, np.zeros(3000, dtype=np.int64), worth)._replace(seen=seen)

    train, stop, test = drawn(), drawn(), drawn()
    rule = RolloutClassifier(*fitted(train, stop, lambda part: part.seen, 1, 0))
    loads = rule.logits_of(test.seen, test.weights, test.layer) > 0
    assert (loads * test.worth).sum() > 0.8 * test.worth.clip(0).sum()
    thresholds = test.weights >= best_thresholds(train)[0]
    assert (thresholds * test.worth).sum() < 0.2 * test.worth.clip(0).sum()


def test_the_loss_is_minus_what_is_gained() -> None:
    answers = torch.tensor([[0.0, 100.0]])
    given = torch.tensor([[2.0, 3.0, 100.0, -200.0]])  # worths, logits of thresholds
    assert float(MinusWorth()(answers, given)) == pytest.approx(-2.0)


def test_it_repeats_and_is_saved_and_decides_in_the_runtime(tmp_path: Path) -> None:
    first, again = (trained(ID, 3, SMALL, **KWARGS, eviction="ema", fallback="skip") for _ in range(2))
    for one, other in zip(first.networks, again.networks, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))
    assert not torch.equal(next(first.networks[0].parameters()), next(first.networks[1].parameters()))
    model = load("language")
    ids = np.array([model.encode("In the beginning was the word")])
    first.save(tmp_path / "saved")
    control = control_of_run(tmp_path / "saved", model, 4_000_000, "int4", ids)
    loaded = control.policy
    assert (loaded.made, loaded.env_kwargs) == (first.made, {"eviction": "ema", "fallback": "skip"})
    given = np.random.default_rng(0).random((5, 48), dtype=np.float32), np.full((5, 4), 0.3), np.arange(5) % 4
    assert (loaded.logits_of(*given) == first.logits_of(*given)).all()
    with OffloadedModel(model, memory=4_000_000, policy=control, weights="int4") as offloaded:
        assert model.generate("In the", 4)
        assert offloaded.statistics()["requests"] > 0


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"source": "trace"}, "choices are taken both ways with a model"),
        ({"eviction": "learned"}, "eviction='learned' is not one of 'predicted'"),
        ({"eviction": "belady"}, "eviction='belady' is not one of 'predicted'"),
        ({"passages": 1000, "tokens": 2}, "share no passage with the 1 that stop the training"),
    ],
)
def test_what_cannot_be_taken_both_ways_is_told(kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        trained(ID, 0, SMALL, **kwargs)


def test_what_a_load_is_worth_later_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[LoadChoices] = []
    monkeypatch.setattr(rollout_classifier, "fitted", lambda *given: (seen.extend(given[:2]), (np.zeros(4), []))[1])
    for eviction in ("predicted", "static"):
        trained(ID, 0, replace(SMALL, rounds=1), **KWARGS, eviction=eviction)
    env = MoEExpertCacheVectorEnv(1, **KWARGS)
    gain = seen[0].seen[:, env.observation_layout["gain"].slice]
    assert (gain > 0).any()
    assert (gain < 0).any()
    rule, streams = MinimumWeight(env.advised()), np.random.default_rng(0).permutation(len(env.stepped.streams))[:1]
    plain = choices({**KWARGS, "split": "rl_train"}, rule, streams).worth
    own = seen[1].seen[:, env.observation_layout["gain"].slice]
    assert seen[1].worth == pytest.approx(plain + 2 * env.price() * own.clip(0))
    still = choices({**KWARGS, "split": "rl_train", "eviction": "static"}, rule, streams).worth
    assert (seen[3].worth == still).all()


def test_a_round_follows_what_was_learned_before_and_keeps_its_choices(monkeypatch: pytest.MonkeyPatch) -> None:
    rules, counts = list[tuple[Any, list[int]]](), list[list[int]]()

    def played(env_kwargs: dict[str, Any], rule: Any, streams: np.ndarray) -> LoadChoices:
        rules.append((rule, streams.tolist()))
        return choices(env_kwargs, rule, streams)

    def learned(train: LoadChoices, stop: LoadChoices, *rest: Any) -> Any:
        counts.append([len(train.layer), len(stop.layer)])
        return fitted(train, stop, *rest)

    monkeypatch.setattr(rollout_classifier, "choices", played)
    monkeypatch.setattr(rollout_classifier, "fitted", learned)
    found = trained(ID, 0, replace(SMALL, rounds=3), **KWARGS)
    kinds = [type(rule) for rule, _ in rules]
    assert kinds == [MinimumWeight] * 2 + [RolloutClassifier] * 4
    assert rules[2][0] is rules[3][0] is not rules[4][0] is not found
    read = [stream for _, streams in rules[::2] for stream in streams]
    assert len(set(read)) == 15
    assert rules[1][1] == rules[3][1] == rules[5][1]
    assert counts == [[12 * 5 * place, 12 * place] for place in (1, 2, 3)]


def _choices_of(weights: np.ndarray, layer: np.ndarray, worth: np.ndarray) -> LoadChoices:
    nothing = np.zeros((len(layer), 0))
    return LoadChoices(nothing, nothing, nothing, weights, layer, worth)


def test_a_classifier_of_another_problem_is_told() -> None:
    policy = trained(ID, 0, SMALL, **KWARGS)
    policy.thresholds = policy.thresholds[:2]
    with pytest.raises(ValueError, match="48 observed numbers, 4 experts of a token and 2 layers, not 48, 4 and 4"):
        evaluate(policy, ID, 2, **KWARGS)
