"""Experts as one bent core, beside a low rank of each expert, at equal numbers of parameters.

Of experts that were trained apart from random weights, and of upcycled ones: copies of one expert that were trained on
(Komatsuzaki et al. 2023). Weight error, and test accuracy with the first matrices of all experts replaced.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from experts import data, reference_models
from experts.compression.evaluation import accuracy
from experts.compression.lowrank import factors
from experts.compression.pieces import pieces
from experts.compression.shared_core import fit, fit_layers, relative_error

RANKS = (2, 4, 8, 16)
Result = dict[str, Any]


def run(name: str, out: Path, processes: int, progress: Callable[[float], object]) -> Result:
    """For both kinds of experts and each rank: parameters, errors and accuracies of core, unbent mean, and SVD."""
    models = {"independent": reference_models.load(name), "upcycled": reference_models.upcycle(name)}
    inputs, labels = data.load(reference_models.recipe_of(name)[1].source)["test"]
    stacks = {kind: _first_matrices(model) for kind, model in models.items()}
    rows: list[Result] = []
    for number, rank in enumerate(RANKS):
        cores = fit_layers(stacks, rank, out / "cores", processes=processes, progress=False)
        for kind, weights in stacks.items():
            core = cores[kind]
            of_each = core.total_parameters // (len(weights) * sum(weights.shape[1:]))  # no more than the core has
            low = np.stack([np.matmul(*factors(each, of_each)) for each in weights])
            ways = {"core": core.weights(), "SVD": low}
            if number == 0:
                ways = {"mean": fit(weights, 1, steps=0).weights()} | ways
            for way, found in ways.items():
                rows.append(
                    {
                        "experts": kind, "way": way, "rank": {"core": rank, "mean": 0, "SVD": of_each}[way],
                        "parameters": {
                            "core": core.total_parameters, "mean": weights[0].size,
                            "SVD": of_each * len(weights) * sum(weights.shape[1:]),
                        }[way],
                        "active": {
                            "core": core.active_parameters(2), "mean": weights[0].size,
                            "SVD": of_each * 2 * sum(weights.shape[1:]),
                        }[way],
                        "of": weights.size, "error": relative_error(found, weights),
                        "accuracy": _accuracy(models[kind], found, inputs, labels),
                    }
                )  # fmt: skip
        progress((number + 1) / len(RANKS))
    whole = {kind: _accuracy(model, stacks[kind], inputs, labels) for kind, model in models.items()}
    return {"model": name, "rows": rows, "accuracy": whole, **provenance()}


def _first_matrices(model: Any) -> np.ndarray:
    """`[E, O, I]`."""
    return np.stack([piece.read() for piece in pieces(model).values() if piece.kind == "expert in"])


def _accuracy(model: Any, weights: np.ndarray, inputs: np.ndarray, labels: np.ndarray) -> float:
    """On test, with other first matrices."""
    made = copy.deepcopy(model)
    places = [piece for piece in pieces(made).values() if piece.kind == "expert in"]
    for piece, each in zip(places, weights.astype(np.float32), strict=True):
        piece.write(each)
    return accuracy(made, inputs, labels)
