"""A classifier of several MoE layers, and its training: the place where routers, graphs and regularisers are compared.

Shape legend: B inputs, D width, C classes, E experts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from experts.graph import ExpertGraph, parameter_groups
from experts.layers import MoELayer
from experts.losses import diversity_loss, drift_loss
from experts.routers import Router, RoutingStatistics, make_router
from experts.threads import reproducible

PROBED = 32  # inputs of a batch on which all experts are run for the diversity loss


class MoENetwork(nn.Module):
    """A linear embedding, residual MoE layers each behind a root-mean-square norm, and a linear head, of flat inputs.

    `router` is a name of `experts.routers.ROUTERS`, or a router; `graph` the arguments of an `ExpertGraph` for each
    layer; `copy_experts` and `zero_experts` are those of `MoELayer`.
    """

    def __init__(
        self,
        num_inputs: int,
        num_classes: int,
        *,
        d_model: int = 64,
        d_ff: int = 32,
        num_experts: int = 8,
        num_layers: int = 2,
        k: int = 2,
        router: str | Router = "topk",
        router_options: Mapping[str, Any] | None = None,
        graph: Mapping[str, Any] | None = None,
        copy_experts: int = 0,
        zero_experts: int = 0,
    ) -> None:
        super().__init__()
        self.settings = {
            "num_inputs": num_inputs, "num_classes": num_classes, "d_model": d_model, "d_ff": d_ff,
            "num_experts": num_experts, "num_layers": num_layers, "k": k, "router": router,
            "router_options": dict(router_options or {}), "graph": None if graph is None else dict(graph),
            "copy_experts": copy_experts, "zero_experts": zero_experts,
        }  # fmt: skip
        options = dict(router_options or {})
        self.embedding = nn.Linear(num_inputs, d_model)
        self.norms = nn.ModuleList(nn.RMSNorm(d_model) for _ in range(num_layers))
        self.head = nn.Linear(d_model, num_classes)
        self.layers = nn.ModuleList()
        for seed in torch.randint(2**31, (num_layers,)).tolist():  # the same experts whatever gates and graphs draw
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)
                layer = MoELayer(
                    d_model, d_ff, num_experts, router=make_router(router, k, options), copy_experts=copy_experts,
                    zero_experts=zero_experts,
                )  # fmt: skip
                if graph is not None:
                    layer.graph = ExpertGraph.for_outputs(num_experts, d_model, **graph)
            self.layers.append(layer)

    def forward(
        self, x_BD: torch.Tensor, generator: torch.Generator | None = None
    ) -> tuple[torch.Tensor, list[RoutingStatistics]]:
        """Class logits `[B, C]`, and the statistics of each layer's routing."""
        h_BD, statistics = self.embedding(x_BD), []
        for norm, layer in zip(self.norms, self.layers, strict=True):
            mixed_BD, found = layer(norm(h_BD), generator)
            h_BD = h_BD + mixed_BD
            statistics.append(found)
        return self.head(h_BD), statistics

    def probe(self, x_BD: torch.Tensor) -> list[torch.Tensor]:
        """What every expert of each layer returns for the same inputs, `[B, E, D]`."""
        h_BD, found = self.embedding(x_BD), []
        for norm, layer in zip(self.norms, self.layers, strict=True):
            given_BD = norm(h_BD)
            found.append(torch.stack([expert(given_BD) for expert in layer.experts], dim=1))  # type: ignore[union-attr]
            h_BD = h_BD + layer(given_BD)[0]
        return found


@dataclass(frozen=True, kw_only=True)
class NetworkSettings:
    """Of a training by AdamW with a rate that falls to 0 in a straight line; that of a graph's edges, which are logits
    and do not decay, is `edge_rate` times as large. Beside the cross-entropy the loss has, for each layer and times
    these weights: `balance` the load-balancing loss, whose inputs count by the entropy of their gate with
    `entropy_weighted`; `z` the z-loss; `sparsity` the L1 of the graph's edges; `diversity` the likeness of experts'
    outputs; and `drift` the distance of experts from their own moving average."""

    epochs: int = 10
    batch_size: int = 128
    learning_rate: float = 2e-3
    edge_rate: float = 10.0
    weight_decay: float = 0.01
    balance: float = 0.02
    entropy_weighted: bool = False
    z: float = 0.0
    sparsity: float = 0.01
    diversity: float = 0.0
    drift: float = 0.0
    drift_memory: float = 0.99
    seed: int = 0


def train_network(
    make: Callable[[], MoENetwork],
    inputs: np.ndarray,
    labels: np.ndarray,
    settings: NetworkSettings,
    after_epoch: Callable[[int, MoENetwork], object] = lambda epoch, network: None,
) -> MoENetwork:
    """A network that `make` builds, trained on inputs `[n, d]` float32 and labels `[n]`; the same bits for the same
    seed, with one torch thread, torch's own generator as it was before. `after_epoch` is called with
    -1 before the first one as well."""
    with reproducible(settings.seed):
        return _train(make(), torch.from_numpy(inputs), torch.from_numpy(labels), settings, after_epoch)


def _train(
    network: MoENetwork, x: torch.Tensor, y: torch.Tensor, settings: NetworkSettings,
    after_epoch: Callable[[int, MoENetwork], object],
) -> MoENetwork:  # fmt: skip
    order, noise = (torch.Generator().manual_seed(settings.seed + more) for more in (0, 2**32))
    groups = parameter_groups(network, settings.learning_rate, settings.edge_rate, settings.weight_decay)
    optimizer = torch.optim.AdamW(groups, fused=True)
    steps = settings.epochs * -(-len(x) // settings.batch_size)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: max(0.0, 1 - step / steps))
    before = [[weights.detach().clone() for weights in _of_experts(layer)] for layer in network.layers]
    after_epoch(-1, network)
    for epoch in range(settings.epochs):
        network.train()
        for rows in torch.randperm(len(x), generator=order).split(settings.batch_size):
            loss = network_loss(network, x[rows], y[rows], settings, before, noise)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            for layer, average in zip(network.layers, before if settings.drift else [], strict=False):
                for mean, weights in zip(average, _of_experts(layer), strict=True):
                    mean.lerp_(weights.detach(), 1 - settings.drift_memory)
        network.eval()
        after_epoch(epoch, network)
    return network


def network_loss(
    network: MoENetwork, x: torch.Tensor, y: torch.Tensor, settings: NetworkSettings,
    averages: list[list[torch.Tensor]], generator: torch.Generator | None = None,
) -> torch.Tensor:  # fmt: skip
    """The loss of one batch; `averages` are the moving averages of each layer's experts' weights."""
    logits, statistics = network(x, generator)
    loss = F.cross_entropy(logits, y)
    for layer, found in zip(network.layers, statistics, strict=True):
        balance = found.entropy_weighted_balance_loss if settings.entropy_weighted else found.balance_loss
        loss = loss + settings.balance * balance + (settings.z * found.z_loss if settings.z else 0)
        if isinstance(graph := layer.graph, ExpertGraph):
            loss = loss + settings.sparsity * graph.sparsity_loss()
    if settings.diversity:
        loss = loss + settings.diversity * sum(diversity_loss(each) for each in network.probe(x[:PROBED]))
    if settings.drift:
        parts = zip(network.layers, averages, strict=True)
        loss = loss + settings.drift * sum(drift_loss(_of_experts(layer), average) for layer, average in parts)
    return loss


def _of_experts(layer: nn.Module) -> list[torch.Tensor]:
    assert isinstance(layer, MoELayer)
    return list(layer.experts.parameters())
