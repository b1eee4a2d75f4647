"""Replay recorded routing through caches of experts: which policy would have found how many in memory?

Events are atomic: a token's experts of a layer are needed together, so none of them makes room for another.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from experts.offload.eviction import PER_LAYER, Belady, Eviction, Key, make
from experts.offload.traces import Trace

Events = Sequence[tuple[Key, ...]]
SCOPES = ("layer", "global")
Rule = str | Callable[[int, Events], Eviction]


@dataclass(frozen=True)
class Hits:
    """What a replay found: requests, those that were in memory, experts loaded, their bytes."""

    requests: int
    hits: int
    loads: int
    bytes: int

    @property
    def rate(self) -> float:
        """Share of the requests that were in memory."""
        return self.hits / max(1, self.requests)


def replay(trace: Trace, policy: Rule, capacity: float, *, scope: str = "layer", bypass: bool = False) -> Hits:
    """Run a trace through caches that hold the share `capacity` of the experts: one for each layer, or a `global` one.

    `policy` is the name of a rule as `eviction.make` takes it, "belady", or a function of the number of experts that
    fit and of all events that makes one. With `bypass` an expert that was loaded leaves at once if the rule would keep
    all others rather; without, it is kept, and something else leaves.
    """
    if not 0 < capacity <= 1:
        raise ValueError(f"capacity={capacity}: must be a share of the experts above 0, at most 1")
    if scope not in SCOPES:
        raise ValueError(f"scope={scope!r} is not one of {', '.join(SCOPES)}")
    events, alone = _events(trace), scope == "layer"
    size = max(1, round(capacity * trace.num_experts * (1 if alone else trace.layers)))
    hits = loads = loaded = 0
    for layer in range(trace.layers) if alone else [None]:
        places = [place for place, event in enumerate(events) if event and layer in (None, event[0][0])]
        rule = _rule(policy, size, [events[place] for place in places], 1 if alone else trace.layers)
        there: set[Key] = set()
        for place in places:
            missing = _request(rule, there, events[place], size, bypass)
            if trace.counted[place]:
                hits, loads = hits + len(events[place]) - len(missing), loads + len(missing)
                loaded += sum(int(trace.expert_bytes[key[0]]) for key in missing)
    return Hits(trace.requests, hits, loads, loaded)


def _request(rule: Eviction, there: set[Key], event: tuple[Key, ...], size: int, bypass: bool) -> list[Key]:
    """One event, the most important expert first; returns the keys that were not there."""
    rule.begin(event[0][0])
    hits, missing = [key for key in event if key in there], [key for key in event if key not in there]
    for key in reversed(hits):
        rule.hit(key)
    fit = missing if bypass else missing[: size - len(hits)]  # the least important are not kept
    kept = {*hits, *fit}
    for key in reversed(missing):
        rule.miss(key)
        if key not in kept:
            continue
        if len(there) >= size and not bypass:
            _leave(rule, there, rule.victim(key, kept))
        rule.inserted(key)
        there.add(key)
    while len(there) > size:  # a key that came may leave
        _leave(rule, there, rule.victim(missing[-1], ()))
    return missing


def _leave(rule: Eviction, there: set[Key], key: Key) -> None:
    rule.removed(key)
    there.remove(key)


def _events(trace: Trace) -> list[tuple[Key, ...]]:
    return [
        tuple((layer, expert) for expert in experts if expert >= 0)
        for layer, experts in zip(trace.layer.tolist(), trace.experts.tolist(), strict=True)
    ]


def _rule(policy: Rule, size: int, events: Events, layers: int) -> Eviction:
    if callable(policy):
        return policy(size, events)
    if policy == "belady":
        return Belady(size, events)
    return make(policy if layers > 1 else policy.removesuffix(PER_LAYER), size, layers)
