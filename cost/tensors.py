"""Bytes of the tensors created and the weights used by torch operations."""

import weakref
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter


class StorageTracker(TorchDispatchMode):
    """Counts every new storage from its creation to its release, and every parameter used, once.

    It counts returned tensors, not scratch space inside an operation. Sparse tensors are not counted.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.peak = self.held = self.weights = 0
        self._known: weakref.WeakSet[torch.UntypedStorage] = weakref.WeakSet()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for old in tree_iter((args, kwargs)):
            if _has_storage(old) and old.untyped_storage() not in self._known:
                self._known.add(old.untyped_storage())
                self.weights += old.untyped_storage().nbytes() if isinstance(old, torch.nn.Parameter) else 0
        result = func(*args, **(kwargs or {}))
        for new in tree_iter(result):
            if _has_storage(new) and new.untyped_storage() not in self._known:
                self._hold(new.untyped_storage())
        self.peak = max(self.peak, self.held)
        return result

    def _hold(self, storage: torch.UntypedStorage) -> None:
        self._known.add(storage)
        self.held += storage.nbytes()
        weakref.finalize(storage, self._release, storage.nbytes())

    def _release(self, size: int) -> None:
        self.held -= size


def _has_storage(value: object) -> bool:
    return isinstance(value, torch.Tensor) and value.layout is torch.strided
