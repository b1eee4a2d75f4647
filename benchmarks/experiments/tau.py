"""How accurate is a model after removing weights below tau times the largest weight of their matrix?

A matrix is stored sparsely (one bit per weight plus the kept weights as float32) only if that is smaller. Zeros do not
speed up dense products, so the time of sparse products (CSR) is reported as well.
"""

from __future__ import annotations

import copy
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F

from benchmarks.results.tables import renamed
from benchmarks.runner.setup import Arguments
from cost.timing import torch_threads
from experts import data, reference_models
from experts.compression.evaluation import accuracy
from experts.compression.pieces import other_parameters, pieces
from experts.compression.prune import boundary

TAUS = (0.0, 0.1, 0.15, 0.2, 0.25, 0.3)
RUNS, BATCH = 5, 64
SEEDS = (0,)
SETTINGS = {f"{model}, tau {tau:g}": {"model": model, "tau": tau}
            for model in ("digits-mlp", "fashion-mnist-conv") for tau in TAUS}  # fmt: skip
QUICK = {"setups": {name: each for name, each in SETTINGS.items() if each["model"] == "digits-mlp"}}


class TauSetup(Arguments):
    """A reference model and a threshold."""

    model: str
    tau: float


Setup = TauSetup


def measure(setup: TauSetup, seed: int, split: str, folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Share of weights kept, test accuracy, bytes, and seconds per batch (median of 5 runs)."""
    model = reference_models.load(setup.model)
    inputs, labels = data.load(reference_models.recipe_of(setup.model)[1].source)["test"]
    made, kept = _cut(model, setup.tau)
    ((dense, sparse),) = _seconds([made], torch.from_numpy(inputs[:BATCH]))
    return {"kept": kept, "accuracy": accuracy(made, inputs, labels), "bytes": _bytes(made)}, {
        "time_us": 1e6 * dense, "linear_dense_us": 1e6 * sparse[0], "linear_sparse_us": 1e6 * sparse[1],
    }  # fmt: skip


def score(frame: pd.DataFrame) -> dict[str, Any]:
    """One row per model and tau."""
    columns = {
        "model": "model", "tau": "tau", "kept": "share kept", "accuracy": "accuracy", "bytes": "bytes",
        "time_us": "a batch of 64, µs", "linear_dense_us": "linear layers, dense, µs",
        "linear_sparse_us": "linear layers, sparse, µs",
    }  # fmt: skip
    return {"tables": {"Medians of 5 runs, one thread": renamed(frame, columns)}}


def _cut(model: Any, tau: float) -> tuple[Any, float]:
    """Copy without the small weights, and the share of weights kept."""
    made, kept, total = copy.deepcopy(model), 0, 0
    for piece in pieces(made).values():
        weights = boundary(piece.read(), tau)
        piece.write(weights)
        kept, total = kept + int(np.count_nonzero(weights)), total + weights.size
    return made, kept / total


def _bytes(model: Any) -> int:
    """Size in bytes of all matrices, each dense or sparse, and of the other parameters."""
    stored = 0
    for piece in pieces(model).values():
        weights = piece.read()
        stored += min(weights.nbytes, -(-weights.size // 8) + 4 * int(np.count_nonzero(weights)))
    return stored + sum(4 * tensor.numel() for tensor in other_parameters(model).values())


def _seconds(models: list[Any], inputs: torch.Tensor) -> list[tuple[float, tuple[float, float]]]:
    """Median seconds of 5 alternating runs: whole model, dense linear products, sparse linear products."""
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
