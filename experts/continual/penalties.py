"""Quadratic penalties that hold the weights which earlier tasks need: EWC and MAS, diagonal.

Only shared weights are held, those of trunk, gate and head; experts are free.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from experts.continual.network import ContinualNetwork
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
        self, network: ContinualNetwork, x: torch.Tensor, tasks_BT: torch.Tensor | None, generator: torch.Generator
    ) -> None:
        """Add the importances for inputs of a task that ends, each of its own gradient, and anchor the weights."""
        named = shared(network)
        found = {name: torch.zeros_like(weights) for name, weights in named.items()}
        rows = torch.randperm(len(x), generator=generator)[: self.settings.samples].tolist()
        for row in rows:
            tasks = None if tasks_BT is None else tasks_BT[row : row + 1]
            logits, _ = network(x[row : row + 1], tasks)
            if self.settings.kind == "ewc":  # the Fisher information: labels are the model's own
                label = torch.multinomial(logits.detach().softmax(-1), 1, generator=generator)[:, 0]
                value = F.cross_entropy(logits, label)
            else:
                value = logits.square().sum()
            gradients = torch.autograd.grad(value, list(named.values()), allow_unused=True)
            for name, gradient in zip(named, gradients, strict=True):
                if gradient is not None:
                    found[name] += (gradient.square() if self.settings.kind == "ewc" else gradient.abs()) / len(rows)
        for name, values in found.items():
            if name in self.importance:
                old = self.importance[name]
                values[tuple(slice(size) for size in old.shape)] += old
            self.importance[name], self.anchor[name] = values, named[name].detach().clone()

    def keep_experts(self, left: list[int]) -> None:
        """Drop the rows of experts that were merged away."""
        for part in (self.importance, self.anchor):
            for name in part:
                if name in PER_EXPERT:
                    rows = [expert for expert in left if expert < part[name].shape[PER_EXPERT[name]]]
                    part[name] = part[name].index_select(PER_EXPERT[name], torch.tensor(rows))

    def state(self) -> dict[str, torch.Tensor]:
        """All tensors by name."""
        return {f"importance/{name}": each for name, each in self.importance.items()} | {
            f"anchor/{name}": each for name, each in self.anchor.items()
        }

    def restore(self, state: dict[str, torch.Tensor], network: ContinualNetwork) -> None:
        """Take over a `state()`; raises `ValueError` where it does not fit the network."""
        for whole, each in state.items():
            kind, _, name = whole.partition("/")
            own = shared(network).get(name)
            if own is None or own.ndim != each.ndim or any(a > b for a, b in zip(each.shape, own.shape, strict=True)):
                raise ValueError(f"{whole} {tuple(each.shape)} does not fit the network")
            (self.importance if kind == "importance" else self.anchor)[name] = each


PER_EXPERT = {"moe.gate.weight": 0, "gate_bias": 0, "task_bias": 1}  # the dimension of the experts


def shared(network: ContinualNetwork) -> dict[str, torch.nn.Parameter]:
    """Weights of trunk, norm, gate and head by name."""
    return {
        name: weights for name, weights in network.named_parameters()
        if not name.startswith(("moe.experts", "moe.graph"))
    }  # fmt: skip
