"""MoEExpertCache-v0 on recorded routing: all experts are loaded that a token asks for; which ones in advance?"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Unpack

import numpy as np
from annotated_types import Ge, Gt

from cost.arguments import NonNegative, choose
from cost.model import Cost
from cost.timing import torch_threads
from experts.data import DataError
from moe_envs.core import Face, Outcome, Reward
from moe_envs.core.spaces import layout
from moe_envs.expertcache.memory import EVICTIONS, FITTED, MemoryEnv, actions_of, advice_for, capacity_of

if TYPE_CHECKING:
    from experts.offload.demand import Demand, NextLayer
    from moe_envs.core.stepped import SteppedModel

SHARES = {"rl_train": (0.0, 0.6), "validation": (0.6, 0.8), "test": (0.8, 1.0)}  # of a trace's tokens
DEVICES = ("simulated disk", "simulated hard disk", "simulated memory card", "simulated network")
OVERLAPPING = 8  # streams of rl_train begin each eighth of a stream; others do not overlap
# Advice: load in advance where the chance is above the share of its time that is not hidden, and in these bounds; SURE
# times the difference is a logit.
LEAST, SURE = (0.02, 0.95), 10.0
FIRST = 2.0**23  # the score by which what was just loaded stays, less its place: whole numbers are exact there


class MoEExpertPrefetchVectorEnv(MemoryEnv):
    """`MoEExpertCacheVectorEnv` with `source="trace"`; see `MoEExpertCacheEnv` for the problem and its arguments."""

    STATE = (*MemoryEnv.STATE, "_demand", "_chance")
    common_parts = ("layer",)

    def __init__(
        self,
        num_envs: int = 1,
        *,
        source: str = "trace",
        trace: Annotated[str | None, "a file of the format route_trace v1"] = None,
        model: str = "language",
        split: str = "rl_train",
        cost_weight: NonNegative = 0.2,
        capacity: Annotated[float, Gt(0)] = 0.375,
        eviction: str = "predicted",
        overlap: NonNegative = 1.0,
        tokens: Annotated[int, Ge(1)] = 64,
        passages: Annotated[int, Ge(1)] = 4,
        costs: str = "simulated disk",
        time_weight: NonNegative = 1.0,
        memory_weight: NonNegative = 0.0,
        energy_weight: NonNegative = 0.0,
        **face: Unpack[Face],
    ) -> None:
        choose("source", source, ("trace",))
        choose("split", split, SHARES)
        choose("eviction", eviction, EVICTIONS)
        choose("costs", costs, DEVICES)
        self.stepped = found = Recorded.of(trace, model, split, tokens, passages, costs)
        self.layers, self.k, self.experts = found.layers, found.k, found.experts
        self.capacity, self.eviction = capacity_of(capacity, self.experts), eviction
        self.overlap, self.tokens = overlap, found.tokens
        everything = Cost(*(found.loads[:, self.k].sum(0) * self.tokens).tolist())
        reward = Reward.of(cost_weight, everything, Cost(time_weight, memory_weight, energy_weight))
        parts = [
            ("chance", self.k, 0, 1, "predicted probability that the next layer asks for the candidates"),
            ("again", self.k, 0, 1, "1 for candidates that the last token asked for there"),
            ("gain", self.k, -1, 1, "their demand minus the lowest of experts in memory there"),
            ("layer", self.layers, 0, 1, "one-hot layer"),
            ("count", 1, 0, 1, "experts missing in this layer, over K"),
            ("loads", 1, 0, 1, "experts missing lately in a layer, over K"),
        ]
        super().__init__(num_envs, layout(parts), actions_of(self.k, eviction), reward, **face)
        least = (np.arange(self.k) + 1 - overlap).clip(*LEAST)
        on_bits = {"chance": SURE * np.eye(self.k), "layer": np.tile(-SURE * least, (self.layers, 1))}
        self.advice = advice_for(eviction, on_bits)
        self._allocate()
        self._demand = np.zeros((num_envs, self.layers, self.experts), dtype=np.float32)
        self._chance = np.zeros((num_envs, self.experts), dtype=np.float32)

    def _begin(self, rows: np.ndarray) -> None:
        self._demand[rows] = self.stepped.demand.frequency
        super()._begin(rows)

    def _enter(self, rows: np.ndarray) -> None:
        if not len(rows):
            return
        self.stepped.require(self.stream[rows])
        found, layer, token = self.stepped, self._layer[rows], self._token[rows]
        wanted, requests = found.streams[self.stream[rows], token, layer], self._requests
        requests.add(rows, layer, wanted)
        following = (layer + 1) % self.layers
        if self.eviction == "belady":
            later = token + (following == 0)
            known = found.streams[self.stream[rows], later.clip(max=self.tokens - 1), following]
            self._chance[rows] = 0
            self._chance[rows[:, None], known] = 1
            self._demand[rows, layer] = self._scores("belady", rows, layer, self._chance[rows])
            return
        self._chance[rows] = found.next_layer.predict(requests, rows, following, wanted)
        odds = np.zeros((len(rows), self.experts), dtype=np.float32)
        np.put_along_axis(odds, wanted, np.float32(1 / self.k), axis=1)
        self._demand[rows, layer] = found.demand.predict(requests, rows, layer, odds)

    def _advance(self, actions: np.ndarray) -> Outcome:
        from experts.offload.demand import marked
        from moe_envs.expertcache.observations import LATELY, staying

        rows = (self._token < self.tokens).nonzero()[0]
        layer, token, found = self._layer[rows], self._token[rows], self.stepped
        wanted = marked((len(rows), self.experts), found.streams[self.stream[rows], token, layer])
        resident = self._resident[rows, layer]
        missing = wanted & ~resident
        self._note(rows, resident, wanted, missing)
        candidates, there = self._candidates(rows)  # as they were observed
        scores = self._chosen(rows, layer, self._demand[rows, layer], actions)
        self._resident[rows, layer] = staying(resident | missing, scores, self.capacity)
        following = (layer + 1) % self.layers
        held, ranked = self._resident[rows, following], self._ranked(rows, following, actions)
        bits = (actions[rows, : self.k] > 0) & there & ~np.take_along_axis(held, candidates, 1)
        taken = np.zeros_like(wanted)
        np.put_along_axis(taken, candidates, bits, axis=1)
        first = FIRST - np.arange(self.k)
        np.put_along_axis(ranked, candidates, np.where(bits, first, np.take_along_axis(ranked, candidates, 1)), axis=1)
        self._resident[rows, following] = staying(held | taken, ranked, self.capacity)
        loads, ahead = np.zeros((2, self.num_envs), dtype=np.int64)
        cost = np.zeros((self.num_envs, 3))
        loads[rows], ahead[rows] = missing.sum(1), taken.sum(1)
        early = found.loads[following, ahead[rows]].copy()
        early[:, 0] = (early[:, 0] - self.overlap * found.loads[following, 1, 0]).clip(0)
        cost[rows] = found.loads[layer, loads[rows]] + early
        self._loaded, self._missed = self._loaded + loads + ahead, self._missed + loads
        self._lately = (LATELY * self._lately + (1 - LATELY) * loads / self.k).astype(np.float32)
        self._layer[rows] = following
        self._token[rows] += following == 0
        self._enter(rows[self._token[rows] < self.tokens])
        asked = self.k * np.maximum(self._token * self.layers + self._layer, 1)
        details = {
            "expertcache/loads": loads,
            "expertcache/prefetched": ahead,
            "expertcache/loads_per_token": self._loaded / np.maximum(self._token, 1),
            "expertcache/hit_rate": 1 - self._missed / asked,
        }
        return Outcome(np.zeros(self.num_envs), cost, self._token == self.tokens, details)

    def _expected(self, rows: np.ndarray, following: np.ndarray) -> np.ndarray:
        """Demand `[m, E]` before the next layers run: the chance that they ask for an expert belongs to it."""
        from experts.offload.demand import GAMMA

        return np.asarray((1 - GAMMA) * self._chance[rows] + GAMMA * self._demand[rows, following])

    def _ranked(self, rows: np.ndarray, following: np.ndarray, actions: np.ndarray) -> np.ndarray:
        """Scores `[m, E]` by which experts stay in the next layers before they run."""
        scores = self._chosen(rows, following, self._expected(rows, following), actions)
        return np.where((self._chance[rows] > 0) & (self.eviction == "belady"), np.inf, scores)

    def _candidates(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The K experts `[m, K]` that the next layer most probably asks for of those that are not in memory there, and
        which of them there are; none after the last layer of the stream."""
        from experts.offload.demand import best

        following = (self._layer[rows] + 1) % self.layers
        absent = ~self._resident[rows, following]
        absent[(following == 0) & (self._token[rows] >= self.tokens - 1)] = False
        candidates = best(np.where(absent, self._chance[rows], -np.inf), self.k)
        return candidates, np.take_along_axis(absent, candidates, 1)

    def _observe(self) -> np.ndarray:
        from experts.offload.demand import picked

        rows = self._rows
        token, layer = self._token.clip(max=self.tokens - 1), self._layer
        candidates, there = self._candidates(rows)
        following = (layer + 1) % self.layers
        demand = self._expected(rows, following)
        least = np.where(self._resident[rows, following], demand, np.inf).min(1, keepdims=True)
        wanted = self.stepped.streams[self.stream, token, layer]
        missing = ~picked(self.residents(), wanted)
        last = np.floor(self._last[rows, following]) >= self._asked[rows, following][:, None] - 1
        values = {
            "chance": picked(self._chance, candidates).clip(0, 1) * there,
            "again": picked(last, candidates) & there,
            "gain": ((picked(demand, candidates) - least) * there).clip(-1, 1),
            "layer": layer[:, None] == np.arange(self.layers),
            "count": missing.mean(1),
            "loads": self._lately,
        }
        return self._laid_out(values)

    def _useful(self) -> np.ndarray:
        """Bits of candidates."""
        return self._candidates(self._rows)[1]


class Recorded:
    """Requests `[M, T, L, K]` in M streams of T tokens, the most important expert first, and what is predicted from
    those of rl_train.

    `expert_bytes [L]`; `loads [L, K + 1, 3]` is what loading 0 to K experts costs in s, B and J.
    """

    def __init__(
        self, streams: np.ndarray, experts: int, expert_bytes: np.ndarray, costs: str,
        record: Callable[[int], np.ndarray] | None = None, apart: int = 1,
    ) -> None:  # fmt: skip
        from experts.offload.loads import SLOW, load_costs

        self.streams, self.experts, self.expert_bytes, self.apart = streams, experts, expert_bytes, apart
        _, self.tokens, self.layers, self.k = streams.shape
        self.loads = np.stack([load_costs(SLOW[costs], int(size), self.k) for size in expert_bytes])
        self._record, self._known = record, np.full(len(streams), record is None)
        self._needed: dict[int, np.ndarray] = {}
        self.demand: Demand
        self.next_layer: NextLayer

    def require(self, streams: np.ndarray) -> None:
        """Record the streams of these numbers that are not known yet."""
        if self._record is None or self._known[streams].all():
            return
        for number in np.unique(streams[~self._known[streams]]):
            self.streams[number] = self._record(int(number))
        self._known[streams] = True

    @classmethod
    def of(cls, trace: str | None, model: str, split: str, tokens: int, passages: int, costs: str) -> Recorded:
        """The same for the same arguments, as long as the files are the same."""
        from moe_envs.core.stepped import located

        if trace is None:
            return _of_model(*located(model), split, tokens, passages, costs)
        try:
            stamp = Path(trace).stat().st_mtime_ns
        except OSError as error:
            raise DataError(f"trace={trace!r} cannot be read: {error.strerror}") from error
        return _of_file(trace, stamp, split, tokens * passages, costs)

    def needed_next(self, stream: int) -> np.ndarray:
        """`needed_next` of a stream, `[T, L, E]`."""
        from experts.offload.demand import needed_next

        if stream not in self._needed:
            self._needed[stream] = needed_next(self.streams[stream], self.experts)
        return self._needed[stream]

    def fit(self) -> None:
        """Predictors from streams that do not overlap, every `apart`-th."""
        from experts.offload.demand import Demand, NextLayer

        numbers = np.arange(0, len(self.streams), self.apart)
        if self.apart > 1:  # of all the time that a file covers
            numbers = numbers[np.unique(np.linspace(0, len(numbers) - 1, FITTED).round().astype(np.int64))]
        self.require(numbers[:FITTED])
        wanted = self.streams[numbers[:FITTED]].astype(np.int64)
        logits = np.full((*wanted.shape[:3], self.experts), -np.inf, dtype=np.float32)
        np.put_along_axis(logits, wanted, -1e-3 * np.arange(self.k, dtype=np.float32), axis=-1)
        self.demand, self.next_layer = Demand.fit(logits, self.k, by_halves=True), NextLayer.fit(wanted, self.experts)


@dataclass(frozen=True)
class _Recorder:
    """Records streams, which are `numbers [M, S]` of passages."""

    stepped: SteppedModel
    numbers: np.ndarray

    def __call__(self, stream: int) -> np.ndarray:
        from experts.offload.demand import best

        with torch_threads(1):
            wanted = best(self.stepped.asked(self.numbers[stream]), self.stepped.k)
        return wanted.reshape(-1, self.stepped.layers, self.stepped.k)


@lru_cache(maxsize=4)
def _of_model(path: str, stamp: int, split: str, tokens: int, passages: int, costs: str) -> Recorded:
    """The routing of a language model on the passages that come with it."""
    from experts.offload.store import expert_bytes
    from moe_envs.core.stepped import SteppedModel, read
    from moe_envs.expertcache.model import streams_of

    model, texts = read(path, stamp, None, split, tokens)
    numbers = streams_of(len(texts.ids), passages, split)
    record = _Recorder(SteppedModel(model, texts), numbers)
    settings = model.settings
    size = np.full(settings.layers, expert_bytes(settings.d_model, settings.d_ff, "int4"))
    empty = np.zeros((len(numbers), tokens * passages, settings.layers, settings.k), dtype=np.int16)
    found = Recorded(empty, settings.num_experts, size, costs, record)
    return _fitted(found, lambda: _of_model(path, stamp, "rl_train", tokens, passages, costs), split)


@lru_cache(maxsize=4)
def _of_file(path: str, stamp: int, split: str, tokens: int, costs: str) -> Recorded:
    """A recorded trace, whose counted tokens are split by time."""
    from experts.offload import traces

    trace = traces.read(path)
    layer, wanted = trace.layer[trace.counted], trace.experts[trace.counted]
    wanted = wanted[:, (wanted >= 0).any(0)]
    whole = len(layer) % trace.layers == 0 and (layer.reshape(-1, trace.layers) == np.arange(trace.layers)).all()
    if not len(layer) or not whole or (wanted < 0).any():
        raise DataError(f"trace={path!r}: each token must ask for {wanted.shape[1]} experts in each layer")
    wanted = wanted.reshape(-1, trace.layers, wanted.shape[1]).astype(np.int16)
    first, last = (round(share * len(wanted)) for share in SHARES[split])
    part, size = wanted[first:last], min(tokens, last - first)
    if size < 2:
        raise DataError(f"trace={path!r}: {len(wanted)} tokens are too few for three splits")
    step = max(1, size // OVERLAPPING) if split == "rl_train" else size
    streams = part[np.arange(0, len(part) - size + 1, step)[:, None] + np.arange(size)]
    found = Recorded(streams, trace.num_experts, trace.expert_bytes, costs, apart=-(-size // step))
    return _fitted(found, lambda: _of_file(path, stamp, "rl_train", tokens, costs), split)


def _fitted(found: Recorded, train: Callable[[], Recorded], split: str) -> Recorded:
    if split == "rl_train":
        found.fit()
    else:
        found.demand, found.next_layer = (fitted := train()).demand, fitted.next_layer
    return found
