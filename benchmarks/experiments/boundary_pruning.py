"""Weights below tau times the largest of their matrix left out: what is kept, what it costs, what it saves.

A matrix is stored sparsely (a bit for each weight, the kept ones as float32) only where that is smaller. Zeros do not
make a dense product quicker; the time of sparse ones (CSR) is beside it.
"""

from __future__ import annotations

import copy
import time
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from cost.timing import torch_threads
from experts import data, reference_models
from experts.compression.evaluation import accuracy
from experts.compression.pieces import other_parameters, pieces
from experts.compression.prune import boundary

TAUS = (0.0, 0.1, 0.15, 0.2, 0.25, 0.3)
RUNS, BATCH = 5, 64
Result = dict[str, Any]


def run(names: list[str], progress: Callable[[float], object]) -> Result:
    """For each model and tau: share of weights kept, test accuracy, bytes, seconds of a batch (medians of 5 runs)."""
    rows: list[Result] = []
    for name in names:
        model = reference_models.load(name)
        inputs, labels = data.load(reference_models.recipe_of(name)[1].source)["test"]
        cut = [_cut(model, tau) for tau in TAUS]
        seconds = _seconds([made for made, _ in cut], torch.from_numpy(inputs[:BATCH]))
        for tau, (made, kept), (dense, sparse) in zip(TAUS, cut, seconds, strict=True):
            rows.append(
                {
                    "model": name, "tau": tau, "kept": kept, "accuracy": accuracy(made, inputs, labels),
                    "bytes": _bytes(made), "time_s": dense, "linear_dense_s": sparse[0], "linear_sparse_s": sparse[1],
                }
            )  # fmt: skip
            progress(len(rows) / (len(names) * len(TAUS)))
    return {"rows": rows, **provenance()}


def _cut(model: Any, tau: float) -> tuple[Any, float]:
    """A copy without the small weights, and the share that is kept."""
    made, kept, total = copy.deepcopy(model), 0, 0
    for piece in pieces(made).values():
        weights = boundary(piece.read(), tau)
        piece.write(weights)
        kept, total = kept + int(np.count_nonzero(weights)), total + weights.size
    return made, kept / total


def _bytes(model: Any) -> int:
    """Of all matrices, each dense or sparse, and of what is in none."""
    stored = 0
    for piece in pieces(model).values():
        weights = piece.read()
        stored += min(weights.nbytes, -(-weights.size // 8) + 4 * int(np.count_nonzero(weights)))
    return stored + sum(4 * tensor.numel() for tensor in other_parameters(model).values())


def _seconds(models: list[Any], inputs: torch.Tensor) -> list[tuple[float, tuple[float, float]]]:
    """Of the whole model, and of its linear matrices densely and sparsely: medians of 5 runs over all in turn."""
    calls: list[list[Callable[[], object]]] = []
    for model in models:
        linear = [torch.from_numpy(piece.read()) for piece in pieces(model).values() if piece.kind != "conv"]
        given = [torch.randn(len(inputs), weights.shape[1]) for weights in linear]
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta")
            sparse = [weights.to_sparse_csr() for weights in linear]
        calls.append([partial(model, inputs), partial(_dense, given, linear), partial(_sparse, given, sparse)])
    found = np.zeros((RUNS, len(models), 3))
    with torch_threads(1), torch.inference_mode():
        for index in np.ndindex(found.shape):
            found[index] = _median(calls[index[1]][index[2]])
    return [(row[0], (row[1], row[2])) for row in np.median(found, axis=0).tolist()]


def _dense(given: list[torch.Tensor], matrices: list[torch.Tensor]) -> object:
    return [F.linear(x, weights) for x, weights in zip(given, matrices, strict=True)]


def _sparse(given: list[torch.Tensor], matrices: list[torch.Tensor]) -> object:
    return [weights @ x.T for x, weights in zip(given, matrices, strict=True)]


def _median(call: Callable[[], object], times: int = 15) -> float:
    seconds = []
    for _ in range(times):
        begun = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - begun)
    return float(np.median(seconds))
