"""Meters: `with Clock() as reading: ...` and `with TensorMemory() as reading: ...`, also as decorators."""

import time
import weakref
from contextlib import ContextDecorator
from dataclasses import dataclass
from types import TracebackType
from typing import Any


@dataclass
class Reading:
    """What a meter read: the value, in the unit named."""

    value: float
    unit: str


class Clock(ContextDecorator):
    """Wall time in seconds; `thread=True` reads the calling thread's CPU time instead."""

    def __init__(self, thread: bool = False) -> None:
        self._now = time.thread_time_ns if thread else time.perf_counter_ns

    def __enter__(self) -> Reading:
        self.reading = Reading(0.0, "s")
        self._start = self._now()
        return self.reading

    def __exit__(self, *error: object) -> None:
        self.reading.value = (self._now() - self._start) * 1e-9


class TensorMemory(ContextDecorator):
    """Peak bytes of the tensors that torch operations allocate inside the block, beyond what was held at its start.

    On a CUDA machine `device="cuda"` reads the allocator's own peak; on the CPU every new storage is counted from its
    creation to its release, which finds what operations return and not the scratch space inside one operation.
    """

    def __init__(self, device: str = "cpu") -> None:
        self.device = device

    def __enter__(self) -> Reading:
        import torch

        self.reading = Reading(0.0, "B")
        if self.device == "cuda":
            if not torch.cuda.is_available():
                raise RuntimeError("no CUDA device: use TensorMemory('cpu'), or install a CUDA build of torch")
            torch.cuda.reset_peak_memory_stats()
            self._held = torch.cuda.memory_allocated()
        else:
            self._tracker = _storage_tracker(self.reading)
            self._tracker.__enter__()
        return self.reading

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        import torch

        if self.device == "cuda":
            self.reading.value = float(torch.cuda.max_memory_allocated() - self._held)
        else:
            self._tracker.__exit__(kind, error, trace)


def _storage_tracker(reading: Reading) -> Any:
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_iter

    class StorageTracker(TorchDispatchMode):
        def __init__(self) -> None:
            super().__init__()  # type: ignore[no-untyped-call]
            self.known: weakref.WeakSet[torch.UntypedStorage] = weakref.WeakSet()
            self.held = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            for old in tree_iter((args, kwargs)):
                if isinstance(old, torch.Tensor):
                    self.known.add(old.untyped_storage())
            result = func(*args, **(kwargs or {}))
            for new in tree_iter(result):
                if isinstance(new, torch.Tensor) and new.untyped_storage() not in self.known:
                    self._hold(new.untyped_storage())
            reading.value = max(reading.value, float(self.held))
            return result

        def _hold(self, storage: torch.UntypedStorage) -> None:
            self.known.add(storage)
            self.held += storage.nbytes()
            weakref.finalize(storage, self._release, storage.nbytes())

        def _release(self, size: int) -> None:
            self.held -= size

    return StorageTracker()
