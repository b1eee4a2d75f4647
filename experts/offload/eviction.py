"""What leaves a full cache of experts: rules, which know the past only, and Belady's, which is told the future.

A rule keeps its own notes. Its cache calls, for each key of an event, `hit` or `miss`, for each that must leave
`victim` and `removed`, and for each that comes `inserted`. Keys are (layer, expert).
"""

from __future__ import annotations

import math
from collections import Counter, OrderedDict, defaultdict
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from contextlib import suppress

import numpy as np

Key = tuple[int, int]  # layer, expert


class AllKept(LookupError):
    """No key may leave."""


class Eviction:
    """A rule for a cache of `capacity` keys."""

    def __init__(self, capacity: int) -> None:
        self.capacity, self.now = capacity, 0
        self.passed, self.layer = 0, -1  # passes through the layers, and the present layer

    def begin(self, layer: int) -> None:
        """An event of a layer begins."""
        self.passed += layer <= self.layer
        self.now, self.layer = self.now + 1, layer

    def hit(self, key: Key) -> None:
        """A key that is there was asked for."""

    def miss(self, key: Key) -> None:
        """A key that is not there was asked for."""

    def inserted(self, key: Key) -> None:
        """A key came."""
        raise NotImplementedError

    def victim(self, incoming: Key, kept: Container[Key]) -> Key:
        """The key that leaves for another one; none of those that must be kept. `AllKept` if all must be."""
        raise NotImplementedError

    def removed(self, key: Key) -> None:
        """A key left."""
        raise NotImplementedError


class LRU(Eviction):
    """The least recently used."""

    def __init__(self, capacity: int) -> None:
        super().__init__(capacity)
        self.order: OrderedDict[Key, None] = OrderedDict()

    def hit(self, key: Key) -> None:
        self.order.move_to_end(key)

    def inserted(self, key: Key) -> None:
        self.order[key] = None

    def victim(self, incoming: Key, kept: Container[Key]) -> Key:
        return _first(self.order, kept)

    def removed(self, key: Key) -> None:
        del self.order[key]


class _Scored(Eviction):
    """The lowest score leaves; of equal ones the least recently used. The order of scores changes by use only."""

    def __init__(self, capacity: int) -> None:
        super().__init__(capacity)
        self.there: set[Key] = set()
        self.rank: dict[Key, tuple[float, int, Key]] = {}

    def score(self, key: Key) -> float:
        raise NotImplementedError

    def used(self, key: Key) -> None:
        """A key was asked for."""
        self.rank[key] = self.score(key), self.now, key

    def hit(self, key: Key) -> None:
        self.used(key)

    def miss(self, key: Key) -> None:
        self.used(key)

    def inserted(self, key: Key) -> None:
        self.there.add(key)
        if key not in self.rank:
            self.rank[key] = self.score(key), self.now, key

    def victim(self, incoming: Key, kept: Container[Key]) -> Key:
        free = [self.rank[key] for key in self.there if key not in kept]
        if not free:
            raise AllKept
        return min(free)[2]

    def removed(self, key: Key) -> None:
        self.there.remove(key)


class LFU(_Scored):
    """The least often used, counted since the beginning."""

    def __init__(self, capacity: int) -> None:
        super().__init__(capacity)
        self.count: Counter[Key] = Counter()

    def used(self, key: Key) -> None:
        self.count[key] += 1
        super().used(key)

    def score(self, key: Key) -> float:
        return self.count[key]


class LRFU(_Scored):
    """Between the two: each use counts half after `half_life` tokens, passes through the layers (Lee et al. 2001)."""

    def __init__(self, capacity: int, half_life: float = 32.0) -> None:
        super().__init__(capacity)
        self.half_life, self.weight, self.used_in = half_life, defaultdict[Key, float](float), dict[Key, int]()

    def used(self, key: Key) -> None:
        age = self.passed - self.used_in.get(key, self.passed)
        self.weight[key] = self.weight[key] * float(0.5 ** (age / self.half_life)) + 1
        self.used_in[key] = self.passed
        super().used(key)

    def score(self, key: Key) -> float:
        """The logarithm of the weight at a common time, so that the order holds as time goes on."""
        weight = self.weight[key]
        return math.log2(weight) + self.used_in[key] / self.half_life if weight else -math.inf


class ARC(Eviction):
    """Two queues, of keys used once and used again, whose sizes follow what was missed lately (Megiddo, Modha 2003)."""

    def __init__(self, capacity: int) -> None:
        super().__init__(capacity)
        self.once, self.again, self.left_once, self.left_again = (OrderedDict[Key, None]() for _ in range(4))
        self.aim = 0.0  # size of the first queue

    def hit(self, key: Key) -> None:
        (self.once if key in self.once else self.again).pop(key)
        self.again[key] = None

    def miss(self, key: Key) -> None:
        once, again = len(self.left_once), len(self.left_again)
        if key in self.left_once:
            self.aim = min(self.capacity, self.aim + max(1, again / once))
        elif key in self.left_again:
            self.aim = max(0, self.aim - max(1, once / again))

    def inserted(self, key: Key) -> None:
        known = key in self.left_once or key in self.left_again
        self.left_once.pop(key, None)
        self.left_again.pop(key, None)
        (self.again if known else self.once)[key] = None
        while len(self.once) + len(self.left_once) > self.capacity and self.left_once:
            self.left_once.popitem(last=False)
        queues = self.once, self.again, self.left_once, self.left_again
        while sum(map(len, queues)) > 2 * self.capacity and self.left_again:
            self.left_again.popitem(last=False)

    def victim(self, incoming: Key, kept: Container[Key]) -> Key:
        size = len(self.once)
        first = size and (size > self.aim or (incoming in self.left_again and size == self.aim))
        queues = (self.once, self.again) if first else (self.again, self.once)
        for queue in queues:
            for key in queue:
                if key not in kept:
                    return key
        raise AllKept

    def removed(self, key: Key) -> None:
        if key in self.once:
            del self.once[key]
            self.left_once[key] = None
        else:
            del self.again[key]
            self.left_again[key] = None


class SIEVE(Eviction):
    """A queue and a hand that goes from the oldest to the newest, sparing once what was used since (Zhang et al.
    2024)."""

    def __init__(self, capacity: int) -> None:
        super().__init__(capacity)
        self.queue: list[Key] = []  # the oldest first
        self.visited: set[Key] = set()
        self.hand = 0

    def hit(self, key: Key) -> None:
        self.visited.add(key)

    def inserted(self, key: Key) -> None:
        self.queue.append(key)

    def victim(self, incoming: Key, kept: Container[Key]) -> Key:
        for _ in range(2 * len(self.queue)):
            self.hand %= len(self.queue)
            key = self.queue[self.hand]
            if key not in kept and key not in self.visited:
                return key
            if key not in kept:
                self.visited.remove(key)
            self.hand += 1
        raise AllKept

    def removed(self, key: Key) -> None:
        place = self.queue.index(key)
        del self.queue[place]
        self.hand -= place < self.hand
        if self.hand == len(self.queue):
            self.hand = 0
        self.visited.discard(key)


class LeastStale(Eviction):
    """For a cache of all layers: an expert that was not used since the pass before the present one leaves first; of
    several, the one whose layer comes again latest (after the idea of Hoang et al. 2026). For one layer it is LRU."""

    def __init__(self, capacity: int) -> None:
        super().__init__(capacity)
        self.order: OrderedDict[Key, int] = OrderedDict()  # the pass of the last use

    def hit(self, key: Key) -> None:
        self.order[key] = self.passed
        self.order.move_to_end(key)

    def inserted(self, key: Key) -> None:
        self.order[key] = self.passed

    def victim(self, incoming: Key, kept: Container[Key]) -> Key:
        free = [key for key in self.order if key not in kept]
        if not free:
            raise AllKept
        return max(free, key=lambda key: (self.order[key] < self.passed - 1, (key[0] - self.layer - 1) % 10**6))

    def removed(self, key: Key) -> None:
        del self.order[key]


class Static(_Scored):
    """Scores of all keys that do not change, e.g. how often each was asked for in another trace."""

    def __init__(self, capacity: int, scores: Mapping[Key, float]) -> None:
        super().__init__(capacity)
        self.scores = scores

    def score(self, key: Key) -> float:
        return self.scores[key]


class Random(Eviction):
    """Any key."""

    def __init__(self, capacity: int, seed: int = 0) -> None:
        super().__init__(capacity)
        self.there: dict[Key, None] = {}
        self.random = np.random.default_rng(seed)

    def inserted(self, key: Key) -> None:
        self.there[key] = None

    def victim(self, incoming: Key, kept: Container[Key]) -> Key:
        free = [key for key in self.there if key not in kept]
        if not free:
            raise AllKept
        return free[int(self.random.integers(len(free)))]

    def removed(self, key: Key) -> None:
        del self.there[key]


class Belady(_Scored):
    """What is needed again latest (Belady 1966); it is given all `events` beforehand."""

    def __init__(self, capacity: int, events: Sequence[Iterable[Key]]) -> None:
        super().__init__(capacity)
        self.future: dict[Key, list[int]] = defaultdict(list)
        for number in range(len(events) - 1, -1, -1):
            for key in events[number]:
                self.future[key].append(number + 1)

    def score(self, key: Key) -> float:
        """Minus the event in which it is needed next."""
        places = self.future.get(key, [])
        while places and places[-1] <= self.now:
            places.pop()
        return -float(places[-1]) if places else -np.inf


class PerLayer(Eviction):
    """A rule for each layer, with an equal share of the room. The layer that is most above its share gives way first;
    what a layer does not use, others may."""

    def __init__(self, capacity: int, layers: int, rule: Callable[[int], Eviction]) -> None:
        super().__init__(capacity)
        self.shares = [capacity // layers + (layer < capacity % layers) for layer in range(layers)]
        self.rules = [rule(max(1, share)) for share in self.shares]
        self.sizes = [0] * layers

    def begin(self, layer: int) -> None:
        super().begin(layer)
        self.rules[layer].begin(layer)

    def hit(self, key: Key) -> None:
        self.rules[key[0]].hit(key)

    def miss(self, key: Key) -> None:
        self.rules[key[0]].miss(key)

    def inserted(self, key: Key) -> None:
        self.sizes[key[0]] += 1
        self.rules[key[0]].inserted(key)

    def victim(self, incoming: Key, kept: Container[Key]) -> Key:
        above = [size - share for size, share in zip(self.sizes, self.shares, strict=True)]
        for layer in sorted(range(len(above)), key=lambda layer: (-above[layer], layer != incoming[0])):
            with suppress(AllKept):
                return self.rules[layer].victim(incoming, kept)
        raise AllKept

    def removed(self, key: Key) -> None:
        self.sizes[key[0]] -= 1
        self.rules[key[0]].removed(key)


RULES: dict[str, type[Eviction]] = {
    "lru": LRU, "lfu": LFU, "lrfu": LRFU, "arc": ARC, "sieve": SIEVE, "least-stale": LeastStale, "random": Random,
}  # fmt: skip


PER_LAYER = "-per-layer"


def make(name: str, capacity: int, layers: int) -> Eviction:
    """A rule by name, for all layers together or, with "-per-layer" appended, for each; raises `ValueError` for
    another one."""
    rule = RULES.get(name.removesuffix(PER_LAYER))
    if rule is None:
        raise ValueError(
            f"policy={name!r} is not one of {', '.join(RULES)}, or one of them with {PER_LAYER!r} appended"
        )
    return PerLayer(capacity, layers, rule) if name.endswith(PER_LAYER) else rule(capacity)


def _first(order: Iterable[Key], kept: Container[Key]) -> Key:
    for key in order:
        if key not in kept:
            return key
    raise AllKept
