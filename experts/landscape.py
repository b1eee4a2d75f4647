"""Loss landscape of a model along random filter-normalised directions (Li et al. 2018)."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import nn


def direction(model: nn.Module, seed: int) -> list[torch.Tensor]:
    """A normal draw for each parameter, every row of a matrix (every filter) scaled to the norm of the model's own;
    0 for biases and norms. A step of 1 along it is as large as the weights, whatever their scale."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for weights in model.parameters():
        drawn = torch.randn(weights.shape, generator=generator).to(weights)
        if weights.ndim < 2:
            found.append(torch.zeros_like(weights))
            continue
        norms = (part.flatten(1).norm(dim=1).view(-1, *[1] * (weights.ndim - 1)) for part in (weights.detach(), drawn))
        own, other = norms
        found.append(drawn * (own / other.clamp_min(1e-12)))
    return found


@torch.no_grad()
def landscape(
    model: nn.Module, loss: Callable[[], torch.Tensor], positions: np.ndarray, seeds: tuple[int, ...] = (0,)
) -> np.ndarray:
    """The loss at all `positions` along the directions of `seeds`: `[n]` for one, `[n, n]` for two.

    `loss()` is called with shifted weights; they are restored bit for bit afterwards.
    """
    parameters, before = list(model.parameters()), [weights.clone() for weights in model.parameters()]
    along = [direction(model, seed) for seed in seeds]
    found = np.zeros((len(positions),) * len(seeds))
    try:
        for place in np.ndindex(*found.shape):
            for number, weights in enumerate(parameters):
                moved = sum(float(positions[i]) * each[number] for i, each in zip(place, along, strict=True))
                weights.copy_(before[number] + moved)
            found[place] = float(loss())
    finally:
        for weights, kept in zip(parameters, before, strict=True):
            weights.copy_(kept)
    return found
