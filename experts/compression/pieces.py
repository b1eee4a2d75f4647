"""The matrices of a model that are compressed one by one: of linear and convolutional layers, and of each expert."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from experts.model import ExpertStack


class Piece(NamedTuple):
    """A matrix `[outputs, inputs]` inside a model: `view` gives it as a view of the model's memory."""

    kind: str  # "conv", "linear", "gate", "expert in", "expert out"
    expert: int  # -1 outside the experts
    view: Callable[[], torch.Tensor]

    @property
    def shape(self) -> tuple[int, int]:
        rows, columns = self.view().shape
        return rows, columns

    def read(self) -> np.ndarray:
        """A copy, float32."""
        return self.view().detach().float().numpy(force=True).copy()

    def write(self, weights: np.ndarray) -> None:
        """Put a matrix into the model."""
        with torch.no_grad():
            self.view().copy_(torch.from_numpy(weights))


def pieces(model: nn.Module) -> dict[str, Piece]:
    """The matrices of a model by name, in the order of its modules."""
    found: dict[str, Piece] = {}
    stacks = [name for name, module in model.named_modules() if isinstance(module, ExpertStack)]
    for name, module in model.named_modules():
        if isinstance(module, ExpertStack):
            found |= _of_stack(name, module)
        elif isinstance(module, nn.Linear | nn.Conv2d) and not any(name.startswith(f"{each}.") for each in stacks):
            kind = "conv" if isinstance(module, nn.Conv2d) else "gate" if name.endswith("gate") else "linear"
            found[name] = Piece(kind, -1, lambda module=module: module.weight.flatten(1))  # type: ignore[misc]
    return found


def _of_stack(name: str, stack: ExpertStack) -> dict[str, Piece]:
    ends = np.cumsum(stack.widths)
    found = {}
    for expert, end in enumerate(ends.tolist()):
        rows = slice(end - stack.widths[expert], end)
        found[f"{name}.{expert}.in"] = Piece(
            "expert in",
            expert,
            lambda rows=rows: stack.hidden.weight[rows],  # type: ignore[misc]
        )
        found[f"{name}.{expert}.out"] = Piece(
            "expert out",
            expert,
            lambda rows=rows: stack.out_HC[rows].T,  # type: ignore[misc]
        )
    return found


def other_parameters(model: nn.Module) -> dict[str, torch.Tensor]:
    """What is in no piece and kept as it is: biases, norms and buffers that are saved."""
    within = {piece.view().untyped_storage().data_ptr() for piece in pieces(model).values()}
    return {
        name: tensor for name, tensor in model.state_dict().items() if tensor.untyped_storage().data_ptr() not in within
    }


@torch.no_grad()
def importance(model: nn.Module, inputs: torch.Tensor) -> dict[str, np.ndarray]:
    """For each piece the mean squares of its inputs `[I]`, over examples `[n, ...]`."""
    found: dict[str, torch.Tensor] = {}
    names = {id(module): name for name, module in model.named_modules()}

    def watch(module: nn.Module, given: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        name, x = names[id(module)], given[0]
        if isinstance(module, ExpertStack):
            hidden = module.hidden(x).relu().square().mean(0)
            for expert, end in enumerate(np.cumsum(module.widths).tolist()):
                found[f"{name}.{expert}.in"] = x.square().mean(0)
                found[f"{name}.{expert}.out"] = hidden[end - module.widths[expert] : end]
        elif isinstance(module, nn.Conv2d):
            patches = F.unfold(x, module.kernel_size, module.dilation, module.padding, module.stride)  # type: ignore[arg-type]
            found[name] = patches.square().mean((0, 2))
        else:
            found[name] = x.square().flatten(0, -2).mean(0)

    with _watching(model, watch):
        model(inputs)
    return {name: found[name].numpy(force=True) for name in pieces(model)}


@contextmanager
def _watching(model: nn.Module, watch: Callable[..., None]) -> Iterator[None]:
    kinds = (ExpertStack, nn.Linear, nn.Conv2d)
    handles = [module.register_forward_hook(watch) for module in model.modules() if isinstance(module, kinds)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
