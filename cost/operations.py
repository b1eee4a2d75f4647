"""One operation: execution on n inputs, and affine fits of its time, memory, energy and FLOPs."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from cost.energy import Counter
from cost.meters import EnergyMeter, FlopMeter, MemoryMeter

if TYPE_CHECKING:
    import torch
    from torch import nn

Work = Callable[[int], object]  # the operation on n inputs, or its preparation, which returns a callable


class Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Fit(Record):
    """`fixed + slope * n`; `residual` is the largest relative error of the fit over the sizes."""

    fixed: float = Field(ge=0)
    slope: float = Field(ge=0)
    residual: float = 0.0


class Operation(Record):
    """Time in s, memory in B, energy in J; `spread` is the median over sizes of (P95 - P5) / median of the times.

    `median` and `p95` are the measured times in s per size in `sizes`.
    """

    time: Fit
    memory: Fit
    energy: Fit
    spread: float
    flops: Fit | None = None
    sizes: tuple[int, ...] = ()
    median: tuple[float, ...] = ()
    p95: tuple[float, ...] = ()
    dtype: str = "float32"
    device: str = "cpu"
    threads: int = 1


def fit(sizes: Sequence[int], values: np.ndarray) -> Fit:
    """Fit `fixed + slope * n`, both >= 0, by least squares of relative errors; all-zero values give 0."""
    from scipy.optimize import nnls

    n, values = np.asarray(sizes, dtype=np.float64), np.asarray(values, dtype=np.float64)
    if not values.any():
        return Fit(fixed=0.0, slope=0.0)
    values = np.maximum(values, values.max() * 1e-9)
    design = np.stack([np.ones_like(n), n], axis=1) / values[:, None]
    fixed, slope = nnls(design, np.ones_like(n))[0] if len(n) > 1 else (float(values[0]), 0.0)
    return Fit(fixed=fixed, slope=slope, residual=float(np.abs((fixed + slope * n) / values - 1).max()))


class Case(NamedTuple):
    """Prepared operation: one call per size."""

    name: str
    sizes: tuple[int, ...]
    runs: list[Callable[[], object]]
    device: str = "cpu"
    threads: int = 1
    dtype: str = "float32"
    held: Callable[[int], float] | None = None  # bytes, if known without measurement

    @classmethod
    def of(cls, name: str, work: Work, sizes: Sequence[int], **settings: Any) -> Case:
        """Prepare `work(n)` for each size; if it returns a callable, that callable is timed."""
        if not sizes or min(sizes) < 1 or len(set(sizes)) < len(sizes):
            raise ValueError(f"sizes must be different whole numbers >= 1, got {list(sizes)}")
        if settings.get("threads", 1) < 1:
            raise ValueError(f"threads must be >= 1, got {settings['threads']}")
        prepared = [work(n) for n in sizes]
        runs: list[Callable[[], object]] = []
        for n, made in zip(sizes, prepared, strict=True):
            runs.append(made if callable(made) else partial(work, n))
        return cls(name, tuple(sizes), runs, **settings)


def forward(module: nn.Module, rows: torch.Tensor, n: int) -> Callable[[], object]:
    """Run a module on n of the rows `[N, ...]`, repeated if n > N."""
    import torch

    batch = rows[torch.arange(n, device=rows.device) % len(rows)]
    return lambda: module(batch)


def routed(expert: nn.Module, hidden: torch.Tensor, n: int) -> Callable[[], torch.Tensor]:
    """Run an expert on n of the rows `hidden [N, D]`, repeated if n > N, as a routed layer does."""
    import torch

    rows = torch.linspace(0, len(hidden) - 1, n).round().long()
    weight = torch.full((n, 1), 0.5)
    out = torch.zeros(len(hidden), expert(hidden[:1]).shape[-1])
    return lambda: out.index_add_(0, rows, expert(hidden.index_select(0, rows)) * weight)


def weights_and_answers(expert: nn.Module, hidden: torch.Tensor, n: int) -> float:
    """Bytes of the weights and outputs of an expert for n inputs."""
    out = expert(hidden[:1])
    weights = sum(each.numel() * each.element_size() for each in expert.parameters())
    return weights + n * out.shape[-1] * out.element_size()


def describe(case: Case, seconds: np.ndarray, counter: Counter | None) -> Operation:
    """Fit the measured times `seconds [sizes, rounds]`, and measure memory, energy and FLOPs in additional runs."""
    held, joules, flops = [], [], []
    for run, n, median in zip(case.runs, case.sizes, np.median(seconds, axis=1), strict=True):
        with FlopMeter() as counted:
            run()
        flops.append(counted.value)
        held.append(case.held(n) if case.held else _held(run, case.device))
        joules.append(_joules(run, case.device, counter, median))
    low, middle, high = np.percentile(seconds, [5, 50, 95], axis=1)
    return Operation(
        time=fit(case.sizes, middle),
        memory=fit(case.sizes, np.array(held)),
        energy=fit(case.sizes, np.array(joules)),
        flops=fit(case.sizes, np.array(flops)),
        spread=float(np.median((high - low) / middle)),
        sizes=case.sizes,
        median=tuple(middle.tolist()),
        p95=tuple(high.tolist()),
        dtype=case.dtype,
        device=case.device,
        threads=case.threads,
    )


def _held(run: Callable[[], object], device: str) -> float:
    from cost.tensors import StorageTracker

    with StorageTracker() as used, MemoryMeter(device) as made:
        run()
    return used.weights + made.value


def _joules(run: Callable[[], object], device: str, counter: Counter | None, seconds: float) -> float:
    calls = 1 if counter is None else max(1, math.ceil(counter.window / seconds))
    with EnergyMeter(device, None if counter else "proxy") as reading:
        for _ in range(calls):
            run()
    return reading.value / calls
