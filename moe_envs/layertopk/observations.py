"""What a policy sees of a token in a layer; the environment and the deployed policy use the same code.

Shape legend: n tokens, E experts, K the most experts of a token, L layers.
"""

from __future__ import annotations

import numpy as np

HIDDEN = 16  # numbers of the hidden state
SURPRISE, RARE = 12.0, 16.0  # largest loss of a token; largest negative log probability of an expert
Described = list[tuple[str, int, float, float, str]]


def token_parts(k: int, layers: int) -> Described:
    """Parts about the token itself."""
    return [
        ("router", k, -RARE, 0, "log probabilities of the best experts"),
        ("weights", k, 0, 1, "weights of the best experts if all of them run"),
        ("left_out", layers * (k + 1), 0, 1, "squared sum of the weights that 0 to K experts leave out, 0 elsewhere"),
        ("entropy", 1, 0, RARE, "entropy of the router in nats"),
        ("layer", layers, 0, 1, "one-hot layer"),
        ("hidden", HIDDEN, -10, 10, "projection of the layer's inputs"),
        ("experts", layers, 0, 1, "experts of this token in the layers before, over K"),
    ]


def passage_parts() -> Described:
    """Parts about the tokens before."""
    return [
        ("surprise", 1, 0, SURPRISE, "loss of the token before in nats"),
        ("used", 1, 0, 1, "mean experts of a token and layer so far, over K"),
        ("progress", 1, 0, 1, "finished share of the passage"),
    ]


def budget_parts() -> Described:
    """Parts about a budget."""
    return [("budget", 1, 0, 1, "experts left for each token and layer, over K")]


def projection(width: int) -> np.ndarray:
    """The matrix `[HIDDEN, D]` that projects a layer's inputs: rows are orthonormal, drawn from a fixed seed."""
    drawn = np.random.default_rng(0).standard_normal((width, HIDDEN))
    return np.ascontiguousarray(np.linalg.qr(drawn)[0].T, dtype=np.float32)


def seen(
    logits: np.ndarray, hidden: np.ndarray, layer: np.ndarray, experts: np.ndarray, k: int
) -> dict[str, np.ndarray]:
    """Values of `token_parts`, `[n, size]` each, from router logits `[n, E]`, the projection of the inputs
    `[n, HIDDEN]`, the layer `[n]` and the numbers of experts in the layers before `[n, L]`."""
    logs = logits - logits.max(1, keepdims=True)
    logs -= np.log(np.exp(logs).sum(1, keepdims=True))
    best = -np.sort(-logs, axis=1)[:, :k]
    odds = np.exp(best)
    weights = odds / odds.sum(1, keepdims=True)
    left_out = 1 - np.concatenate([np.zeros_like(weights[:, :1]), weights.cumsum(1)], axis=1)
    here = (layer[:, None] == np.arange(experts.shape[1])).astype(np.float32)
    return {
        "router": best.clip(-RARE, 0),
        "weights": weights,
        "left_out": (here[:, :, None] * left_out[:, None].clip(0) ** 2).reshape(len(here), -1),
        "entropy": -(np.exp(logs) * logs).sum(1, keepdims=True).clip(-RARE, 0),
        "layer": here,
        "hidden": hidden.clip(-10, 10),
        "experts": experts / k,
    }
