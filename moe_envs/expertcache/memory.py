"""What both sources of MoEExpertCache-v0 share: streams, notes of what they asked for, and what leaves the memory."""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
from gymnasium import spaces

from moe_envs.core import BatchedEnv

EVICTIONS = ("predicted", "lru", "lfu", "ema", "static", "learned", "belady")
FITTED = 24  # streams of rl_train from which demand is learned
CHOICES = ("predicted", "lru", "ema")  # of eviction="learned"
LIKELY = 4.0  # logit of the first of them in the advice; the others have 0


def capacity_of(capacity: float, experts: int) -> int:
    """Experts of a layer that fit: `capacity` of them or, below 1, this share; `ValueError` for other numbers."""
    if capacity > experts or (capacity > 1 and capacity != int(capacity)):
        raise ValueError(
            f"capacity={capacity:g}: a whole number up to the {experts} experts of a layer, or a share below 1"
        )
    return int(capacity) if capacity >= 1 else max(1, round(capacity * experts))


def actions_of(k: int, eviction: str) -> spaces.MultiBinary | spaces.MultiDiscrete:
    """A bit for each of K experts and, with learned eviction, the number of the rule by which experts leave."""
    return spaces.MultiDiscrete([2] * k + [len(CHOICES)]) if eviction == "learned" else spaces.MultiBinary(k)


def advice_for(eviction: str, on_bits: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Advice on the K bits, matrices `[size, K]`, as advice on all actions: with learned eviction `[size, 2 * K + 3]`,
    for eviction by predicted demand."""
    if eviction != "learned":
        return on_bits
    found = {}
    for name, matrix in on_bits.items():
        found[name] = wide = np.zeros((len(matrix), 2 * matrix.shape[1] + len(CHOICES)))
        wide[:, 1 : 2 * matrix.shape[1] : 2] = matrix
    found["layer"][:, -len(CHOICES)] = LIKELY  # the layer is one-hot
    return found


class MemoryEnv(BatchedEnv):
    """Rows are streams, stepped a layer of a token at a time; `stepped` has them."""

    STATE: ClassVar[tuple[str, ...]] = (
        "stream", "_token", "_layer", "_resident", "_uses", "_last", "_asked", "_lately", "_loaded", "_missed",
        "_history",
    )  # fmt: skip
    stepped: Any
    layers: int
    k: int
    experts: int
    tokens: int
    capacity: int
    eviction: str

    def _allocate(self) -> None:
        """Arrays of the rows, and who is in memory at the start: the experts most often asked for."""
        from experts.offload.demand import Requests

        n, shape = self.num_envs, (self.num_envs, self.layers, self.experts)
        self._next: np.ndarray | None = None  # streams of the next reset
        self.stream, self._token, self._layer, self._loaded, self._missed = np.zeros((5, n), dtype=np.int64)
        self._resident = np.zeros(shape, dtype=np.bool_)
        empty = Requests.empty(*shape)
        self._uses, self._last, self._asked = empty.uses, empty.last, empty.tokens
        self._lately = np.zeros(n, dtype=np.float32)
        shown = n if n == 1 else 0  # of many rows there is no picture
        self._history = np.zeros((shown, self.tokens, self.layers, self.experts), dtype=np.uint8)
        self._first = np.zeros(shape[1:], dtype=np.bool_)
        np.put_along_axis(self._first, self.stepped.demand.most(self.capacity), True, axis=1)

    @property
    def memory(self) -> int:
        """Bytes of experts that are held."""
        return int(self.capacity * np.sum(self.stepped.expert_bytes))

    def reset(self, *, seed: Any = None, options: dict[str, Any] | None = None) -> tuple[np.ndarray, dict[str, Any]]:
        """Start episodes, on the streams `options["stream"]`, a number or one for each row, if they are given."""
        asked = (options or {}).get("stream")
        if asked is not None:
            from moe_envs.core.stepped import check_numbers

            self._next = check_numbers("stream", asked, len(self.stepped.streams), self.num_envs)
        try:
            return super().reset(seed=seed, options=options)
        finally:
            self._next = None

    def _begin(self, rows: np.ndarray) -> None:
        drawn = self._draw(rows, len(self.stepped.streams))
        self.stream[rows] = drawn if self._next is None else self._next[rows]
        for counts in (self._token, self._layer, self._loaded, self._missed, self._lately):
            counts[rows] = 0
        self._history[:] = 0
        self._resident[rows] = self._first
        self._requests.forget(rows)
        self._enter(rows)

    def _enter(self, rows: np.ndarray) -> None:
        """Note what the present layers of these rows ask for."""
        raise NotImplementedError

    def residents(self) -> np.ndarray:
        """Which experts of the present layers are in memory, boolean `[n, E]`."""
        return np.asarray(self._resident[self._rows, self._layer])

    @property
    def _requests(self) -> Any:
        """What the rows asked for so far, in the arrays of the state."""
        from experts.offload.demand import Requests

        return Requests(self._uses, self._last, self._asked)

    def _scores(self, name: str, rows: np.ndarray, layer: np.ndarray, demand: np.ndarray) -> np.ndarray:
        """Scores `[m, E]` of a rule in these layers, given the predicted demand; the lowest leaves."""
        from experts.offload.demand import eviction_scores

        if name == "belady":
            places = zip(self.stream[rows].tolist(), self._token[rows], layer, strict=True)
            return np.stack([self.stepped.needed_next(stream)[token, each] for stream, token, each in places])
        return eviction_scores(name, self._requests, rows, layer, demand, self.stepped.demand.frequency)

    def _chosen(self, rows: np.ndarray, layer: np.ndarray, demand: np.ndarray, actions: np.ndarray) -> np.ndarray:
        """Scores `[m, E]` by `eviction`; if it is learned, by the rule that the last part of the action names."""
        if self.eviction != "learned":
            return self._scores(self.eviction, rows, layer, demand)
        every = np.stack([self._scores(name, rows, layer, demand) for name in CHOICES], 1)
        return np.asarray(every[np.arange(len(rows)), actions[rows, self.k]])

    def action_masks(self) -> np.ndarray:
        """Mask `[n, K]` of the bits that do something; with learned eviction `[n, 2 * K + 3]` of all choices."""
        bits = self._useful()
        if self.eviction != "learned":
            return bits
        pairs = np.stack([np.ones_like(bits), bits], 2).reshape(self.num_envs, -1)
        return np.concatenate([pairs, np.ones((self.num_envs, len(CHOICES)), dtype=np.bool_)], 1)

    def _useful(self) -> np.ndarray:
        """Which bits do something, `[n, K]`."""
        raise NotImplementedError

    def _laid_out(self, values: dict[str, np.ndarray]) -> np.ndarray:
        """Observations `[n, size]` of these parts, 0 in rows whose stream is over."""
        observation = np.zeros((self.num_envs, self.single_observation_space.shape[0]), dtype=np.float32)  # type: ignore[index]
        for name, part in self.observation_layout.items():
            observation[:, part.slice] = values[name].reshape(self.num_envs, -1)
        observation[self._token >= self.tokens] = 0
        return observation

    def _note(self, rows: np.ndarray, resident: np.ndarray, ran: np.ndarray, loaded: np.ndarray) -> None:
        """For the picture: which experts `[m, E]` of the present layers are in memory, ran, and are loaded."""
        from moe_envs.expertcache.picture import ABSENT, LOADED, RESIDENT, USED

        if len(self._history):
            found = np.where(resident, RESIDENT, ABSENT).astype(np.uint8)
            found[ran], found[loaded] = USED, LOADED
            self._history[rows, self._token[rows], self._layer[rows]] = found
