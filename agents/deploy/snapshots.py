"""Copies of a training's state: weights, buffers of modules, and the optimiser."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

import torch

Snapshot = dict[str, Any]  # `tensors` and `optimizer`


def weights_of(optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    """All parameters of an optimiser."""
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def take(optimizer: torch.optim.Optimizer, buffers: Iterable[torch.Tensor] = ()) -> Snapshot:
    """Copy the weights, these buffers, and the optimiser's state with its groups' settings."""
    tensors = [each.detach().clone() for each in (*weights_of(optimizer), *buffers)]
    return {"tensors": tensors, "optimizer": copy.deepcopy(optimizer.state_dict())}


@torch.no_grad()
def put_back(kept: Snapshot, optimizer: torch.optim.Optimizer, buffers: Iterable[torch.Tensor] = ()) -> None:
    """Restore a snapshot, learning rates included; it stays as it is."""
    for tensor, value in zip((*weights_of(optimizer), *buffers), kept["tensors"], strict=True):
        tensor.copy_(value)
    optimizer.load_state_dict(copy.deepcopy(kept["optimizer"]))
