"""Monitor the costs of any torch training loop: `with Monitor(model, optimizer, every=10, path=DIR): ...`.

Files in the folder: `batches.csv` and `batches.jsonl`, one row per measured batch; `epochs.csv` and
`epochs.jsonl`; `process.csv`, readings of the whole process; `monitor.json`, units, machine and energy source.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable
from dataclasses import is_dataclass
from math import isfinite
from pathlib import Path
from statistics import fmean, median
from typing import TYPE_CHECKING, Any

from cost.energy import PROXY, open_counter
from cost.files import write_text
from cost.logbook import Logbook, Row
from cost.machine import fingerprint
from cost.meters import EnergyMeter, require_device

if TYPE_CHECKING:
    import torch
    from torch import nn

log = logging.getLogger("cost")
SCHEMA = 1
PHASES = ("forward", "backward", "optimizer")
UNITS = {**dict.fromkeys((*PHASES, "total", "seconds", "at"), "s"), **dict.fromkeys(("rss", "device_memory"), "B")}
UNITS |= {"energy": "J", "cpu": "share of one CPU"}
RESERVED = {"epoch", "batches", "measured", "seconds", *PHASES, "total", "energy", "rss", "device_memory", "finite"}
MAX_SHAPES = 8  # input shapes with counted FLOPs; further shapes are scaled from the last one by size
# The backward pass of a product has two products of the same size (Kaplan et al. 2020, section 2.1).
FORWARDS = 3
BATCH_PROXY = f"{PROXY}; counted in a forward pass and taken {FORWARDS} times, for forward and backward"


class Monitor:
    """Measures forward pass, backward pass and optimiser step of every `every`-th batch; a batch is one step.

    It needs two lines: the `with`, and `monitor.end_epoch(accuracy=...)` at the end of each epoch. Call
    `monitor.record(loss=loss)` before the step to log the loss and accuracy of a batch. On a CUDA device, times are
    measured by events without synchronisation, and `device_memory` is the peak of the allocator so far. Energy comes
    from a counter or the proxy. A background thread samples the process every `interval` seconds and writes the files.

    The model must be called as `model(x)`. Forward passes in evaluation mode or without gradients are not measured, nor
    is the first batch of each set of input shapes, whose FLOPs are counted for the proxy. Several forward passes before
    one step add up, and those of a skipped step count for the next step. If the optimiser calls a closure, its passes
    count as optimiser time. If no backward pass is seen, its time is empty.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        every: int = 10,
        path: str | Path = "runs/monitor",
        *,
        interval: float = 0.5,
        overwrite: bool = False,
    ) -> None:
        if every < 1 or interval <= 0:
            raise ValueError(f"every must be >= 1 and interval > 0, got {every} and {interval}")
        if not hasattr(model, "register_forward_hook") or not hasattr(optimizer, "register_step_pre_hook"):
            raise ValueError(
                f"a torch module and a torch optimiser are needed, got {type(model)} and {type(optimizer)}"
            )
        self.model, self.optimizer, self.every, self.path = model, optimizer, every, Path(path)
        self.interval, self.overwrite = interval, overwrite
        self.epochs: list[Row] = []
        self._handles: list[Any] = []
        self._watching: list[Any] = []
        self._check_folder()

    def __enter__(self) -> Monitor:
        return self.start()

    def __exit__(self, *error: object) -> None:
        self.close()

    def start(self) -> Monitor:
        """Attach the hooks and start the background thread; `close` undoes it."""
        import torch

        if self._handles:
            raise ValueError("this monitor is attached already")
        self._check_folder()
        self._device = next((each.device for each in self.model.parameters()), torch.device("cpu"))
        require_device(str(self._device))
        self._cuda, self._grad = self._device.type == "cuda", torch.is_grad_enabled
        self._at_end_of_backward = torch.autograd.Variable._execution_engine.queue_callback
        self._mark: Callable[[], Any] = self._event if self._cuda else time.perf_counter_ns
        self._counter = open_counter(str(self._device))
        self._prices: dict[Any, tuple[float, int]] = {}  # by shapes: joules, number of elements
        self._meter: EnergyMeter | None = None
        about = {"schema": SCHEMA, "every": self.every, "units": UNITS, "fingerprint": fingerprint()}
        about["energy_source"] = self._counter.source if self._counter else BATCH_PROXY
        self.epochs, self._batch, self._epoch_begins_at = [], 0, 0
        self._log = Logbook(self.path, self.interval, self._counter, self._finish)
        write_text(self.path / "monitor.json", json.dumps(about, indent=1))
        self._epoch_begun, self._epoch_energy, self._started = time.perf_counter(), 0.0, self._mark()
        self._forward: list[Any] = []  # marks of beginnings and ends
        self._backward: list[Any] = []
        self._step: list[Any] = []
        self._backward_begun: Any = None
        self._counted, self._energy, self._warned = False, 0.0, False
        self._values: Row = {}
        self._sums: dict[str, tuple[Any, int]] = {}
        self._handles = [self.optimizer.register_step_post_hook(self._after_step)]
        self._watch()
        return self

    def close(self) -> None:
        """Remove the hooks and write the remaining rows, including an unfinished epoch; a second call does nothing."""
        handles, self._handles = self._handles, []
        for handle in handles:
            handle.remove()
        if not handles:
            return
        self._watch(False)
        if self._meter is not None:  # a forward pass was interrupted under it
            self._meter.__exit__(None, None, None)
        try:
            if self._batch > self._epoch_begins_at:
                self.end_epoch()
        finally:
            self._log.close()

    def record(self, **values: float | torch.Tensor) -> None:
        """Log the `loss` and `accuracy` of this batch before its step, without synchronisation."""
        for name, value in values.items():
            if name not in ("loss", "accuracy"):
                raise ValueError(f"record takes loss and accuracy, got {name!r}; end_epoch takes any name")
            if not isinstance(value, int | float):
                value = value.detach().reshape(()) if getattr(value, "is_cuda", False) else value.item()
            self._values[name] = value
            total, count = self._sums.get(name, (0.0, 0))
            self._sums[name] = total + value, count + 1

    def end_epoch(self, **metrics: float) -> Row:
        """End an epoch and return its row of `epochs.csv`: medians over the measured batches, time and energy of the
        epoch, means of the recorded values, and the given metrics. `finite` tells whether all recorded values were."""
        given = {name: float(value) for name, value in metrics.items()}
        if reserved := RESERVED & given.keys():
            raise ValueError(f"{', '.join(sorted(reserved))}: the monitor's own columns; choose other names")
        self._wait()
        now, energy, rows = time.perf_counter(), self._log.energy(), self._log.take()
        batches = self._batch - self._epoch_begins_at
        row: Row = {"epoch": len(self.epochs), "batches": batches, "measured": len(rows)}
        row["seconds"] = now - self._epoch_begun
        row |= {name: _median([each[name] for each in rows]) for name in (*PHASES, "total")}
        if self._counter is None:
            row["energy"] = fmean(each["energy"] for each in rows) * batches if rows else None
        else:
            row["energy"] = energy - self._epoch_energy
        row["rss"] = self._log.rss
        row["device_memory"] = max((each["device_memory"] for each in rows), default=0) if self._cuda else None
        recorded = {name: float(total) / count for name, (total, count) in self._sums.items()}
        row |= recorded | given | {"finite": all(map(isfinite, recorded.values()))}
        self.epochs.append(row)
        self._epoch_begun, self._epoch_energy, self._epoch_begins_at, self._sums = now, energy, self._batch, {}
        self._log.end_epoch(row)
        return row

    def _check_folder(self) -> None:
        if (self.path / "batches.csv").exists() and not self.overwrite:
            raise ValueError(f"{self.path} holds a monitor's logs; name another folder, or pass overwrite=True")

    def _watch(self, measured: bool = True) -> None:
        """Attach all hooks for a measured batch; other batches run one hook only."""
        self._measured = measured
        if measured and not self._watching:
            self._watching = [
                self.model.register_forward_pre_hook(self._before_forward, with_kwargs=True),
                self.model.register_forward_hook(self._after_forward, always_call=True),
                self.optimizer.register_step_pre_hook(self._before_step),
            ]
        elif not measured:
            for handle in self._watching:
                handle.remove()
            self._watching = []

    def _before_forward(self, module: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        if module.training and self._grad():
            self._backward_begun = None  # of a backward pass that did not end
            if len(self._forward) % 2:  # a forward pass was interrupted
                self._forward.pop()
            if self._counter is None:
                self._price(arguments, keywords)
            self._forward.append(self._mark())

    def _after_forward(self, module: nn.Module, arguments: tuple[Any, ...], output: Any) -> None:
        if self._meter is not None:
            self._priced(output)
        if module.training and self._grad():
            self._forward.append(self._mark())
            for tensor in _tensors(output):
                if tensor.requires_grad:
                    tensor.register_hook(self._before_backward)

    def _before_backward(self, gradient: torch.Tensor) -> None:
        if self._backward_begun is None:
            self._backward_begun = self._mark()
            self._at_end_of_backward(self._after_backward)

    def _after_backward(self) -> None:
        self._backward += [self._backward_begun, self._mark()]
        self._backward_begun = None

    def _before_step(self, *_: object) -> None:
        self._step = [*self._step[: len(self._step) // 2 * 2], self._mark()]  # less one that was interrupted

    def _after_step(self, *_: object) -> None:
        if self._measured:
            self._step.append(self._mark())
            self._keep()
        self._batch += 1
        if (measured := self._batch % self.every == 0) is not self._measured:
            self._watch(measured)
        self._values = {}

    def _price(self, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        """Add the proxy energy of this forward pass; the first pass of each shape runs under the meter."""
        inputs = _tensors((arguments, keywords))
        shapes = tuple(each.shape for each in inputs)
        if shapes not in self._prices and len(self._prices) < MAX_SHAPES:
            self._pricing, self._meter, self._counted = (shapes, inputs), EnergyMeter(source="proxy"), True
            self._meter.__enter__()
            return
        joules, elements = self._prices.get(shapes) or next(reversed(self._prices.values()))
        self._energy += joules if shapes in self._prices else joules / elements * sum(each.numel() for each in inputs)

    def _priced(self, output: Any) -> None:
        assert self._meter is not None
        self._meter.__exit__(None, None, None)
        if output is not None:  # else the forward pass has failed
            shapes, inputs = self._pricing
            self._prices[shapes] = FORWARDS * self._meter.reading.value, max(1, sum(each.numel() for each in inputs))
        self._meter, self._pricing = None, ((), [])

    def _keep(self) -> None:
        """Pass the batch to the logbook, which reads its times and tensors once the device is done."""
        if self._forward and not self._counted:
            energy = self._energy if self._counter is None else None
            marks = self._forward, self._backward, self._step
            memory = self._device_memory() if self._cuda else None
            self._log.add((self._batch, len(self.epochs), marks, energy, memory, self._values))
        elif not self._forward and not self._warned:
            self._warned = True
            log.warning("no forward pass before a step: the model must be called, as model(x), in training mode")
        self._forward, self._backward, self._step, self._energy, self._counted = [], [], [], 0.0, False

    def _finish(self, record: tuple[Any, ...]) -> Row | None:
        batch, epoch, marks, energy, memory, values = record
        forward, _, step = marks
        if self._cuda and not step[-1].query():
            return None
        total = self._seconds([forward[0], step[-1]])
        row = {"batch": batch, "epoch": epoch, "total": total, "device_memory": memory}
        row |= {phase: self._seconds(each) if each else None for phase, each in zip(PHASES, marks, strict=True)}
        row["energy"] = self._log.watts * total if energy is None else energy
        row["at"] = self._seconds([self._started, step[-1]])
        return row | {name: float(value) for name, value in values.items()}

    def _seconds(self, marks: list[Any]) -> float:
        """Sum of the times from each even mark to the next."""
        if self._cuda:
            return sum(begin.elapsed_time(end) for begin, end in zip(marks[::2], marks[1::2], strict=True)) * 1e-3
        return (sum(marks[1::2]) - sum(marks[::2])) * 1e-9

    def _event(self) -> torch.cuda.Event:
        import torch

        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self._device))
        return event

    def _device_memory(self) -> int:
        import torch

        return torch.cuda.max_memory_allocated(self._device)

    def _wait(self) -> None:
        if self._cuda:
            import torch

            torch.cuda.synchronize(self._device)


def _median(values: list[float | None]) -> float | None:
    there = [value for value in values if value is not None]
    return median(there) if there else None


def _tensors(value: Any) -> list[torch.Tensor]:
    """Tensors in a module's inputs or output, including those in tuples, lists, dicts and dataclasses."""
    if hasattr(value, "requires_grad"):
        return [value]
    if is_dataclass(value) and not isinstance(value, dict):
        value = vars(value)
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()
    return [tensor for part in parts for tensor in _tensors(part)]
