"""Estimates of P(correct) in the context of a batch: what else is in it tells what an input is likely to be.

A small network changes the log-odds of each expert by what is seen of the input and by means over its batch. It is
cross-fitted over the same folds of `rl_train` as the estimates themselves; elsewhere the 4 networks are averaged.

Shape legend: G batches of T inputs, E experts, F features, K folds, L = 2 E, C = 2 E + F, H hidden units.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

FOLDS, HIDDEN = 4, 64
GATE_BOUND = 10.0  # of centred gate logits
LIMIT = 1e-3  # estimates are within LIMIT..1 - LIMIT
NAMES = ("local", "batch", "bias", "out", "out_bias")


def shapes(experts: int, features: int) -> dict[str, tuple[int, ...]]:
    """Shapes of the weights by name."""
    local, batch = 2 * experts, 2 * experts + features
    of_parts = ((FOLDS, local, HIDDEN), (FOLDS, batch, HIDDEN), (FOLDS, 1, HIDDEN), (FOLDS, HIDDEN, experts))
    return {f"context.{name}": shape for name, shape in zip(NAMES, (*of_parts, (FOLDS, 1, experts)), strict=True)}


def change(weights: Mapping[str, Any], local: Any, batch: Any) -> Any:
    """Change of the log-odds `[K, G, T, E]` by what is seen of inputs and of batches, in numpy or torch.

    `local` is `[1, G, T, L]` and `batch` `[1, G, C]`, or K instead of 1 for other inputs in each fold.
    """
    by_local, by_batch, bias, out, out_bias = (weights[name] for name in NAMES)
    hidden = local @ by_local[:, None] + (batch @ by_batch + bias)[:, :, None]
    return (hidden * (hidden > 0)) @ out[:, None] + out_bias[:, None]


def gate_parts(logits: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Gate logits minus their mean, clipped at +-`GATE_BOUND`, and their softmax, `[n, E]` each."""
    centred = np.clip(logits - logits.mean(1, keepdims=True), -GATE_BOUND, GATE_BOUND)
    odds = np.exp(centred)
    return centred, odds / odds.sum(1, keepdims=True)


def log_odds(estimates: np.ndarray) -> np.ndarray:
    """Log-odds of probabilities."""
    within = np.clip(estimates.astype(np.float32), LIMIT, 1 - LIMIT)
    found: np.ndarray = np.log(within / (1 - within))
    return found


def in_batches(
    weights: Mapping[str, np.ndarray], estimates: np.ndarray, gate: np.ndarray, features: np.ndarray,
    deck: np.ndarray, folds: np.ndarray | None = None,
) -> np.ndarray:  # fmt: skip
    """P(correct) `[b, B, E]` float32 of inputs in batches `deck [b, B]`, from what is known of inputs `[n, .]`.

    `gate` are probabilities; `folds [n]` are those of inputs of `rl_train`, None elsewhere.
    """
    odds, gate = log_odds(estimates), gate.astype(np.float32)
    local = np.hstack([odds, gate])
    averaged = np.hstack([estimates.astype(np.float32), gate, features.astype(np.float32)])
    found = []
    for part in np.array_split(deck, max(1, deck.size // 2**14)):
        changes = change(weights, local[part][None], averaged[part].mean(1)[None])
        if folds is None:
            chosen = changes.mean(0)
        else:
            chosen = np.take_along_axis(changes, folds[part][None, :, :, None].astype(np.int64), axis=0)[0]
        found.append(1 / (1 + np.exp(-(odds[part] + chosen))))
    return np.clip(np.concatenate(found), LIMIT, 1 - LIMIT)
