"""The experiments `expertcache` and `expertcache-headroom`."""

from pathlib import Path

import pytest

from benchmarks.experiments import expertcache, expertcache_headroom


def test_rules_are_tuned_once(tmp_path: Path) -> None:
    kwargs = {"tokens": 1, "passages": 1, "capacity": 4}
    first = expertcache.tuned(tmp_path, 1, **kwargs)
    (kept,) = tmp_path.glob("rules-*.json")
    changed = kept.stat().st_mtime_ns
    again = expertcache.tuned(tmp_path, 1, **kwargs)
    assert kept.stat().st_mtime_ns == changed
    assert {name: rule.about for name, rule in again.items()} == {name: rule.about for name, rule in first.items()}
    assert list(again) == list(expertcache.KEPT)


def test_too_many_streams_are_told(tmp_path: Path) -> None:
    setup = expertcache_headroom.CacheHeadroomSetup(tokens=2, passages=1, train=100_000)
    with pytest.raises(ValueError, match="100000 streams: split 'rl_train' has"):
        expertcache_headroom.measure(setup, 0, "test", tmp_path)
