"""Sensitivity of each part of a model at each level, measured once and cached by the hash of the weights.

Shape legend: U units, L levels.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save as to_bytes
from torch import nn

from cost.files import write_bytes
from experts import zoo
from experts.compression import LEVELS, quantize, size_of
from experts.compression.evaluation import PlanEvaluator
from experts.compression.pieces import pieces

GRANULARITIES = ("expert", "layer")
SHIPPED = zoo.ASSETS / "_models"


class Sensitivity(NamedTuple):
    """Changes of accuracy and of loss `[U, L]` by one unit at a level, all others as they were; and the relative error
    of its weights, the columns weighed by their importance, `[U, L]`."""

    accuracy: np.ndarray
    loss: np.ndarray
    error: np.ndarray


def units(model: nn.Module, granularity: str = "expert") -> dict[str, list[int]]:
    """The parts that are given a level each, by name, with their places in `pieces`: every matrix, or ("layer") the
    experts' first matrices as one and their second ones as another."""
    if granularity not in GRANULARITIES:
        raise ValueError(f"granularity={granularity!r} is not one of {', '.join(GRANULARITIES)}")
    found: dict[str, list[int]] = {}
    for place, (name, piece) in enumerate(pieces(model).items()):
        stack, _, end = name.rsplit(".", 2) if piece.expert >= 0 else (name, "", "")
        found.setdefault(f"{stack}.{end}" if granularity == "layer" and end else name, []).append(place)
    return found


def unit_sizes(model: nn.Module, parts: Sequence[Sequence[int]]) -> np.ndarray:
    """Bytes `[U, L]` of units at each level."""
    shapes = [piece.shape for piece in pieces(model).values()]
    return np.array(
        [
            [sum(size_of(shapes[place], level) for place in places) for level in range(len(LEVELS))]
            for places in parts
        ]
    )  # fmt: skip


def expand(levels: Sequence[int], parts: Sequence[Sequence[int]]) -> tuple[int, ...]:
    """The levels of all matrices, from those of the units."""
    plan = {place: int(level) for places, level in zip(parts, levels, strict=True) for place in places}
    return tuple(plan[place] for place in range(len(plan)))


def sensitivity(
    evaluator: PlanEvaluator,
    parts: Sequence[Sequence[int]],
    importance: Mapping[str, np.ndarray],
    progress: Callable[[float], object] = lambda share: None,
) -> Sensitivity:
    """Measure the sensitivity on the inputs of the evaluator, or read it from the cache."""
    name, cached = _name(evaluator, parts, importance), zoo.cache_folder() / "sensitivities"
    for path in (SHIPPED / name, cached / name):
        if (found := _read(path, len(parts))) is not None:
            return found
    none = (0,) * len(parts)
    before = evaluator(expand(none, parts))
    scores = np.zeros((2, len(parts), len(LEVELS)))
    for unit in range(len(parts)):
        for level in range(len(LEVELS)):
            score = evaluator(expand([*none[:unit], level, *none[unit + 1 :]], parts))
            scores[:, unit, level] = score.accuracy - before.accuracy, score.loss - before.loss
        progress((unit + 1) / len(parts))
    found = Sensitivity(scores[0], scores[1], _errors(evaluator, parts, importance))
    write(found, cached, evaluator, parts, importance)
    return found


def write(
    found: Sensitivity, folder: Path, evaluator: PlanEvaluator, parts: Sequence[Sequence[int]],
    importance: Mapping[str, np.ndarray],
) -> None:  # fmt: skip
    """Write measured sensitivities to a folder."""
    raw = to_bytes(found._asdict(), {"sha256": _digest(found)})
    write_bytes(folder / _name(evaluator, parts, importance), raw)


def _errors(
    evaluator: PlanEvaluator, parts: Sequence[Sequence[int]], importance: Mapping[str, np.ndarray]
) -> np.ndarray:
    roots = [np.sqrt(importance[name]) for name in evaluator.names]
    squares = np.array(
        [
            [np.square((each.numpy() - variants[0].numpy()) * root).sum() for each in variants]
            + [np.square(variants[0].numpy() * root).sum()]
            for variants, root in zip(evaluator.weights, roots, strict=True)
        ]
    )
    summed = np.array([squares[places].sum(0) for places in parts])
    return np.asarray(np.sqrt(summed[:, :-1] / np.maximum(summed[:, -1:], 1e-12)))


def _name(evaluator: PlanEvaluator, parts: Sequence[Sequence[int]], importance: Mapping[str, np.ndarray]) -> str:
    """A file of its own for other weights, inputs, units or forms. Of the importance, which was computed and may differ
    in its last bits between machines, two digits of each matrix's mean."""
    forms = [level.name for level in LEVELS], quantize.GROUP, quantize.CLIPS.tolist(), list(map(list, parts))
    means = [f"{float(importance[name].mean()):.1e}" for name in evaluator.names]
    digest = hashlib.sha256(json.dumps([forms, means, evaluator.top]).encode())
    for name, tensor in sorted(evaluator.model.state_dict().items()):
        digest.update(name.encode() + tensor.numpy().tobytes())
    digest.update(evaluator.inputs.numpy().tobytes() + evaluator.labels.numpy().tobytes())
    return f"sensitivity-{digest.hexdigest()[:32]}.safetensors"


def _read(path: Path, units: int) -> Sensitivity | None:
    """Read a cache file; None if it is absent or damaged, so that it is measured again."""
    try:
        with safe_open(path, "numpy") as file:
            sha256 = (file.metadata() or {}).get("sha256")
            found = Sensitivity(*(file.get_tensor(name) for name in Sensitivity._fields))
    except (OSError, SafetensorError):
        return None
    whole = all(array.shape == (units, len(LEVELS)) for array in found) and sha256 == _digest(found)
    return found if whole else None


def _digest(found: Sensitivity) -> str:
    return hashlib.sha256(b"".join(np.ascontiguousarray(array).tobytes() for array in found)).hexdigest()
