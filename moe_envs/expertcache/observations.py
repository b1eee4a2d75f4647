"""What a policy sees of a token's request; the environment and the deployed policy use the same code.

Shape legend: m rows, E experts, K the experts of a token, L layers.
"""

from __future__ import annotations

import numpy as np

from experts.offload.demand import best, marked, picked
from moe_envs.layertopk.observations import HIDDEN, RARE

SHARE = 0.25  # of a substitute's weight that counts, measured: better than all of it, and than no substitutes
LATELY = 0.95  # share of "lately" that stays, a layer
Described = list[tuple[str, int, float, float, str]]


def request_parts(k: int, layers: int) -> Described:
    """Parts of the observation."""
    return [
        ("weights", k, 0, 1, "weights of the best experts"),
        ("squared", k, 0, 1, "their squares"),
        ("missing", k, 0, 1, "1 for the experts that are not in memory"),
        ("demand", k, -1, 1, "predicted demand for the best experts"),
        (
            "gain",
            k,
            -1,
            1,
            "demand minus the lowest of experts in memory that are not requested; 0 if not missing",
        ),
        (
            "substitute",
            k,
            0,
            1,
            "probability of the best unrequested expert in memory, over that of each requested one",
        ),
        ("layer", layers, 0, 1, "one-hot layer"),
        ("count", 1, 0, 1, "missing experts, over K"),
        ("mass", 1, 0, 1, "probability of the best experts together"),
        ("entropy", 1, 0, RARE, "entropy of the router in nats"),
        ("loads", 1, 0, 1, "experts loaded lately in a layer, over K"),
        ("hidden", HIDDEN, -10, 10, "projection of the layer's inputs"),
    ]


def request_values(
    odds_mE: np.ndarray, wanted_mK: np.ndarray, resident_mE: np.ndarray, demand_mE: np.ndarray
) -> dict[str, np.ndarray]:
    """The parts that follow from the router's probabilities, the experts asked for, the best first, and the memory."""
    chosen, demand = picked(odds_mE, wanted_mK), picked(demand_mE, wanted_mK)
    missing = ~picked(resident_mE, wanted_mK)
    others = resident_mE & ~marked(resident_mE.shape, wanted_mK)
    least = np.where(others, demand_mE, np.inf).min(1, keepdims=True)
    mass = chosen.sum(1, keepdims=True)
    weights = chosen / mass
    return {
        "weights": weights,
        "squared": weights**2,
        "missing": missing,
        "demand": demand.clip(-1, 1),
        "gain": (missing * (demand - np.where(np.isinf(least), 0, least))).clip(-1, 1),
        "substitute": (np.where(others, odds_mE, 0).max(1, keepdims=True) / chosen).clip(0, 1),
        "count": missing.mean(1, keepdims=True),
        "mass": mass.clip(0, 1),
        "entropy": -(odds_mE * np.log(odds_mE.clip(1e-12))).sum(1, keepdims=True).clip(-RARE, 0),
    }


def answering(
    logits_mE: np.ndarray, wanted_mK: np.ndarray, available_mE: np.ndarray, substitute: bool
) -> tuple[np.ndarray, np.ndarray]:
    """Experts that run in place of those asked for, `[m, K]`, and their weights, 0 for those that do not: the best ones
    available, or of those asked for the ones available.

    Weights are probabilities over the sum of those asked for, so that these have the weights of the model's router;
    others count `SHARE` of theirs.
    """
    k = wanted_mK.shape[1]
    experts = best(np.where(available_mE, logits_mE, -np.inf), k) if substitute else wanted_mK
    scaled = np.exp(logits_mE - logits_mE.max(1, keepdims=True))
    there, own = picked(available_mE, experts), picked(marked(available_mE.shape, wanted_mK), experts)
    weights = picked(scaled, experts) / picked(scaled, wanted_mK).sum(1, keepdims=True)
    return experts, np.where(there, np.where(own, weights, SHARE * weights), 0).astype(np.float32)


def staying(available_mE: np.ndarray, scores_mE: np.ndarray, capacity: int) -> np.ndarray:
    """Which experts stay in memory, boolean `[m, E]`: those with the highest scores."""
    if available_mE.sum(1).max(initial=0) <= capacity:
        return available_mE
    scores = np.where(available_mE, scores_mE, -np.inf)
    return marked(available_mE.shape, best(scores, capacity)) & available_mE
