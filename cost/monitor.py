"""A monitor watches what any torch training loop costs: `with Monitor(model, optimizer, every=10, path=DIR): ...`.

Files in the folder: `batches.csv` and `batches.jsonl`, a row for each batch that was measured; `epochs.csv` and
`epochs.jsonl`; `process.csv`, readings of the whole process; `monitor.json`, units, machine and the source of energies.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from cost.energy import PROXY, open_counter
from cost.files import write_text
from cost.logbook import Logbook, Row, table_line
from cost.machine import fingerprint
from cost.meters import EnergyMeter

if TYPE_CHECKING:
    import torch
    from torch import nn

SCHEMA = 1
PHASES = ("forward", "backward", "optimizer")
UNITS = {**dict.fromkeys((*PHASES, "total", "seconds", "at"), "s"), **dict.fromkeys(("rss", "device_memory"), "B")}
UNITS |= {"energy": "J", "cpu": "share of one CPU"}
MAX_SHAPES = 8  # of inputs, whose FLOPs are counted; more are priced like the last
# The backward pass of a product is two products as large as the forward's (Kaplan et al. 2020, section 2.1).
FORWARDS = 3
BATCH_PROXY = f"{PROXY}; counted in a forward pass and taken {FORWARDS} times, for forward and backward"


class Monitor:
    """Hooks round forward, backward and optimiser step; measures every `every`-th batch, a batch being one step.

    Two lines do it: the `with`, and `monitor.end_epoch(accuracy=...)` where an epoch ends. `monitor.record(loss=loss)`
    puts a batch's loss and accuracy beside its costs. On a CUDA device times are between events, read without waiting
    for the device; energy is the device's counter's, or the proxy's. A background thread reads the process every
    `interval` seconds and writes the files. Forward passes in evaluation mode or without gradients are not counted, nor
    is a batch whose FLOPs are counted for the proxy: the first of each shape of the model's first argument.
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
        self.model, self.optimizer, self.every, self.path, self.interval = model, optimizer, every, Path(path), interval
        if (self.path / "batches.csv").exists() and not overwrite:
            raise ValueError(f"{self.path} holds a monitor's logs; name another folder, or pass overwrite=True")
        self.epochs: list[Row] = []
        self._handles: list[Any] = []

    def __enter__(self) -> Monitor:
        return self.start()

    def __exit__(self, *error: object) -> None:
        self.close()

    def start(self) -> Monitor:
        """Attach the hooks and start the background thread; `close` undoes it."""
        import torch

        if self._handles:
            raise ValueError("this monitor is attached already")
        device = next((each.device for each in self.model.parameters()), torch.device("cpu"))
        self._cuda, self._grad, self._device_memory = (
            device.type == "cuda",
            torch.is_grad_enabled,
            torch.cuda.max_memory_allocated,
        )
        self._at_end_of_backward = torch.autograd.Variable._execution_engine.queue_callback
        self._mark: Callable[[], Any] = _event if self._cuda else time.perf_counter_ns
        self._counter = open_counter(str(device))
        self._joules: dict[Any, float] = {}
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
        self._measured, self._counted, self._energy = True, False, 0.0
        self._values: Row = {}
        self._sums: dict[str, tuple[Any, int]] = {}
        self._handles = [
            self.model.register_forward_pre_hook(self._before_forward),
            self.model.register_forward_hook(self._after_forward, always_call=True),
            self.optimizer.register_step_pre_hook(self._before_step),
            self.optimizer.register_step_post_hook(self._after_step),
        ]
        return self

    def close(self) -> None:
        """Take the hooks off and write what is left, an unfinished epoch included; a second call does nothing."""
        handles, self._handles = self._handles, []
        for handle in handles:
            handle.remove()
        if handles and self._batch > self._epoch_begins_at:
            self.end_epoch()
        if handles:
            self._log.close()

    def record(self, **values: float | torch.Tensor) -> None:
        """Put this batch's `loss` and `accuracy` beside its costs, before the step; no tensor is waited for."""
        for name, value in values.items():
            if name not in ("loss", "accuracy"):
                raise ValueError(f"record takes loss and accuracy, got {name!r}; end_epoch takes any name")
            if not isinstance(value, int | float):
                value = value.detach() if getattr(value, "is_cuda", False) else value.item()
            self._values[name] = value
            total, count = self._sums.get(name, (0.0, 0))
            self._sums[name] = total + value, count + 1

    def end_epoch(self, **metrics: float) -> Row:
        """Close an epoch: medians over its measured batches, its own time and energy, the means of what was recorded,
        and the metrics, as the accuracy on validation. Returns the row that `epochs.csv` gets."""
        self._wait()
        now, energy, rows = time.perf_counter(), self._log.energy(), self._log.flush()
        batches = self._batch - self._epoch_begins_at
        row: Row = {"epoch": len(self.epochs), "batches": batches, "measured": len(rows)}
        row["seconds"] = now - self._epoch_begun
        row |= {name: _median([each[name] for each in rows]) for name in (*PHASES, "total")}
        if self._counter is None:
            row["energy"] = float(np.mean([each["energy"] for each in rows])) * batches if rows else None
        else:
            row["energy"] = energy - self._epoch_energy
        row["rss"], row["device_memory"] = self._log.rss, max((each["device_memory"] or 0 for each in rows), default=0)
        row |= {name: float(total) / count for name, (total, count) in self._sums.items()}
        row |= {name: float(value) for name, value in metrics.items()}
        self.epochs.append(row)
        self._epoch_begun, self._epoch_energy, self._epoch_begins_at, self._sums = now, energy, self._batch, {}
        columns = list(dict.fromkeys(name for each in self.epochs for name in each))
        lines = [table_line(columns), *(table_line(each.get(name) for name in columns) for each in self.epochs)]
        self._log.replace("epochs.csv", "".join(lines))
        self._log.replace("epochs.jsonl", "".join(json.dumps(each) + "\n" for each in self.epochs))
        return row

    def _before_forward(self, module: nn.Module, arguments: tuple[Any, ...]) -> None:
        if self._measured and module.training and self._grad():
            if self._counter is None:
                self._price(arguments)
            self._forward.append(self._mark())

    def _after_forward(self, module: nn.Module, arguments: tuple[Any, ...], output: Any) -> None:
        if self._meter is not None:
            self._priced()
        if self._measured and module.training and self._grad():
            self._forward.append(self._mark())
            if (first := _first_tensor(output)) is not None:
                first.register_hook(self._before_backward)

    def _before_backward(self, gradient: torch.Tensor) -> None:
        self._backward.append(self._mark())
        self._at_end_of_backward(self._after_backward)

    def _after_backward(self) -> None:
        self._backward.append(self._mark())

    def _before_step(self, *_: object) -> None:
        if self._measured:
            self._step.append(self._mark())

    def _after_step(self, *_: object) -> None:
        if self._measured:
            self._step.append(self._mark())
            self._keep()
        self._batch += 1
        self._measured = self._batch % self.every == 0
        self._values = {}

    def _price(self, arguments: tuple[Any, ...]) -> None:
        """Add the proxy's energy of this forward pass; the first of its shape is run under the meter."""
        shape = getattr(arguments[0], "shape", None) if arguments else None
        if shape not in self._joules and len(self._joules) < MAX_SHAPES:
            self._counting, self._meter, self._counted = shape, EnergyMeter(source="proxy"), True
            self._meter.__enter__()
            return
        self._energy += self._joules[shape] if shape in self._joules else next(reversed(self._joules.values()))

    def _priced(self) -> None:
        assert self._meter is not None
        self._meter.__exit__(None, None, None)
        self._joules[self._counting] = FORWARDS * self._meter.reading.value
        self._meter = None

    def _keep(self) -> None:
        """Hand the batch to the logbook, its times and tensors to be read when the device has come so far."""
        if self._forward and not self._counted:
            energy = self._energy if self._counter is None else None
            marks = self._forward, self._backward, self._step
            memory = self._device_memory() if self._cuda else None
            self._log.add((self._batch, len(self.epochs), marks, energy, memory, self._values))
        self._forward, self._backward, self._step, self._energy, self._counted = [], [], [], 0.0, False

    def _finish(self, record: tuple[Any, ...]) -> Row | None:
        batch, epoch, marks, energy, memory, values = record
        forward, _, step = marks
        if self._cuda and not step[-1].query():
            return None
        total = self._seconds([forward[0], step[-1]])
        row = {"batch": batch, "epoch": epoch, "total": total, "device_memory": memory}
        row |= dict(zip(PHASES, map(self._seconds, marks), strict=True))
        row["energy"] = self._log.watts * total if energy is None else energy
        row["at"] = self._seconds([self._started, step[-1]])
        return row | {name: float(value) for name, value in values.items()}

    def _seconds(self, marks: list[Any]) -> float:
        """The sum of the times from each even mark to the next."""
        if self._cuda:
            return sum(begin.elapsed_time(end) for begin, end in zip(marks[::2], marks[1::2], strict=False)) * 1e-3
        return (sum(marks[1::2]) - sum(marks[: len(marks) // 2 * 2 : 2])) * 1e-9

    def _wait(self) -> None:
        if self._cuda:
            import torch

            torch.cuda.synchronize()


def _event() -> torch.cuda.Event:
    import torch

    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def _median(values: list[float]) -> float | None:
    return float(np.median(values)) if values else None


def _first_tensor(output: Any) -> torch.Tensor | None:
    """The first tensor with a gradient in a module's output: a tensor, or tuples, lists and dicts of them."""
    if hasattr(output, "requires_grad"):
        return output if output.requires_grad else None
    parts = output.values() if isinstance(output, dict) else output if isinstance(output, list | tuple) else ()
    return next((found for part in parts if (found := _first_tensor(part)) is not None), None)
