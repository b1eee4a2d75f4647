"""Experts in memory within a budget of bytes; the others are read when they are asked for."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Container, Iterable
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass, replace

import torch

from experts.offload.eviction import AllKept, Eviction, Key, make
from experts.offload.store import ExpertFile, OffloadError

READERS = 2


@dataclass
class Statistics:
    """What a pool did: events (a layer of a call), tokens, requests and those found in memory or on their way there
    (`hits`), experts loaded, those loaded ahead and of these used, bytes read, and seconds that were waited for."""

    events: int = 0
    tokens: int = 0
    requests: int = 0
    hits: int = 0
    loads: int = 0
    prefetched: int = 0
    prefetched_used: int = 0
    bytes: int = 0
    wait_s: float = 0.0

    def summary(self) -> dict[str, float]:
        """The counts, with hit rate, prefetch accuracy, and bytes and seconds a token."""
        tokens = max(1, self.tokens)
        return asdict(self) | {
            "hit_rate": self.hits / max(1, self.requests),
            "prefetch_accuracy": self.prefetched_used / max(1, self.prefetched),
            "bytes_per_token": self.bytes / tokens,
            "wait_s_per_token": self.wait_s / tokens,
        }


class ExpertPool:
    """At most `memory` bytes of experts of a file, by an eviction rule; beside them, what is being read. Threads may
    share it.

    Raises `ValueError` where not even one expert fits.
    """

    def __init__(self, file: ExpertFile, memory: int, rule: str | Callable[[int], Eviction] = "lru") -> None:
        own = file.header
        self.file, self.each = file, file.size(0, 0)
        self.capacity = min(fitting(memory, self.each), own.layers * own.num_experts)
        self.rule = make(rule, self.capacity, own.layers) if isinstance(rule, str) else rule(self.capacity)
        self.counts, self.closed = Statistics(), False
        self._there: dict[Key, Future[torch.Tensor]] = {}
        self._ahead: set[Key] = set()  # loaded before they were asked for, and not asked for yet
        self._lock, self._readers = threading.Lock(), ThreadPoolExecutor(READERS, "experts")

    def close(self) -> None:
        """Stop the readers and let the experts go; the file is the caller's."""
        with self._lock:
            self.closed = True
            self._there.clear()
        self._readers.shutdown(cancel_futures=True)

    @property
    def resident(self) -> set[Key]:
        """Experts in memory, or on their way there."""
        with self._lock:
            return set(self._there)

    def residents_of(self, layer: int) -> set[int]:
        """Experts of a layer in memory, or on their way there."""
        with self._lock:
            return {expert for where, expert in self._there if where == layer}

    def statistics(self) -> Statistics:
        """Counts so far."""
        with self._lock:
            return replace(self.counts)

    def take(self, layer: int, experts: Iterable[int], tokens: int = 0) -> dict[int, torch.Tensor]:
        """The bytes of experts of a layer, which are needed at once; the most important first.

        Those that do not fit beside the others, the least important, are not among them: `once` reads them.
        """
        keys, begun = [(layer, expert) for expert in experts], time.perf_counter()
        with self._lock:
            self._require_open()
            found = self._request(layer, keys, tokens)
        self._settle(found.values())
        with self._lock:
            self.counts.wait_s += time.perf_counter() - begun
            self._forget_failed(keys)
        return {expert: raw for (_, expert), raw in self._answers(found).items()}

    def fill(self, keys: Iterable[Key]) -> None:
        """Load experts without counting requests, as many as fit, and wait for them."""
        with self._lock:
            self._require_open()
            for key in keys:
                if key not in self._there and len(self._there) < self.capacity:
                    self._load(key)
            found = dict(self._there)
        self._settle(found.values())
        self._answers(found)

    def exchange(
        self, layer: int, experts: Iterable[int], stay: Container[int], requests: int, tokens: int = 0
    ) -> dict[int, torch.Tensor]:
        """The bytes of experts of a layer, and from now on only those that `stay` are in memory, whatever the rule;
        `requests` is how many were asked for. Raises `ValueError` where more stay than fit."""
        keys, begun = [(layer, expert) for expert in experts], time.perf_counter()
        with self._lock:
            self._require_open()
            self._forget_failed(keys)
            after = {key for key in {*self._there, *keys} if key[0] != layer or key[1] in stay}
            if len(after) > self.capacity:
                raise ValueError(f"{len(after)} experts are to stay, {self.capacity} fit")
            counts = self.counts
            counts.events, counts.tokens = counts.events + 1, counts.tokens + tokens
            counts.requests += requests
            self.rule.begin(layer)
            for key in self._there.keys() - after - set(keys):
                self._drop(key)
            for key in keys:
                if key in self._there:
                    self.rule.hit(key)
                    counts.hits += 1
                else:
                    self.rule.miss(key)
                    self._load(key)
            found = {key: self._there[key] for key in keys}
            for key in set(keys) - after:
                self._drop(key)
        self._settle(found.values())
        with self._lock:
            self.counts.wait_s += time.perf_counter() - begun
            self._forget_failed(keys)
        return {expert: raw for (_, expert), raw in self._answers(found).items()}

    def once(self, layer: int, expert: int) -> torch.Tensor:
        """Read an expert that did not fit, and do not keep it."""
        begun = time.perf_counter()
        with self._lock:
            self._require_open()
        raw = self._read((layer, expert))
        with self._lock:
            self.counts.wait_s += time.perf_counter() - begun
        return raw

    def prefetch(self, layer: int, experts: Iterable[int]) -> None:
        """Begin to load experts that are expected, in the place of others, without waiting."""
        with self._lock:
            self._require_open()
            keys = [(layer, expert) for expert in experts]
            self._forget_failed(keys)
            kept = {*keys, *self._ahead, *(key for key in self._there if key[0] == self.rule.layer)}  # that runs now
            for key in keys:
                if key not in self._there and self._make_room(key, kept):
                    self._load(key)
                    self._ahead.add(key)
                    self.counts.prefetched += 1

    @staticmethod
    def _settle(futures: Iterable[Future[torch.Tensor]]) -> None:
        """Wait until each is read, failed or cancelled."""
        for future in futures:
            with suppress(CancelledError):
                future.exception()

    def _answers(self, found: dict[Key, Future[torch.Tensor]]) -> dict[Key, torch.Tensor]:
        try:
            return {key: future.result() for key, future in found.items()}
        except CancelledError:
            raise OffloadError(f"{self.file.path} was closed") from None

    def _request(self, layer: int, keys: list[Key], tokens: int) -> dict[Key, Future[torch.Tensor]]:
        """Loads begun or found, of those that fit."""
        counts = self.counts
        self._forget_failed(keys)
        counts.events, counts.tokens = counts.events + 1, counts.tokens + tokens
        counts.requests += len(keys)
        self.rule.begin(layer)
        there = [key for key in keys if key in self._there]
        missing = [key for key in keys if key not in self._there]
        for key in reversed(there):
            self.rule.hit(key)
            counts.hits += 1
            counts.prefetched_used += key in self._ahead
            self._ahead.discard(key)
        fit = missing[: self.capacity - len(there)]
        kept = {*there, *fit}
        for key in reversed(missing):
            self.rule.miss(key)
            if key in kept and self._make_room(key, kept):
                self._load(key)
        return {key: self._there[key] for key in keys if key in kept}

    def _make_room(self, key: Key, kept: set[Key]) -> bool:
        """Whether there is room for one more, after something may have left."""
        while len(self._there) >= self.capacity:
            try:
                leaves = self.rule.victim(key, kept)
            except AllKept:
                return False
            self._drop(leaves)
        return True

    def _drop(self, key: Key) -> None:
        self.rule.removed(key)
        self._ahead.discard(key)
        del self._there[key]

    def _load(self, key: Key) -> None:
        self.rule.inserted(key)
        self._there[key] = self._readers.submit(self._read, key)

    def _read(self, key: Key) -> torch.Tensor:
        raw = self.file.read(*key)
        with self._lock:
            self.counts.loads += 1
            self.counts.bytes += len(raw)
        return raw

    def _forget_failed(self, keys: Iterable[Key]) -> None:
        """What could not be read is not there, so that it is tried anew."""
        for key in keys:
            future = self._there.get(key)
            if future is not None and future.done() and (future.cancelled() or future.exception()):
                self._drop(key)

    def _require_open(self) -> None:
        if self.closed:
            raise OffloadError(f"{self.file.path} was closed")


def fitting(memory: int, each: int) -> int:
    """Experts of `each` bytes that fit; raises `ValueError` where not even one does."""
    if memory < each:
        raise ValueError(f"memory={memory}: not even one expert of {each} bytes fits")
    return memory // each
