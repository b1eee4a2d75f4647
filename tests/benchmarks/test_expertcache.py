"""Rules of `expertcache` are tuned once; what a choice is worth in `expertcache-headroom`, played again by hand."""

from pathlib import Path

import numpy as np
import pytest

from agents.baselines.expertcache import MinimumWeight
from benchmarks.experiments import expertcache, expertcache_headroom
from moe_envs.expertcache import MoEExpertCacheVectorEnv


def test_rules_are_tuned_once(tmp_path: Path) -> None:
    kwargs = {"tokens": 1, "passages": 1, "capacity": 4}
    first = expertcache.tuned(tmp_path, 1, **kwargs)
    (kept,) = tmp_path.glob("rules-*.json")
    changed = kept.stat().st_mtime_ns
    again = expertcache.tuned(tmp_path, 1, **kwargs)
    assert kept.stat().st_mtime_ns == changed
    assert {name: rule.about for name, rule in again.items()} == {name: rule.about for name, rule in first.items()}
    assert list(again) == list(expertcache.KEPT)


def test_the_worth_of_a_load_is_the_difference_of_two_returns_of_the_token() -> None:
    setup = expertcache_headroom.CacheHeadroomSetup(capacity=4, tokens=3, passages=1)
    found = expertcache_headroom.choices(setup, "validation", 2, np.random.default_rng(0))
    env = MoEExpertCacheVectorEnv(1, split="validation", capacity=4, tokens=3, passages=1, autoreset_mode="Disabled")
    drawn = np.random.default_rng(0).permutation(len(env.stepped.streams))[:2]
    assert found.worth.shape == (3 * env.layers * 2, env.k)
    assert (found.worth != 0).any(0).all()
    rule = MinimumWeight(env.advised())
    rule.watch(env)
    for token, layer, stream, place in ((0, 0, 0, 1), (1, 2, 1, 0), (2, 3, 0, 3), (2, 1, 1, 2)):
        returns = []
        for load in (False, True):
            observation, _ = env.reset(seed=0, options={"stream": int(drawn[stream])})
            total = 0.0
            for step in range((token + 1) * env.layers):
                bits = rule.bits(observation, slice(None))
                if step == token * env.layers + layer:
                    missing = env.action_masks()[0, place]
                    bits[0, place] = load
                observation, reward, *_ = env.step(bits.astype(np.int8))
                total += float(reward[0])
            returns.append(total * env.tokens)
        row = (token * env.layers + layer) * 2 + stream
        assert found.layer[row] == layer
        assert found.worth[row, place] == pytest.approx((returns[1] - returns[0]) * missing, abs=1e-6)


def test_thresholds_take_what_pays() -> None:
    weights = np.array([[0.5, 0.3], [0.5, 0.1], [0.4, 0.2], [0.3, 0.1]])
    worth = np.array([[1.0, -0.2], [1.0, -0.2], [-1.0, 2.0], [0.5, -1.0]])
    nothing = np.zeros((4, 0))
    choices = expertcache_headroom.Choices(nothing, nothing, weights, np.array([0, 0, 1, 1]), worth)
    first, second = expertcache_headroom.thresholds(choices)
    assert 0.3 < first <= 0.5
    assert 0.1 < second <= 0.2


def test_too_many_streams_are_told() -> None:
    setup = expertcache_headroom.CacheHeadroomSetup(tokens=2, passages=1)
    with pytest.raises(ValueError, match="100000 streams: split 'test' has"):
        expertcache_headroom.choices(setup, "test", 100_000, np.random.default_rng(0))
