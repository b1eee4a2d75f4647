"""Profiles: what each operation costs on one machine, measured once, saved as JSON, then a pure look-up.

The time of an operation on n inputs is fitted as `fixed + slope * n` to medians over n = 1..64. Memory is what it holds
for a batch: its weights (fixed) and its answers (slope), not the scratch space that operations take in turns. Energy is
a proxy and says so.
"""

from __future__ import annotations

import datetime
import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from time import perf_counter_ns
from typing import TYPE_CHECKING, Protocol

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from rich.progress import Progress

from cost.machine import fingerprint
from cost.meters import TensorMemory

if TYPE_CHECKING:
    import torch
    from torch import nn

SCHEMA = 1
SIZES = (1, 2, 4, 8, 16, 32, 64)
WARM_UP = 10
# Horowitz, "Computing's energy problem", ISSCC 2014, 45 nm: a 32-bit multiply-add 4.6 pJ, 32 bits from DRAM 640 pJ, 64
# bits from a 32 KB cache 20 pJ. Weights come from DRAM, activations from the cache.
JOULES_PER_FLOP, JOULES_PER_WEIGHT_BYTE, JOULES_PER_ACTIVATION_BYTE = 2.3e-12, 160e-12, 2.5e-12
ENERGY_PROXY = "proxy: 2.3 pJ a FLOP, 160 pJ a byte of weights, 2.5 pJ a byte of activations (Horowitz 2014)"


class RoutedModel(Protocol):
    """A shared trunk, and experts that take its output."""

    @property
    def trunk(self) -> nn.Module: ...

    @property
    def experts(self) -> Iterable[nn.Module]: ...


class ProfileError(RuntimeError):
    """A profile is absent, damaged, foreign or of another machine; the message names the file and the mend."""


class Fit(BaseModel):
    """`fixed + slope * n`; `residual` is the largest relative error of the fit over the sizes, 0 where it is exact."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)
    fixed: float = Field(ge=0)
    slope: float = Field(ge=0)
    residual: float = 0.0


class Operation(BaseModel):
    """Time in s, memory in B, energy in J; `spread` is the median over sizes of (P95 - P5) / median of the times."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)
    time: Fit
    memory: Fit
    energy: Fit
    spread: float


class Profile(BaseModel):
    """Operations by name, and where, when and how they were measured."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    schema_version: int = SCHEMA
    operations: dict[str, Operation]
    fingerprint: dict[str, str]
    created: str
    repeats: int
    energy_source: str
    units: dict[str, str] = {"time": "s", "memory": "B", "energy": "J"}

    def save(self, path: Path) -> None:
        """Write atomically, with a SHA-256 of the content."""
        content = self.model_dump(mode="json")
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=path.parent, prefix=f".{path.name}-", delete=False) as file:
            json.dump(content | {"sha256": _sha256(content)}, file, indent=1)
        os.chmod(file.name, 0o644)  # a temporary file is its owner's alone
        os.replace(file.name, path)


def load(path: Path) -> Profile:
    """The profile in a file that `Profile.save` wrote; raises `ProfileError` naming the file and what is wrong."""
    try:
        content = json.loads(path.read_bytes())
        if not isinstance(content, dict) or content.pop("sha256", None) != _sha256(content):
            raise ProfileError(
                f"{path} is damaged or foreign: its SHA-256 does not fit; measure again with moe-profile"
            )
    except OSError as error:
        raise ProfileError(f"{path} cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise ProfileError(f"{path} is not JSON: {error}; measure again with moe-profile") from error
    return parse(content, str(path))


def parse(content: object, source: str) -> Profile:
    """A profile from parsed JSON; `source` is named in the `ProfileError` where it is none."""
    try:
        profile = Profile.model_validate(content)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise ProfileError(f"{source} is not a profile: {where}: {first['msg']}") from error
    if profile.schema_version != SCHEMA:
        raise ProfileError(f"{source} has schema {profile.schema_version}; this moe-envs reads {SCHEMA}")
    return profile


def require_this_machine(profile: Profile, source: str) -> None:
    """Raise `ProfileError`, naming what differs, unless the profile was measured on this machine as it is now."""
    now = fingerprint()
    changed = [f"{key} was {profile.fingerprint.get(key)!r}, is {now[key]!r}" for key in now]
    changed = [text for key, text in zip(now, changed, strict=True) if profile.fingerprint.get(key) != now[key]]
    if changed:
        raise ProfileError(f"{source} is of another machine ({'; '.join(changed)}); measure again with moe-profile")


def measure_experts(model: RoutedModel, inputs: np.ndarray, repeats: int = 200, progress: bool = False) -> Profile:
    """Profile experts as a routed layer runs them: gather n rows, run the expert, add the weighted result.

    `inputs [64, D]` go through the model's trunk first, unmeasured. One thread; after warm-up, `repeats` rounds (>= 50)
    over all experts and sizes in turn, so that a slow spell of the machine meets all alike. Raises `ValueError` for
    fewer than 50 repeats, of which the median is not steady.
    """
    import torch

    if repeats < 50:
        raise ValueError(f"repeats must be >= 50 for a steady median, got {repeats}")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.inference_mode():
            hidden = model.trunk(torch.from_numpy(inputs))
            experts = list(model.experts)
            runs = [[_routed(expert, hidden, n) for n in SIZES] for expert in experts]
            seconds = _time(runs, repeats, progress)
            measured = [_operation(*each) for each in zip(experts, runs, seconds, strict=True)]
    finally:
        torch.set_num_threads(threads)
    return Profile(
        operations={f"expert {index}": operation for index, operation in enumerate(measured)},
        fingerprint=fingerprint(),
        created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        repeats=repeats,
        energy_source=ENERGY_PROXY,
    )


def fit(sizes: Sequence[int], values: np.ndarray) -> Fit:
    """Least squares of relative errors of `fixed + slope * n`, both kept >= 0."""
    n = np.asarray(sizes, dtype=np.float64)
    design = np.stack([np.ones_like(n), n], axis=1) / values[:, None]
    fixed, slope = np.linalg.lstsq(design, np.ones_like(n), rcond=None)[0]
    if slope < 0:
        fixed, slope = float(np.median(values)), 0.0
    elif fixed < 0:
        fixed, slope = 0.0, float(np.median(values / n))
    return Fit(fixed=fixed, slope=slope, residual=float(np.abs((fixed + slope * n) / values - 1).max()))


def _routed(expert: nn.Module, hidden: torch.Tensor, n: int) -> Callable[[], torch.Tensor]:
    import torch

    rows = torch.linspace(0, len(hidden) - 1, n).round().long()
    weight = torch.full((n, 1), 0.5)
    out = torch.zeros(len(hidden), expert(hidden[:1]).shape[-1])
    return lambda: out.index_add_(0, rows, expert(hidden.index_select(0, rows)) * weight)


def _time(runs: list[list[Callable[[], torch.Tensor]]], repeats: int, progress: bool) -> np.ndarray:
    nanoseconds = np.empty((WARM_UP + repeats, len(runs), len(SIZES)))
    with Progress(disable=not progress) as bar:
        for round_ in bar.track(nanoseconds, description="measuring the experts"):
            for row, sizes in zip(round_, runs, strict=True):
                for column, run in enumerate(sizes):
                    start = perf_counter_ns()
                    run()
                    row[column] = perf_counter_ns() - start
    return nanoseconds[WARM_UP:].transpose(1, 2, 0) * 1e-9


def _operation(expert: nn.Module, runs: list[Callable[[], torch.Tensor]], seconds: np.ndarray) -> Operation:
    from torch.utils.flop_counter import FlopCounterMode

    weights = sum(p.numel() * p.element_size() for p in expert.parameters())
    answers, activations, flops = [], [], []
    for run, n in zip(runs, SIZES, strict=True):
        with TensorMemory() as peak, FlopCounterMode(display=False) as counter:
            out = run()
        answers.append(n * out.shape[1] * out.element_size())
        activations.append(peak.value)
        flops.append(counter.get_total_flops())
    joules = JOULES_PER_FLOP * np.array(flops) + JOULES_PER_ACTIVATION_BYTE * np.array(activations)
    memory, energy = fit(SIZES, weights + np.array(answers)), fit(SIZES, JOULES_PER_WEIGHT_BYTE * weights + joules)
    low, middle, high = np.percentile(seconds, [5, 50, 95], axis=1)
    return Operation(
        time=fit(SIZES, middle), memory=memory, energy=energy, spread=float(np.median((high - low) / middle))
    )


def _sha256(content: dict[str, object]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
