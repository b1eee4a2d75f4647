"""How much an expert will be asked for soon, from what was asked for: what decides which experts stay in memory.

Shape legend: n rows (texts side by side), m rows that are in some layer now, T tokens, L layers, E experts, K the
experts of a token, H half-lives, F features.
"""

from __future__ import annotations

from collections.abc import Container
from dataclasses import dataclass

import numpy as np

HALF_LIVES = (4.0, 16.0, 64.0, np.inf)  # tokens
DECAYS = np.array([0.5 ** (1 / each) for each in HALF_LIVES], dtype=np.float32)
FORGET = 8.0  # tokens in which the feature "age" halves
GAMMA = 0.9  # a request counts less by this factor for each token that it is later
RIDGE = 1.0
PRIOR = 4.0  # requests that the shares of others are worth, for what is asked for together
FEATURES = 9


@dataclass
class Requests:
    """What n texts asked for so far: `uses [n, L, E, H]`, sums of requests that count half after each half-life,
    `last [n, L, E]`, the token of the last request, higher by a fraction the more important it was, and `tokens
    [n, L]` seen."""

    uses: np.ndarray
    last: np.ndarray
    tokens: np.ndarray

    @classmethod
    def empty(cls, rows: int, layers: int, experts: int) -> Requests:
        """Nothing asked for yet."""
        uses = np.zeros((rows, layers, experts, len(HALF_LIVES)), dtype=np.float32)
        last = np.full((rows, layers, experts), -1000.0, dtype=np.float32)
        return cls(uses, last, np.zeros((rows, layers), dtype=np.int64))

    def forget(self, rows: np.ndarray) -> None:
        """New texts begin in these rows."""
        self.uses[rows], self.last[rows], self.tokens[rows] = 0, -1000.0, 0

    def add(self, rows: np.ndarray, layer: np.ndarray, wanted_mK: np.ndarray) -> None:
        """The next token's request in a layer of these rows, the most important expert first."""
        each, k = np.arange(len(rows))[:, None], wanted_mK.shape[1]
        now = self.tokens[rows, layer][:, None]
        uses, last = self.uses[rows, layer] * DECAYS, self.last[rows, layer]
        uses[each, wanted_mK] += 1
        last[each, wanted_mK] = now + (1 - np.arange(k) / k) / 2
        self.uses[rows, layer], self.last[rows, layer] = uses, last
        self.tokens[rows, layer] += 1

    def features(
        self, rows: np.ndarray, layer: np.ndarray, odds_mE: np.ndarray, frequency_LE: np.ndarray
    ) -> np.ndarray:
        """`[m, E, F]` after `add`: the router's probability, its place among the best as 1 or 0, requests by half-life,
        age, how often the expert is asked for in other texts, 1."""
        uses, last = self.uses[rows, layer], self.last[rows, layer]
        seen = self.tokens[rows, layer][:, None]
        found = np.empty((*odds_mE.shape, FEATURES), dtype=np.float32)
        found[..., 0] = odds_mE
        found[..., 1] = last >= seen - 1
        found[..., 2:5] = uses[..., :3] * (1 - DECAYS[:3])
        found[..., 5] = uses[..., 3] / np.maximum(seen, 1)
        found[..., 6] = 0.5 ** ((seen - 1 - np.floor(last)) / FORGET)
        found[..., 7] = frequency_LE[layer]
        found[..., 8] = 1.0
        return found


@dataclass(frozen=True)
class Demand:
    """A linear prediction, for each layer, of the discounted number of requests for an expert in the tokens to come,
    over that of an expert that all of them ask for. `weights [L, F]`; `frequency [L, E]` is the share of tokens that
    asked for each expert in the texts it was fitted to."""

    weights: np.ndarray
    frequency: np.ndarray

    def predict(self, requests: Requests, rows: np.ndarray, layer: np.ndarray, odds_mE: np.ndarray) -> np.ndarray:
        """Predicted demand `[m, E]`, after `Requests.add` of the present token."""
        return _weighted(requests.features(rows, layer, odds_mE, self.frequency), self.weights[layer])

    def most(self, count: int) -> np.ndarray:
        """The experts most often asked for in those texts, `[L, count]`."""
        return np.argsort(-self.frequency, axis=1, kind="stable")[:, :count]

    @classmethod
    def fit(cls, logits_nTLE: np.ndarray, k: int, *, by_halves: bool = False) -> Demand:
        """By ridge regression, on router logits of n texts. For few texts `by_halves`: the weights are fitted to their
        second half, where `frequency` is that of the first."""
        rows, tokens, layers, experts = logits_nTLE.shape
        wanted = best(logits_nTLE, k)
        asked = np.zeros(logits_nTLE.shape, dtype=np.float32)
        np.put_along_axis(asked, wanted, 1.0, axis=-1)
        frequency, start = asked.mean((0, 1)), tokens // 2 if by_halves else 0
        known = asked[:, :start].mean((0, 1)) if start else frequency
        future, target = np.zeros_like(asked[:, 0]), np.zeros_like(asked)
        for token in range(tokens - 1, -1, -1):
            target[:, token] = future * (1 - GAMMA)
            future = asked[:, token] + GAMMA * future
        requests, every = Requests.empty(rows, layers, experts), np.arange(rows)
        square, mixed = np.zeros((layers, FEATURES, FEATURES)), np.zeros((layers, FEATURES))
        for token in range(tokens):
            for layer in range(layers):
                here = np.full(rows, layer)
                requests.add(every, here, wanted[:, token, layer])
                if token < start:
                    continue
                features = requests.features(every, here, odds(logits_nTLE[:, token, layer]), known)
                flat = features.reshape(-1, FEATURES).astype(np.float64)
                square[layer] += flat.T @ flat
                mixed[layer] += flat.T @ target[:, token, layer].ravel()
        square += RIDGE * np.eye(FEATURES)
        return cls(np.linalg.solve(square, mixed[..., None])[..., 0].astype(np.float32), frequency)


@dataclass(frozen=True)
class NextLayer:
    """A linear prediction, for each layer, of whether the next token to reach it will ask for an expert. `weights
    [L, F]`; `together [L, E, E]`, the share of the tokens with an expert in the layer before that ask for each one;
    `frequency [L, E]` as in `Demand`. The first layer follows the last one of the token before."""

    weights: np.ndarray
    together: np.ndarray
    frequency: np.ndarray

    def predict(self, requests: Requests, rows: np.ndarray, layer: np.ndarray, before_mK: np.ndarray) -> np.ndarray:
        """Predictions `[m, E]` for these layers, from what the layers before ask for."""
        odds_mE = _mean(self.together[layer[:, None], before_mK])
        return _weighted(requests.features(rows, layer, odds_mE, self.frequency), self.weights[layer])

    @classmethod
    def fit(cls, wanted_nTLK: np.ndarray, experts: int) -> NextLayer:
        """By ridge regression on requests of n texts: what was asked for together is counted in their first half, and
        the weights are fitted to the second half."""
        rows, tokens, layers, _ = wanted_nTLK.shape
        half, every = max(1, tokens // 2), np.arange(rows)
        asked = np.zeros((rows, tokens, layers, experts), dtype=np.float32)
        np.put_along_axis(asked, wanted_nTLK, 1.0, axis=-1)
        counted, known = _together(asked[:, :half]), asked[:, :half].mean((0, 1))
        requests = Requests.empty(rows, layers, experts)
        square, mixed = np.zeros((layers, FEATURES, FEATURES)), np.zeros((layers, FEATURES))
        for token in range(tokens):
            for layer in range(layers):
                here = np.full(rows, layer)
                if token >= half:
                    before = wanted_nTLK[:, token, layer - 1] if layer else wanted_nTLK[:, token - 1, -1]
                    odds_mE = _mean(counted[here[:, None], before])
                    features = requests.features(every, here, odds_mE, known)
                    flat = features.reshape(-1, FEATURES).astype(np.float64)
                    square[layer] += flat.T @ flat
                    mixed[layer] += flat.T @ asked[:, token, layer].ravel()
                requests.add(every, here, wanted_nTLK[:, token, layer])
        square += RIDGE * np.eye(FEATURES)
        weights = np.linalg.solve(square, mixed[..., None])[..., 0].astype(np.float32)
        return cls(weights, _together(asked), asked.mean((0, 1)))


class Probable:
    """What is loaded ahead in an `OffloadedModel(prefetch=...)`: of the experts that are not in memory those that the
    next layer most probably asks for, `most` of them at the most, with a probability of at least `least`. `chances` is
    what `agents.deploy.expertcache.fit_next_layer` returns. For one text at a time; `forget` begins another."""

    def __init__(self, chances: NextLayer, most: int = 1, least: float = 0.02) -> None:
        self.chances, self.most, self.least = chances, most, least
        self.layers, self.experts = chances.frequency.shape
        self.forget()

    def forget(self) -> None:
        """Begin a new text."""
        self.requests = Requests.empty(1, self.layers, self.experts)

    def ahead(self, layer: int, wanted_TK: np.ndarray, there: Container[tuple[int, int]]) -> tuple[int, list[int]]:
        """The layer after this one and its experts to be loaded, the most probable first, once tokens that follow each
        other asked for experts in this layer; `there` are keys (layer, expert) in memory."""
        row, here, following = np.zeros(1, dtype=np.int64), np.array([layer]), (layer + 1) % self.layers
        if not wanted_TK.size:
            return following, []
        for each in wanted_TK:
            self.requests.add(row, here, each[None])
        chance = self.chances.predict(self.requests, row, np.array([following]), wanted_TK[-1:])[0]
        likely = [int(each) for each in np.argsort(-chance) if chance[each] >= self.least]
        return following, [each for each in likely if (following, each) not in there][: self.most]


def _together(asked_nTLE: np.ndarray) -> np.ndarray:
    """`NextLayer.together`, as if each expert had been asked for `PRIOR` times more, with the usual share of others."""
    before = np.roll(asked_nTLE, 1, axis=2)
    before[:, 1:, 0], before[:, :1, 0] = asked_nTLE[:, :-1, -1], 0
    both = np.einsum("ntla,ntle->lae", before, asked_nTLE, optimize=True)
    usual, often = asked_nTLE.mean((0, 1)), before.sum((0, 1))
    return np.asarray((both + PRIOR * usual[:, None]) / (often + PRIOR)[..., None], dtype=np.float32)


def _mean(values_mKE: np.ndarray) -> np.ndarray:
    """Mean over K, summed in order, so that a row's does not depend on the rows beside it."""
    found = values_mKE[:, 0].copy()
    for place in range(1, values_mKE.shape[1]):
        found += values_mKE[:, place]
    return np.asarray(found / np.float32(values_mKE.shape[1]))


def _weighted(features_mEF: np.ndarray, weights_mF: np.ndarray) -> np.ndarray:
    """Sums over the features in order, so that a row's sum does not depend on the rows beside it."""
    found = features_mEF[..., 0] * weights_mF[:, :1]
    for place in range(1, FEATURES):
        found += features_mEF[..., place] * weights_mF[:, place, None]
    return np.asarray(found)


EVICTIONS = ("predicted", "lru", "lfu", "ema", "static")


def eviction_scores(
    name: str, requests: Requests, rows: np.ndarray, layer: np.ndarray, predicted_mE: np.ndarray,
    frequency_LE: np.ndarray,
) -> np.ndarray:  # fmt: skip
    """Scores `[m, E]` by which experts stay in memory after `Requests.add`: predicted demand, the last request, the
    number of requests, the same with a half-life of 4 tokens, or the share of requests in other texts."""
    if name == "predicted":
        return predicted_mE
    if name == "lru":
        return np.asarray(requests.last[rows, layer])
    if name == "static":
        return np.asarray(frequency_LE[layer])
    return np.asarray(requests.uses[rows, layer][..., {"lfu": 3, "ema": 0}[name]])


def needed_next(wanted_TLK: np.ndarray, experts: int) -> np.ndarray:
    """Minus the number of the token that asks for each expert next, after each token, `[T, L, E]`; experts never needed
    again come last."""
    found = np.empty((*wanted_TLK.shape[:2], experts), dtype=np.float32)
    later = np.full(found.shape[1:], len(wanted_TLK) + 1, dtype=np.float32)
    for token in range(len(wanted_TLK) - 1, -1, -1):
        found[token] = -later
        np.put_along_axis(later, wanted_TLK[token], token, axis=1)
    return found


def odds(logits: np.ndarray) -> np.ndarray:
    """Softmax over the last axis."""
    found = np.exp(logits - logits.max(-1, keepdims=True))
    return np.asarray(found / found.sum(-1, keepdims=True))


def picked(values_mE: np.ndarray, index_mK: np.ndarray) -> np.ndarray:
    """`np.take_along_axis` of rows, with less overhead for a few of them."""
    return np.asarray(values_mE[np.arange(len(index_mK))[:, None], index_mK])


def marked(shape: tuple[int, ...], index_mK: np.ndarray) -> np.ndarray:
    """Boolean `[m, E]`: True at the index."""
    found = np.zeros(shape, dtype=np.bool_)
    found[np.arange(len(index_mK))[:, None], index_mK] = True
    return found


def best(logits: np.ndarray, k: int) -> np.ndarray:
    """The k largest along the last axis, the largest first; of equal ones the first."""
    return np.argsort(-logits, axis=-1, kind="stable")[..., :k]
