"""Quadratic penalties that hold the weights which earlier tasks need: EWC and MAS, diagonal.

Only shared weights are held, those of trunk, gate and head; experts are free.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F

from experts.continual.network import EXCLUDED, ContinualNetwork
from experts.continual.strategy import Penalty


class Importance:
    """Importances and anchors of shared weights by name, summed over tasks (Schwarz et al. 2018, without decay)."""

    def __init__(self, settings: Penalty) -> None:
        self.settings = settings
        self.importance = dict[str, torch.Tensor]()
        self.anchor = dict[str, torch.Tensor]()

    @property
    def nbytes(self) -> int:
        """Bytes of importances and anchors."""
        return sum(each.nbytes for part in (self.importance, self.anchor) for each in part.values())

    def loss(self, network: ContinualNetwork) -> torch.Tensor:
        """Half the weighted squared distance from the anchors, times `weight`; weights that came later are free."""
        total = network.head.bias.new_zeros(())
        for name, weights in shared(network).items():
            if name in self.importance:
                held, anchor = self.importance[name], self.anchor[name]
                own = weights[tuple(slice(size) for size in held.shape)]
                total = total + (held * (own - anchor).square()).sum()
        return 0.5 * self.settings.weight * total

    def update(
        self, network: ContinualNetwork, x: torch.Tensor, tasks_BT: torch.Tensor | None, generator: torch.Generator,
        of_task: Callable[[torch.Tensor], torch.Tensor] = lambda logits: logits,
    ) -> None:  # fmt: skip
        """Add the importances for inputs of a task that ends, each of its own gradient, and anchor the weights;
        `of_task` takes other tasks' classes out of the logits, if any."""
        named = shared(network)
        found = {name: torch.zeros_like(weights) for name, weights in named.items()}
        rows = torch.randperm(len(x), generator=generator)[: self.settings.samples].tolist()
        for row in rows:
            tasks = None if tasks_BT is None else tasks_BT[row : row + 1]
            logits = of_task(network(x[row : row + 1], tasks)[0])
            if self.settings.kind == "ewc":  # the Fisher information: labels are the model's own
                label = torch.multinomial(logits.detach().softmax(-1), 1, generator=generator)[:, 0]
                value = F.cross_entropy(logits, label)
            else:
                value = logits[logits > EXCLUDED].square().sum()
            gradients = torch.autograd.grad(value, list(named.values()), allow_unused=True)
            for name, gradient in zip(named, gradients, strict=True):
                if gradient is not None:
                    found[name] += (gradient.square() if self.settings.kind == "ewc" else gradient.abs()) / len(rows)
        for name, values in found.items():
            if name in self.importance:
                old = self.importance[name]
                values[tuple(slice(size) for size in old.shape)] += old
            self.importance[name], self.anchor[name] = values, named[name].detach().clone()

    @torch.no_grad()
    def merge(self, one: int, other: int, network: ContinualNetwork) -> None:
        """Follow two experts that became one: its importance is the sum of both, its anchor what it is now."""
        named = shared(network)
        for name, dimension in PER_EXPERT.items():
            held, anchor = (part[name].movedim(dimension, 0) for part in (self.importance, self.anchor))
            left = [expert for expert in range(len(held)) if expert != other]
            held = held.clone()
            held[one] += held[other]
            anchor = anchor[left].clone()
            anchor[one] = named[name].movedim(dimension, 0)[one]
            self.importance[name] = held[left].movedim(0, dimension).contiguous()
            self.anchor[name] = anchor.movedim(0, dimension).contiguous()

    def state(self) -> dict[str, torch.Tensor]:
        """All tensors by name."""
        return {f"importance/{name}": each for name, each in self.importance.items()} | {
            f"anchor/{name}": each for name, each in self.anchor.items()
        }

    def restore(self, state: dict[str, torch.Tensor], network: ContinualNetwork) -> None:
        """Take over a `state()`; raises `ValueError` where it does not fit the network."""
        named = shared(network)
        if state and set(state) != {f"{kind}/{name}" for kind in ("importance", "anchor") for name in named}:
            raise ValueError("the penalty is of other weights than the network has")
        for whole, each in state.items():
            kind, _, name = whole.partition("/")
            own = named[name]
            if own.ndim != each.ndim or any(a > b for a, b in zip(each.shape, own.shape, strict=True)):
                raise ValueError(f"{whole} {tuple(each.shape)} does not fit the network")
            (self.importance if kind == "importance" else self.anchor)[name] = each
        for name, dimension in PER_EXPERT.items() if state else ():
            if self.importance[name].shape != self.anchor[name].shape:
                raise ValueError(f"importance and anchor of {name} differ in shape")
            if self.importance[name].shape[dimension] < named[name].shape[dimension] - 1:
                raise ValueError(f"the penalty of {name} is of fewer experts than the network has")


PER_EXPERT = {"moe.gate.weight": 0, "gate_bias": 0, "task_bias": 1}  # the dimension of the experts


def shared(network: ContinualNetwork) -> dict[str, torch.nn.Parameter]:
    """Weights of trunk, norm, gate and head by name."""
    return {
        name: weights for name, weights in network.named_parameters()
        if not name.startswith(("moe.experts", "moe.graph"))
    }  # fmt: skip
