"""Shared core with low-rank factors per expert: W_e = (I + U_out V_out^T) C (I + U_in V_in^T).

The core starts as the mean of the experts, the factors at zero; Adam minimises the squared Frobenius error.

Shape legend: E experts, O rows (outputs), I columns (inputs), R rank.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, fields
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch
from rich.progress import Progress
from safetensors.numpy import save

from cost.files import arrays_of, sealed, write_bytes


@dataclass(frozen=True)
class SharedCore:
    """`core [O, I]`, and of each expert `u_out, v_out [E, O, R]` and `u_in, v_in [E, I, R]`; float32."""

    core: np.ndarray
    u_out: np.ndarray
    v_out: np.ndarray
    u_in: np.ndarray
    v_in: np.ndarray

    def weights(self) -> np.ndarray:
        """The experts' matrices, `[E, O, I]`."""
        tensors = {field.name: torch.from_numpy(getattr(self, field.name)) for field in fields(self)}
        return _weights(**tensors).numpy()

    @property
    def total_parameters(self) -> int:
        """Number of parameters of the core and all factors."""
        return sum(getattr(self, field.name).size for field in fields(self))

    def active_parameters(self, experts: int) -> int:
        """Number of parameters of the core and the factors of the active experts."""
        of_one = sum(getattr(self, field.name)[0].size for field in fields(self)[1:])
        return int(self.core.size + experts * of_one)

    def to_bytes(self) -> bytes:
        """As safetensors, bit for bit, with their SHA-256."""
        arrays = {field.name: np.ascontiguousarray(getattr(self, field.name)) for field in fields(self)}
        return save(arrays, sealed(arrays))

    @classmethod
    def from_bytes(cls, raw: bytes) -> SharedCore:
        """Restore from `to_bytes`; raises `ValueError` for invalid bytes."""
        _, arrays = arrays_of(raw, "not a shared core: it", ValueError, "fit it again")
        if set(arrays) != {field.name for field in fields(cls)}:
            raise ValueError(f"not a shared core: it holds {', '.join(sorted(arrays))}")
        core, (experts, *_, rank) = arrays["core"], arrays["u_out"].shape or (0,)
        sides = dict(zip(("u_out", "v_out", "u_in", "v_in"), (0, 0, -1, -1), strict=True))
        fits = core.ndim == 2 and all(
            arrays[name].shape == (experts, core.shape[at], rank) for name, at in sides.items()
        )
        if not fits or any(array.dtype != np.float32 or not np.isfinite(array).all() for array in arrays.values()):
            raise ValueError("not a shared core: its arrays do not fit each other, or are not finite float32")
        found = cls(**arrays)
        if not np.isfinite(found.weights()).all():
            raise ValueError("not a shared core: its weights are not finite")
        return found


def fit(weights: np.ndarray, rank: int, steps: int = 500, rate: float = 3e-3, seed: int = 0) -> SharedCore:
    """Fit core and factors to expert matrices `[E, O, I]`; with 0 steps, the core is their mean."""
    experts, rows, columns = weights.shape
    if not 1 <= rank <= min(rows, columns):
        raise ValueError(f"rank={rank!r}: must be from 1 to {min(rows, columns)}")
    generator, wanted = torch.Generator().manual_seed(seed), torch.from_numpy(weights)
    parts = {
        "core": wanted.mean(0), "u_out": torch.zeros(experts, rows, rank),
        "v_out": torch.randn(experts, rows, rank, generator=generator) / rows**0.5,
        "u_in": torch.zeros(experts, columns, rank),
        "v_in": torch.randn(experts, columns, rank, generator=generator) / columns**0.5,
    }  # fmt: skip
    for tensor in parts.values():
        tensor.requires_grad_(True)
    optimizer = torch.optim.Adam(parts.values(), rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(1, steps))
    for _ in range(steps):
        optimizer.zero_grad()
        ((_weights(**parts) - wanted).square().sum() / wanted.square().sum()).backward()
        optimizer.step()
        schedule.step()
    return SharedCore(**{name: tensor.detach().numpy() for name, tensor in parts.items()})


def relative_error(found: np.ndarray, weights: np.ndarray) -> float:
    """The norm of the difference over that of the weights."""
    return float(np.linalg.norm(found - weights) / np.linalg.norm(weights))


def fit_layers(
    layers: Mapping[str, np.ndarray], rank: int, folder: Path, steps: int = 500, processes: int = 1,
    progress: bool = True,
) -> dict[str, SharedCore]:  # fmt: skip
    """Fit several layers, each kept in `folder` as soon as it is done; those that are there already are read."""
    paths = {name: _path(folder, name, weights, rank, steps) for name, weights in layers.items()}
    todo = [name for name, path in paths.items() if not path.exists()]
    with Progress(disable=not progress) as bar, ProcessPoolExecutor(processes, get_context("spawn")) as pool:
        waiting = [pool.submit(_fit_one, layers[name], rank, steps, paths[name]) for name in todo]
        for future in bar.track(waiting, description="fitting shared cores"):
            future.result()
    return {name: _read(path) for name, path in paths.items()}


def _fit_one(weights: np.ndarray, rank: int, steps: int, path: Path) -> None:
    torch.set_num_threads(1)
    write_bytes(path, fit(weights, rank, steps).to_bytes())


def _read(path: Path) -> SharedCore:
    try:
        return SharedCore.from_bytes(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path}: {error}; delete it, and it is made anew") from error


def _path(folder: Path, name: str, weights: np.ndarray, rank: int, steps: int) -> Path:
    """A file of its own for other weights or steps."""
    digest = hashlib.sha256(f"{weights.shape} {steps} ".encode() + np.ascontiguousarray(weights).tobytes()).hexdigest()
    return folder / f"{name}-rank{rank}-{digest[:16]}.safetensors"


def _weights(
    core: torch.Tensor, u_out: torch.Tensor, v_out: torch.Tensor, u_in: torch.Tensor, v_in: torch.Tensor
) -> torch.Tensor:
    bent = core + u_out @ (v_out.mT @ core)
    return bent + (bent @ u_in) @ v_in.mT
