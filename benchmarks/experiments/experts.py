"""Are experts compressed better by a shared core or by low-rank factors with the same number of parameters?

Compares experts trained from random weights with upcycled ones, i.e. trained copies of one expert (Komatsuzaki et al.
2023). Reports weight error, and test accuracy with the first matrix of each expert replaced.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd

from benchmarks.runner.setup import Arguments
from experts import data, reference_models
from experts.compression.evaluation import accuracy
from experts.compression.lowrank import factors
from experts.compression.pieces import pieces
from experts.compression.shared_core import fit, relative_error

RANKS = (2, 4, 8, 16)
SEEDS = (0,)
KINDS = "independent", "upcycled"
SETTINGS = {f"{kind}, rank {rank}": {"kind": kind, "rank": rank} for kind in KINDS for rank in RANKS}
QUICK = {"setups": {name: SETTINGS[name] for name in ("independent, rank 2", "upcycled, rank 2")},
         "settings": {"model": "digits-mlp", "steps": 20}}  # fmt: skip


class ExpertsSetup(Arguments):
    """Experts of a reference model, original or upcycled; `steps` refine the core."""

    kind: Literal["independent", "upcycled"]
    rank: int
    model: str = "fashion-mnist-conv"
    steps: int | None = None


Setup = ExpertsSetup


def measure(setup: ExpertsSetup, seed: int, split: str, folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Parameters, errors and accuracies of the shared core, the plain mean and SVD."""
    load = reference_models.load if setup.kind == "independent" else reference_models.upcycle
    model = load(setup.model)
    inputs, labels = data.load(reference_models.recipe_of(setup.model)[1].source)["test"]
    weights = _first_matrices(model)
    more = {} if setup.steps is None else {"steps": setup.steps}
    core = fit(weights, setup.rank, **more)
    of_each = core.total_parameters // (len(weights) * sum(weights.shape[1:]))  # at most as many parameters as the core
    low = np.stack([np.matmul(*factors(each, of_each)) for each in weights])
    each_side = of_each * sum(weights.shape[1:])
    ways = {
        "mean": (fit(weights, 1, steps=0).weights(), 0, weights[0].size, weights[0].size),
        "core": (core.weights(), setup.rank, core.total_parameters, core.active_parameters(2)),
        "SVD": (low, of_each, each_side * len(weights), 2 * each_side),
    }
    rows = [
        {
            "experts": setup.kind, "way": way, "rank": rank, "parameters": parameters, "active, of two": active,
            "error": relative_error(found, weights), "accuracy": _accuracy(model, found, inputs, labels),
        }
        for way, (found, rank, parameters, active) in ways.items()
    ]  # fmt: skip
    return {"rows": rows, "uncompressed": _accuracy(model, weights, inputs, labels), "of": weights.size}, {}


def score(frame: pd.DataFrame) -> dict[str, Any]:
    """One table per kind of experts."""
    tables = {}
    for kind, group in frame.groupby("kind", sort=False):
        rows = [row for several in group["rows"] for row in several]
        unique = {(row["way"], row["rank"]): row for row in rows}.values()  # the mean is the same at all ranks
        title = f"{kind}, uncompressed {group['uncompressed'].iloc[0]:.2%} on test, {group['of'].iloc[0]:,} parameters"
        tables[title] = [{key: value for key, value in row.items() if key != "experts"} for row in unique]
    return {"tables": tables}


def _first_matrices(model: Any) -> np.ndarray:
    """First weight matrices of all experts, `[E, O, I]`."""
    return np.stack([piece.read() for piece in pieces(model).values() if piece.kind == "expert in"])


def _accuracy(model: Any, weights: np.ndarray, inputs: np.ndarray, labels: np.ndarray) -> float:
    """Test accuracy with the given first matrices."""
    made = copy.deepcopy(model)
    places = [piece for piece in pieces(made).values() if piece.kind == "expert in"]
    for piece, each in zip(places, weights.astype(np.float32), strict=True):
        piece.write(each)
    return accuracy(made, inputs, labels)
