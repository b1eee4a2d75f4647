"""A classifier that grows: a trunk, one layer of experts and a head, which take more experts and classes at any time.

Shape legend: B inputs, D features, E experts, T tasks, C classes.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from experts.continual.strategy import NetworkShape
from experts.graph import ExpertGraph
from experts.layers import MoELayer, SwiGLU
from experts.routers import Router, Routing, RoutingStatistics, make_router

EXCLUDED = -1e9  # logit of a class that cannot be
CLOSED = -1e4  # bias of the gate's logit of an expert that nothing reaches
SHARPNESS = 20.0  # of the softmax over the similarities with tasks
LIKENESS = 256  # inputs on which the outputs of experts are compared


class ContinualNetwork(nn.Module):
    """Inputs `[B, ...]` to class logits `[B, C]`; the mean trunk feature of a task is its signature.

    A new expert is unreachable, its gate bias is `CLOSED`, so outputs stay as they are until `open` sets its row.
    """

    def __init__(self, inputs: tuple[int, ...], num_classes: int, shape: NetworkShape, num_experts: int = 0) -> None:
        super().__init__()
        self.inputs, self.shape = inputs, shape
        count, width = num_experts or shape.num_experts, shape.d_model
        self.trunk = _trunk(inputs, shape)
        self.norm = nn.RMSNorm(width)
        graph = None if shape.graph is None else ExpertGraph.for_outputs(count, width, shape.graph)
        self.moe = MoELayer(width, shape.d_ff, count, router=make_router(shape.router, shape.k), graph=graph)
        self.gate_bias = nn.Parameter(torch.zeros(count))
        self.task_bias = nn.Parameter(torch.zeros(0, count))
        self.head = nn.Linear(width, num_classes)
        self.register_buffer("signatures", torch.zeros(0, width))

    signatures: torch.Tensor

    @property
    def num_experts(self) -> int:
        """Number of experts now."""
        return len(self.moe.experts)

    @property
    def num_classes(self) -> int:
        """Number of classes now."""
        return self.head.out_features

    def features(self, x: torch.Tensor) -> torch.Tensor:
        """Trunk features `[B, D]`, float32."""
        found: torch.Tensor = self.trunk(x)
        return found.float()

    def forward(self, x: torch.Tensor, tasks_BT: torch.Tensor | None = None) -> tuple[torch.Tensor, RoutingStatistics]:
        """Class logits and statistics of the routing; `tasks_BT` weights the tasks' vectors in the gate."""
        h_BD = self.features(x)
        bias = self.gate_bias if tasks_BT is None else self.gate_bias + tasks_BT.to(h_BD.dtype) @ self.task_bias
        mixed_BD, statistics = self.moe(self.norm(h_BD), router=_Shifted(self.moe.router, bias))
        return self.head(h_BD + mixed_BD), statistics

    def similar_tasks(self, x: torch.Tensor) -> torch.Tensor:
        """How much inputs resemble each task, `[B, T]`, rows sum to 1: a softmax over the cosines between features and
        signatures."""
        with torch.no_grad():
            cosine_BT = F.normalize(self.features(x), dim=1) @ F.normalize(self.signatures, dim=1).T
            return (SHARPNESS * cosine_BT).softmax(-1)

    def add_classes(self, num_classes: int) -> None:
        """Grow the head to `num_classes`; logits of known classes stay as they are."""
        old = self.head
        if num_classes <= old.out_features:
            return
        self.head = nn.Linear(old.in_features, num_classes)
        with torch.no_grad():
            self.head.weight[: old.out_features] = old.weight
            self.head.bias[: old.out_features] = old.bias

    def add_task(self, signature_D: torch.Tensor) -> None:
        """A row for a new task in the gate and among the signatures."""
        self.signatures = torch.cat([self.signatures, signature_D[None]])
        self.task_bias = nn.Parameter(
            torch.cat([self.task_bias.detach(), self.task_bias.new_zeros(1, self.num_experts)])
        )

    def add_expert(self) -> int:
        """Append an expert that nothing reaches; returns its number."""
        count = self.num_experts
        self.moe.experts.append(SwiGLU(self.shape.d_model, self.shape.d_ff))
        self._set_gate(
            torch.cat([self.moe.gate.weight, self.moe.gate.weight.new_zeros(1, self.shape.d_model)]),
            torch.cat([self.gate_bias, self.gate_bias.new_full((1,), CLOSED)]),
            torch.cat([self.task_bias, self.task_bias.new_zeros(len(self.task_bias), 1)], dim=1),
        )
        if isinstance(self.moe.graph, ExpertGraph):
            edges = F.pad(self.moe.graph.edges.detach(), (0, 1, 0, 1))
            edges[-1, -1] = edges.diagonal()[:-1].mean()
            self.moe.graph.edges = nn.Parameter(edges)
        return count

    @torch.no_grad()
    def open(self, expert: int, x: torch.Tensor) -> None:
        """Let an expert be chosen by inputs such as these: its row of the gate points from the earlier tasks'
        signatures to the mean of these features, and its logit is on average that of their best expert."""
        h_BD = self.norm(self.features(x))
        others = self.norm(self.signatures).mean(0) if len(self.signatures) else torch.zeros_like(h_BD[0])
        direction_D = F.normalize(h_BD.mean(0) - others, dim=0)
        best = (self.moe.gate(h_BD) + self.gate_bias).amax(1)
        self.moe.gate.weight[expert] = direction_D
        self.gate_bias[expert] = (best - h_BD @ direction_D).mean()

    @torch.no_grad()
    def likeness(self, x: torch.Tensor) -> torch.Tensor:
        """Cosine between the outputs of every two experts for the same inputs, `[E, E]`."""
        h_BD = self.norm(self.features(x[:LIKENESS]))
        outputs_EN = torch.stack([expert(h_BD).flatten() for expert in self.moe.experts])
        return F.normalize(outputs_EN, dim=1) @ F.normalize(outputs_EN, dim=1).T

    @torch.no_grad()
    def merge(self, one: int, other: int, load_E: torch.Tensor) -> None:
        """Make two experts one: weights, rows of the gate and edges are averaged by load, and `other` is removed."""
        share = float((load_E[one] / (load_E[one] + load_E[other]).clamp_min(1e-12)).clamp(0, 1))
        share = 0.5 if load_E[one] + load_E[other] <= 0 else share
        kept, gone = self.moe.experts[one], self.moe.experts[other]
        for own, more in zip(kept.parameters(), gone.parameters(), strict=True):
            own.copy_(share * own + (1 - share) * more)
        left = [expert for expert in range(self.num_experts) if expert != other]
        rows = [self.moe.gate.weight.clone(), self.gate_bias.clone(), self.task_bias.T.clone()]
        for each in rows:
            each[one] = share * each[one] + (1 - share) * each[other]
        self.moe.experts = nn.ModuleList(self.moe.experts[expert] for expert in left)
        self._set_gate(rows[0][left], rows[1][left], rows[2][left].T)
        if isinstance(self.moe.graph, ExpertGraph):
            edges = self.moe.graph.edges.clone()
            edges[one] = share * edges[one] + (1 - share) * edges[other]
            edges[:, one] = share * edges[:, one] + (1 - share) * edges[:, other]
            self.moe.graph.edges = nn.Parameter(edges[left][:, left].contiguous())

    def _set_gate(self, weight_ED: torch.Tensor, bias_E: torch.Tensor, task_bias_TE: torch.Tensor) -> None:
        self.moe.gate = nn.Linear(self.shape.d_model, len(weight_ED), bias=False)
        self.moe.gate.weight = nn.Parameter(weight_ED.detach().clone())
        self.gate_bias = nn.Parameter(bias_E.detach().clone())
        self.task_bias = nn.Parameter(task_bias_TE.detach().clone().contiguous())


def of_weights(inputs: tuple[int, ...], shape: NetworkShape, weights: dict[str, torch.Tensor]) -> ContinualNetwork:
    """The network of a `state_dict`; raises `RuntimeError` or `KeyError` for weights that do not fit."""
    experts, classes = len(weights["gate_bias"]), len(weights["head.bias"])
    network = ContinualNetwork(inputs, classes, shape, experts)
    network.signatures = torch.zeros_like(weights["signatures"])
    network.task_bias = nn.Parameter(torch.zeros_like(weights["task_bias"]))
    network.load_state_dict(weights)
    return network


class _Shifted:
    """A router that sees the gate's logits with a bias added."""

    def __init__(self, router: Router, bias: torch.Tensor) -> None:
        self.router, self.bias = router, bias

    def __call__(self, logits_TE: torch.Tensor, generator: torch.Generator | None = None) -> Routing:
        found = self.router(logits_TE + self.bias, generator)
        return found._replace(statistics=replace(found.statistics, logits=logits_TE + self.bias))


def _trunk(inputs: tuple[int, ...], shape: NetworkShape) -> nn.Sequential:
    kind = shape.trunk if shape.trunk != "auto" else ("conv" if len(inputs) == 3 else "linear")
    if kind == "linear":
        size = 1
        for each in inputs:
            size *= each
        return nn.Sequential(nn.Flatten(), nn.Linear(size, shape.d_model), nn.ReLU())
    if len(inputs) != 3:
        raise ValueError(f"trunk='conv' is for images; these inputs have the shape {inputs}")
    first, second = shape.channels
    side = (inputs[1] + 3) // 4
    parts: list[Any] = [
        nn.Conv2d(inputs[0], first, 5, stride=2, padding=2), nn.ReLU(),
        nn.Conv2d(first, second, 3, stride=2, padding=1), nn.ReLU(),
        nn.Flatten(), nn.Linear(second * side**2, shape.d_model), nn.ReLU(),
    ]  # fmt: skip
    return nn.Sequential(*parts)
