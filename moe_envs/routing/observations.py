"""Observations of MoERouting-v0: what a policy sees of an input and of its batch."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from experts.bundle import FEATURE_BOUND, Split
from experts.bundle.context import GATE_BOUND, gate_parts
from moe_envs.routing.planning import PLAN_BOUND, plan_margins

OBSERVATIONS = ("estimates", "features")
BATCH_SCALE = 3.0  # brings the mean features of topical batches to a spread of about 1
Described = tuple[str, int, float, float, str]  # a part of an observation: name, size, bounds, meaning


@dataclass(frozen=True)
class View:
    """What is seen of inputs, `seen [n, k]`, and of batches, `summaries [b, m]`, float32, and the parts of an
    observation about both. With `by_place`, an input is one at a place in the deck, n = b * (B + 1) + 1."""

    seen: np.ndarray
    summaries: np.ndarray
    of_input: list[Described]
    of_batch: list[Described]
    by_place: bool = False

    @classmethod
    def of_features(cls, split: Split, deck: np.ndarray) -> View:
        """Features and gate logits of the inputs of a split, and their means over batches `deck [b, B]`."""
        gate, probabilities = gate_parts(split.gate_logits)
        features, count, experts = split.features.astype(np.float32), split.features.shape[1], gate.shape[1]
        bound = FEATURE_BOUND * BATCH_SCALE
        return cls(
            np.pad(np.hstack([features, gate]), ((0, 1), (0, 0))).astype(np.float32),
            _means(np.hstack([probabilities * experts, features * BATCH_SCALE]), deck),
            [
                ("features", count, -FEATURE_BOUND, FEATURE_BOUND, "principal components of the present input"),
                ("gate_logits", experts, -GATE_BOUND, GATE_BOUND, "the gate's logits for it, less their mean"),
            ],
            [
                ("batch_gate", experts, 0, experts, "mean gate probability over the batch, times E: 1 if even"),
                ("batch_features", count, -bound, bound, "mean features over the whole batch, times 3"),
            ],
        )

    @classmethod
    def of_estimates(
        cls, split: Split, deck: np.ndarray, chances: np.ndarray, price: np.ndarray, pool_price: np.ndarray
    ) -> View:
        """Worth of each expert for the inputs in batches `deck [b, B]`: P(correct) `chances [b, B, E]` less the price
        `[E]` of an input; and the plan of each batch, with `pool_price [P]` of the first use of pools."""
        _, probabilities = gate_parts(split.gate_logits)
        experts, lowest = len(price), -float(price.max()) * 1.001 - 1e-6
        worth = (chances - price).astype(np.float32)
        plan = plan_margins(worth, pool_price)
        seen = np.pad(np.concatenate([worth, probabilities[deck]], axis=2), ((0, 0), (0, 1), (0, 0)))
        summaries = [worth.mean(1), _means(probabilities * experts, deck), plan, np.where(plan > 0, 0, plan - 1)]
        return cls(
            np.pad(seen.reshape(-1, 2 * experts), ((0, 1), (0, 0))).astype(np.float32),
            np.hstack(summaries).astype(np.float32),
            [
                ("worth", experts, lowest, 1, "estimated P(correct) of each expert for the input, less its price"),
                ("gate", experts, 0, 1, "the gate's probabilities for it"),
            ],
            [
                ("batch_worth", experts, lowest, 1, "mean worth over the batch"),
                ("batch_gate", experts, 0, experts, "mean gate probability over the batch, times E: 1 if even"),
                (
                    "plan",
                    experts,
                    -PLAN_BOUND,
                    PLAN_BOUND,
                    "best return of a pool with this expert, minus that of a pool without it",
                ),
                ("detour", experts, -PLAN_BOUND - 1, 0, "0 for experts in the best pool, else `plan` - 1"),
            ],
            by_place=True,
        )


def _means(seen: np.ndarray, deck: np.ndarray) -> np.ndarray:
    """Means over batches `deck [b, B]`, `[b, m]` float32."""
    parts = np.array_split(deck, max(1, len(deck) // 1024))
    return np.concatenate([seen[part].mean(1) for part in parts]).astype(np.float32)
