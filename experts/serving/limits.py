"""Who may ask, and how often: API keys and token buckets."""

from __future__ import annotations

import hmac
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence

MOST_CLIENTS = 10_000  # whose buckets are kept


class TokenBuckets:
    """`rate` requests a second for each client, and up to `burst` at once; 0 for no limit."""

    def __init__(self, rate: float, burst: float | None = None, clock: Callable[[], float] = time.monotonic) -> None:
        if rate < 0 or (burst is not None and burst < 1):
            raise ValueError(f"rate={rate}, burst={burst}: needs rate >= 0 and burst >= 1")
        self.rate, self.burst, self.clock = rate, max(burst or rate, 1.0), clock
        self._left: OrderedDict[str, tuple[float, float]] = OrderedDict()  # tokens, and when; the oldest first

    def take(self, client: str) -> float:
        """Take a token; returns 0, or the seconds until there is one."""
        if not self.rate:
            return 0.0
        now = self.clock()
        tokens, then = self._left.pop(client, (self.burst, now))
        tokens = min(self.burst, tokens + (now - then) * self.rate)
        wait = max(0.0, (1 - tokens) / self.rate)
        self._left[client] = (tokens - 1 if wait == 0 else tokens, now)
        if len(self._left) > MOST_CLIENTS:
            self._left.popitem(last=False)
        return wait


class Keys:
    """API keys; with none, everybody may ask."""

    def __init__(self, keys: Sequence[str] = ()) -> None:
        if any(not key.strip() or not key.isascii() for key in keys):
            raise ValueError("an API key must be of ASCII characters, and not empty")
        self._keys = [key.strip().encode() for key in keys]

    def __bool__(self) -> bool:
        return bool(self._keys)

    def number(self, given: str) -> int | None:
        """The number of a key, or None; all keys are compared, so that the time does not tell which is near."""
        raw = given.encode(errors="replace")
        same = [hmac.compare_digest(raw, key) for key in self._keys]
        return same.index(True) if any(same) else None
