"""A bundle's tables: features, gate, the experts' answers, and the outcomes of subsets of experts.

Shape legend: B inputs, E experts, S subsets, C classes, F features.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from experts.bundle import subsets
from experts.bundle.read import Split

if TYPE_CHECKING:
    from experts.bundle.answers import Answer
    from experts.bundle.estimates import Estimator


def tabulated(
    features: np.ndarray, gate_logits: np.ndarray, outputs: np.ndarray, labels: np.ndarray, answer: Answer | None
) -> Split:
    """The tables of inputs from their features, gate logits and the experts' class logits.

    `answer` gives the class logits of a subset of experts; None where they are the gate-weighted sum of the experts'.
    """
    scale = np.abs(outputs).max(keepdims=True).ravel().astype(np.float32) / 127
    return Split(
        features=features.astype(np.float16),
        gate_logits=gate_logits.astype(np.float32),
        labels=labels.astype(np.int16),
        estimates=np.zeros(gate_logits.shape, dtype=np.float16),
        outputs=np.rint(outputs / scale).astype(np.int8),
        output_scale=scale,
        outcomes=pack_outcomes(gate_logits, outputs, labels)
        if answer is None
        else pack_outcomes_by(answer, gate_logits.shape[1], labels),
    )


def estimated(tables: dict[str, Split]) -> tuple[Estimator, dict[str, Split]]:
    """An estimator fitted on `rl_train`, and the tables with its estimates."""
    from experts.bundle.estimates import Estimator

    known = tables["rl_train"]
    estimator, of_known = Estimator.fit(known.features, known.gate_logits, known.singles, known.labels)
    found = {
        name: of_known if split is known else estimator.estimates(split.features, split.gate_logits)
        for name, split in tables.items()
    }
    return estimator, {name: replace(tables[name], estimates=each.astype(np.float16)) for name, each in found.items()}


def pack_outcomes(gate_logits: np.ndarray, outputs: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Bits `[n, ceil(S / 8)]`, little-endian: is the gate-weighted sum of subset s's logits largest at the label?

    The softmax over the subset only divides all classes by one number, so the gate's exponentials serve unnormalised,
    held above e^-80 of the largest so that none vanishes in float32. The empty subset is never correct.
    """
    num_experts = gate_logits.shape[1]
    member_SE = subsets.members(subsets.tabulated(num_experts), num_experts).astype(np.float32)
    weight_BE = np.exp(np.maximum(gate_logits - gate_logits.max(1, keepdims=True), -80)).astype(np.float32)
    packed = []
    for start in range(0, len(labels), 1024):
        rows = slice(start, start + 1024)
        logits_BSC = member_SE @ (weight_BE[rows, :, None] * outputs[rows].astype(np.float32))
        correct_BS = logits_BSC.argmax(-1) == labels[rows, None]
        correct_BS[:, 0] = False
        packed.append(np.packbits(correct_BS, axis=1, bitorder="little"))
    return np.concatenate(packed)


def pack_outcomes_by(answer: Answer, num_experts: int, labels: np.ndarray) -> np.ndarray:
    """The same where `answer(rows, members [S, B, E])` gives the class logits `[S, B, C]` of subsets of experts."""
    import torch

    member_SE = torch.from_numpy(subsets.members(subsets.tabulated(num_experts), num_experts) == 1)
    packed = []
    for start in range(0, len(labels), 64):
        rows = slice(start, min(start + 64, len(labels)))
        with torch.inference_mode():
            logits_SBC = answer(rows, member_SE[1:, None].expand(-1, rows.stop - rows.start, -1))
        correct_SB = logits_SBC.argmax(-1).numpy() == labels[rows]
        correct_BS = np.pad(np.ascontiguousarray(correct_SB.T), ((0, 0), (1, 0)))  # safetensors wants rows in order
        packed.append(np.packbits(correct_BS, axis=1, bitorder="little"))
    return np.concatenate(packed)


def principal_components(inputs: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Mean `[d]` and projection `[d, F]` onto the `count` largest principal components, each scaled to variance 1."""
    mean = inputs.mean(0, dtype=np.float64)
    variance, vectors = np.linalg.eigh(np.cov((inputs - mean).T, dtype=np.float64).reshape(inputs.shape[1], -1))
    largest = slice(-1, -min(count, len(variance)) - 1, -1)
    scale = np.sqrt(np.maximum(variance[largest], 1e-12))
    return mean.astype(np.float32), (vectors[:, largest] / scale).astype(np.float32)
