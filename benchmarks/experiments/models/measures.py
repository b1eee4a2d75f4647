"""Metrics of a model on a set of images: quality, calibration and costs per batch.

Shape legend: B inputs, C classes.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from benchmarks.experiments.models.setups import Classify
from cost.energy import open_counter
from cost.meters import EnergyMeter, MemoryMeter, TimeMeter
from experts.confidence import (
    confidence,
    expected_calibration_error,
    fit_temperature,
    maximum_calibration_error,
    reliability,
    softmax,
)

BATCH, BATCHES, WARM_UP = 256, 40, 2
NOISY = 2.0  # ratio of P95 to median


def quality(logits_BC: np.ndarray, labels_B: np.ndarray) -> dict[str, float]:
    """Top-1 and top-5 accuracy, cross-entropy, mean entropy in nats, and mean margin between the two highest class
    probabilities."""
    probability_BC = softmax(logits_BC.astype(np.float64))
    rank_B = (logits_BC > np.take_along_axis(logits_BC, labels_B[:, None], 1)).sum(1)
    right_B = np.take_along_axis(probability_BC, labels_B[:, None], 1)[:, 0]
    first, second = np.sort(probability_BC, axis=1)[:, :-3:-1].T
    return {
        "accuracy": float((logits_BC.argmax(1) == labels_B).mean()),
        "top5": float((rank_B < 5).mean()),
        "loss": float(-np.log(right_B.clip(1e-12)).mean()),
        "entropy": float(-(probability_BC * np.log(probability_BC.clip(1e-12))).sum(1).mean()),
        "top2_gap": float((first - second).mean()),
    }


def temperature(logits_BC: np.ndarray, labels_B: np.ndarray) -> float:
    """Temperature of the class logits, fitted on the given validation logits."""
    return fit_temperature(logits_BC, np.eye(logits_BC.shape[1], dtype=np.bool_)[labels_B])


def calibration(logits_BC: np.ndarray, labels_B: np.ndarray, divisor: float) -> dict[str, Any]:
    """Expected and maximum calibration error (over bins with at least 1 % of the inputs) and reliability diagram,
    before and after temperature scaling."""
    right_B = logits_BC.argmax(1) == labels_B
    found: dict[str, Any] = {}
    for suffix, sure_B in (("", confidence(logits_BC)), ("_calibrated", confidence(logits_BC, divisor))):
        found[f"ece{suffix}"] = expected_calibration_error(sure_B, right_B)
        found[f"mce{suffix}"] = maximum_calibration_error(sure_B, right_B, least=-(-len(right_B) // 100))
        bins = reliability(sure_B, right_B)
        found[f"reliability{suffix}"] = {name: each.tolist() for name, each in bins._asdict().items()}
    return found


def batch_costs(classify: Classify, inputs: torch.Tensor) -> dict[str, Any]:
    """Time, energy and memory of batches of 256, for any number of inputs.

    Median and P95 of the wall time of 40 batches after two warm-up batches, with `noisy` set if P95 exceeds twice the
    median; mean energy of 40 batches by a counter, or of one by the proxy; peak memory of one batch.
    """
    batches = _batches(inputs)
    for _ in range(WARM_UP):
        classify(next(batches))
    seconds = []
    for _ in range(BATCHES):
        batch = next(batches)
        with TimeMeter() as time:
            classify(batch)
        seconds.append(time.value)
    several = [next(batches) for _ in range(1 if open_counter() is None else BATCHES)]  # a counter needs long blocks
    with EnergyMeter() as energy:
        for batch in several:
            classify(batch)
    with MemoryMeter() as memory:
        classify(batch)
    median, late = np.percentile(seconds, [50, 95])
    return {
        "batch_ms": 1e3 * float(median), "batch_p95_ms": 1e3 * float(late), "noisy": bool(late > NOISY * median),
        "energy_j": energy.value / len(several), "energy_source": energy.source, "memory_bytes": memory.value,
    }  # fmt: skip


def least_costs(ways: dict[str, Classify], inputs: torch.Tensor) -> dict[str, Any]:
    """Minimum of each cost over the ways to compute the same logits."""
    costs = {way: batch_costs(classify, inputs) for way, classify in ways.items()}
    fastest, thriftiest, smallest = (
        min(costs, key=lambda way: float(costs[way][key])) for key in ("batch_ms", "energy_j", "memory_bytes")
    )
    chosen = {"fastest": fastest, "thriftiest": thriftiest}
    return costs[fastest] | {
        "energy_j": costs[thriftiest]["energy_j"], "memory_bytes": costs[smallest]["memory_bytes"], **chosen,
    }  # fmt: skip


def _batches(inputs: torch.Tensor) -> Iterator[torch.Tensor]:
    place = 0
    while True:
        rows = torch.arange(place, place + BATCH) % len(inputs)
        yield inputs[rows]
        place += BATCH
