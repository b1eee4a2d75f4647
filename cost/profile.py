"""Profiles: costs of operations on one machine, measured once, saved as JSON and looked up afterwards.

Time, memory and energy of an operation on n inputs are fitted as `fixed + slope * n` to medians over n = 1..64. On
machines without an energy counter, energy is a proxy and labelled as such.
"""

from __future__ import annotations

import copy
import datetime
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property, partial
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np
from pydantic import ValidationError

from cost.energy import PROXY, open_counter
from cost.files import load_json, save_json
from cost.machine import fingerprint
from cost.meters import require_device
from cost.model import TERMS, Cost, CostModel
from cost.operations import Case, Fit, Operation, Record, Work, describe, fit, forward, routed, weights_and_answers
from cost.timing import Noise, Timed, time_steadily, torch_threads

if TYPE_CHECKING:
    import torch
    from torch import nn

SCHEMA = 2
__all__ = [
    "Fit",
    "Noise",
    "Operation",
    "Profile",
    "ProfileError",
    "fit",
    "measure",
    "measure_experts",
    "measure_module",
]

READABLE = (1, 2)  # version 1 lacks measured times, noise, FLOPs and grid axes
SIZES = (1, 2, 4, 8, 16, 32, 64)
MEND = "measure again with moe-profile"


class ProfileError(RuntimeError):
    """A profile is absent, damaged, foreign or of another machine; the message names the file and the fix."""


class RoutedModel(Protocol):
    """Model with a shared trunk whose output is the input of the experts."""

    @property
    def trunk(self) -> Callable[[torch.Tensor], torch.Tensor]: ...

    @property
    def experts(self) -> Iterable[nn.Module]: ...


class Profile(Record):
    """Operations by name, and where, when and how they were measured."""

    schema_version: int = SCHEMA
    operations: dict[str, Operation]
    fingerprint: dict[str, str]
    created: str
    repeats: int
    energy_source: str
    noise: Noise | None = None
    units: dict[str, str] = {"time": "s", "memory": "B", "energy": "J", "flops": "FLOP"}

    def cost(self, operation: str, n: float) -> Cost:
        """Cost of an operation on n inputs, 0 for n = 0; n may be fractional. Raises `ValueError` for an unknown
        operation."""
        if operation not in self._fits:
            raise ValueError(f"no operation {operation!r} in the profile; there are {', '.join(self.operations)}")
        time, more_time, memory, more_memory, energy, more_energy = self._fits[operation]
        return Cost(time + more_time * n, memory + more_memory * n, energy + more_energy * n) if n else Cost()

    @cached_property
    def _fits(self) -> dict[str, tuple[float, ...]]:
        fits = {name: [getattr(each, term) for term in TERMS] for name, each in self.operations.items()}
        return {name: tuple(value for fit in row for value in (fit.fixed, fit.slope)) for name, row in fits.items()}

    def cost_model(self) -> CostModel:
        """Cost model of all operations in order."""
        fits = [[getattr(operation, term) for term in TERMS] for operation in self.operations.values()]
        fixed = np.array([[fit.fixed for fit in row] for row in fits])
        return CostModel(fixed, np.array([[fit.slope for fit in row] for row in fits]))

    def save(self, path: str | Path) -> None:
        """Write atomically, with a SHA-256 of the content."""
        save_json(Path(path), self.model_dump(mode="json"))

    @classmethod
    def load(cls, path: str | Path, *, any_machine: bool = False) -> Profile:
        """Load a profile saved by `save`; raises `ProfileError` naming the file and the problem.

        Profiles of another machine or other library versions are rejected unless `any_machine`.
        """
        profile = parse(load_json(Path(path), ProfileError, MEND), str(path))
        if not any_machine:
            require_this_machine(profile, str(path))
        return profile


def parse(content: object, source: str) -> Profile:
    """Parse a profile from JSON; raises `ProfileError` naming `source` if invalid."""
    try:
        profile = Profile.model_validate(content)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise ProfileError(f"{source} is not a profile: {where}: {first['msg']}; {MEND}") from error
    if profile.schema_version not in READABLE:
        raise ProfileError(f"{source} has schema {profile.schema_version}; this moe-envs reads {READABLE}; {MEND}")
    return profile


def require_this_machine(profile: Profile, source: str) -> None:
    """Raise `ProfileError` naming the differences if the profile is of another machine or of other versions."""
    now, then = fingerprint(), profile.fingerprint
    changed = [f"{key} was {then.get(key)!r}, is {value!r}" for key, value in now.items() if then.get(key) != value]
    if changed:
        raise ProfileError(f"{source} is of another machine ({'; '.join(changed)}); {MEND}")


def measure(
    operations: Mapping[str, Work],
    sizes: Sequence[int] = SIZES,
    repeats: int = 50,
    *,
    device: str = "cpu",
    threads: int = 1,
    progress: bool = False,
) -> Profile:
    """Profile any callables: `operations[name](n)` is the operation on n inputs.

    If it returns a callable, only that callable is timed. Runs at least `repeats` (>= 50) rounds over all operations
    and sizes, so that a slow phase of the machine affects all of them equally, and more on a noisy host
    (`cost.timing`). Memory is the parameters used plus the peak of the created tensors.
    """
    require_device(device)
    settings = {"device": device, "threads": threads}
    return _measure([Case.of(name, work, sizes, **settings) for name, work in operations.items()], repeats, progress)


def measure_module(
    module: nn.Module,
    inputs: torch.Tensor,
    sizes: Sequence[int] = SIZES,
    repeats: int = 50,
    *,
    dtypes: Sequence[str] = ("float32",),
    devices: Sequence[str] = ("cpu",),
    threads: Sequence[int] = (1,),
    progress: bool = False,
) -> Profile:
    """Profile the forward pass of copies of a module, in evaluation mode, over a grid.

    A batch is the first n rows of `inputs [N, ...]`, repeated if n > N; dtypes are names of torch dtypes.
    """
    import torch

    if not isinstance(module, torch.nn.Module) or not len(inputs):
        raise ValueError(f"a torch module and inputs with at least one row are needed, got {type(module)}")

    cases = []
    with torch.inference_mode():
        for dtype, device in product(dtypes, devices):
            kind = getattr(torch, dtype, None)
            if not isinstance(kind, torch.dtype) or not kind.is_floating_point:
                raise ValueError(f"dtype={dtype!r} is not a floating-point type of torch, as 'float32' or 'bfloat16'")
            require_device(device)
            copied = copy.deepcopy(module).eval().to(device, kind)
            rows = inputs.to(device, kind if inputs.is_floating_point() else inputs.dtype)
            work = partial(forward, copied, rows)
            for count in threads:
                name = f"{dtype}, {device}, {count} thread{'s' * (count > 1)}"
                cases.append(Case.of(name, work, sizes, device=device, threads=count, dtype=dtype))
        return _measure(cases, repeats, progress)


def measure_experts(model: RoutedModel, inputs: np.ndarray, repeats: int = 200, progress: bool = False) -> Profile:
    """Profile experts as a routed layer runs them: gather n rows, run the expert, add the weighted result.

    `inputs [64, D]` first pass the model's trunk, which is not timed. Uses one thread. Memory is the weights (fixed)
    and outputs (slope) of an expert, without scratch space, which experts share.
    """
    import torch

    with torch.inference_mode():
        hidden = model.trunk(torch.from_numpy(inputs))
        cases = []
        for index, expert in enumerate(model.experts):
            work, held = partial(routed, expert, hidden), partial(weights_and_answers, expert, hidden)
            cases.append(Case.of(f"expert {index}", work, SIZES, held=held))
        return _measure(cases, repeats, progress)


def _measure(cases: list[Case], repeats: int, progress: bool) -> Profile:
    if not cases or len({case.name for case in cases}) < len(cases):
        raise ValueError(f"operations must be there and be different, got {[case.name for case in cases]}")
    timed = [Timed(run, case.threads, case.device) for case in cases for run in case.runs]
    sizes = np.array([size for case in cases for size in case.sizes])
    order = np.argsort(-sizes, kind="stable")  # a small one after a large one of another operation would be slow
    measured, noise = time_steadily([timed[place] for place in order], repeats, progress)
    seconds = np.empty_like(measured)
    seconds[order] = measured
    counters = {device: open_counter(device) for device in {case.device for case in cases}}
    parts = np.split(seconds, np.cumsum([len(case.runs) for case in cases])[:-1])
    operations = {}
    for case, part in zip(cases, parts, strict=True):
        with torch_threads(case.threads):
            operations[case.name] = describe(case, part, counters[case.device])
    return Profile(
        operations=operations,
        fingerprint=fingerprint(),
        created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        repeats=seconds.shape[1],
        energy_source=" / ".join(sorted({counter.source if counter else PROXY for counter in counters.values()})),
        noise=noise,
    )
