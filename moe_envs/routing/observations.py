"""Observations of MoERouting-v0: what a policy sees of an input and of its batch."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from experts.bundle import FEATURE_BOUND, Split
from moe_envs.routing.planning import PLAN_BOUND, plan_margins

OBSERVATIONS = ("estimates", "features")
GATE_BOUND = 10.0
BATCH_SCALE = 3.0  # brings the mean features of topical batches to a spread of about 1
Described = tuple[str, int, float, float, str]  # a part of an observation: name, size, bounds, meaning


@dataclass(frozen=True)
class View:
    """What is seen of inputs, `seen [n, k]`, and averaged over a batch, `averaged [n, m]`, float32; the parts of an
    observation about the input and about the batch. `worth [n, E]` is None where it is not observed."""

    seen: np.ndarray
    averaged: np.ndarray
    of_input: list[Described]
    of_batch: list[Described]
    worth: np.ndarray | None = None

    @classmethod
    def of_features(cls, split: Split) -> View:
        """Features and gate logits of the inputs of a split."""
        gate, probabilities = _gate(split)
        features, count, experts = split.features.astype(np.float32), split.features.shape[1], gate.shape[1]
        bound = FEATURE_BOUND * BATCH_SCALE
        return cls(
            np.hstack([features, gate]).astype(np.float32),
            np.hstack([probabilities * experts, features * BATCH_SCALE]).astype(np.float32),
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
    def of_estimates(cls, split: Split, price: np.ndarray) -> View:
        """Worth of each expert for the inputs of a split: P(correct) less the price `[E]` of an input there."""
        probabilities, experts, lowest = _gate(split)[1], len(price), -float(price.max()) * 1.001 - 1e-6
        worth = (split.estimates - price).astype(np.float32)
        return cls(
            np.hstack([worth, probabilities]).astype(np.float32),
            np.hstack([worth, probabilities * experts]).astype(np.float32),
            [
                (
                    "worth",
                    experts,
                    lowest,
                    1,
                    "estimated P(correct) of each expert for the present input, less the price",
                ),
                ("gate", experts, 0, 1, "the gate's probabilities for it"),
            ],
            [
                ("batch_worth", experts, lowest, 1, "mean worth over the batch"),
                ("batch_gate", experts, 0, experts, "mean gate probability over the batch, times E: 1 if even"),
                ("plan", experts, -PLAN_BOUND, PLAN_BOUND, "what leaving each expert out of the best pool would lose"),
                ("detour", experts, -PLAN_BOUND, 0, "the same where it is negative: what adding the expert would gain"),
            ],
            worth,
        )

    def summaries(self, deck: np.ndarray, first_price: np.ndarray) -> np.ndarray:
        """What is seen of batches `[b, B]`, `[b, .]`; `first_price [2^E]` is that of the first use of pools."""
        parts = np.array_split(deck, max(1, len(deck) // 1024))
        found = [np.concatenate([self.averaged[part].mean(1) for part in parts])]
        if self.worth is not None:
            plan = plan_margins(self.worth, first_price, deck)
            found += [plan, np.minimum(plan, 0)]
        return np.hstack(found).astype(np.float32)


def _gate(split: Split) -> tuple[np.ndarray, np.ndarray]:
    """Centred gate logits and gate probabilities, `[n, E]`."""
    gate = np.clip(split.gate_logits - split.gate_logits.mean(1, keepdims=True), -GATE_BOUND, GATE_BOUND)
    odds = np.exp(gate)
    return gate, odds / odds.sum(1, keepdims=True)
