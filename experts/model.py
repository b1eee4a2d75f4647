"""The Mixture-of-Experts classifier: an optional shared trunk, a linear gate, experts of given widths.

Shape legend: B inputs, D inputs' (or trunk's) width, H all experts' hidden units, E experts, C classes.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import skip_init

from experts.graph import ExpertGraph
from experts.routers import Router, TopK, mixing_weights


class MoEModel(Protocol):
    """Interface of a module for bundles: `trunk(x) -> h`, `gate(h) -> [B, E]`, experts `h -> [B, C]`."""

    @property
    def trunk(self) -> Callable[[torch.Tensor], torch.Tensor]: ...

    @property
    def gate(self) -> Callable[[torch.Tensor], torch.Tensor]: ...

    @property
    def experts(self) -> Iterable[nn.Module]: ...

    def state_dict(self) -> dict[str, torch.Tensor]: ...

    def eval(self) -> object: ...


class ExpertStack(nn.Module):
    """E two-layer perceptrons of different width, computed as two matrix products without a loop over experts.

    Item e is expert e alone, with its own copy of the weights, as it would be deployed.
    """

    owner_H: torch.Tensor

    def __init__(self, num_inputs: int, num_classes: int, widths: Sequence[int]) -> None:
        super().__init__()
        self.widths = tuple(widths)
        self.hidden = nn.Linear(num_inputs, sum(widths))
        bound_H1 = torch.tensor([width for width in widths for _ in range(width)]).pow(-0.5).unsqueeze(1)
        self.out_HC = nn.Parameter((torch.rand(sum(widths), num_classes) * 2 - 1) * bound_H1)
        self.bias_EC = nn.Parameter(torch.zeros(len(widths), num_classes))
        owner_H = torch.repeat_interleave(torch.arange(len(widths)), torch.tensor(self.widths))
        self.register_buffer("owner_H", owner_H, persistent=False)

    def forward(self, x_BD: torch.Tensor) -> torch.Tensor:
        """The class logits of every expert, `[B, E, C]`."""
        hidden_BH = self.hidden(x_BD).relu()
        owns_HE = F.one_hot(self.owner_H, len(self.widths)).to(hidden_BH.dtype)
        block_HEC = owns_HE.unsqueeze(-1) * self.out_HC.unsqueeze(1)
        return (hidden_BH @ block_HEC.flatten(1)).unflatten(1, self.bias_EC.shape) + self.bias_EC

    def __len__(self) -> int:
        return len(self.widths)

    def __getitem__(self, expert: int) -> nn.Sequential:
        rows = self.owner_H == range(len(self))[expert]
        first = skip_init(nn.Linear, self.hidden.in_features, int(rows.sum()))
        second = skip_init(nn.Linear, first.out_features, self.out_HC.shape[1])
        with torch.no_grad():
            first.weight.copy_(self.hidden.weight[rows])
            first.bias.copy_(self.hidden.bias[rows])
            second.weight.copy_(self.out_HC[rows].T)
            second.bias.copy_(self.bias_EC[expert])
        return nn.Sequential(first, nn.ReLU(), second)

    def __iter__(self) -> Iterator[nn.Sequential]:
        return (self[expert] for expert in range(len(self)))


class Standardize(nn.Module):
    """Scales each input to mean 0 and variance 1 over the inputs of `fit`; constant ones become 0."""

    mean_D: torch.Tensor
    scale_D: torch.Tensor

    def __init__(self, num_inputs: int) -> None:
        super().__init__()
        self.register_buffer("mean_D", torch.zeros(num_inputs))
        self.register_buffer("scale_D", torch.ones(num_inputs))

    def fit(self, x_BD: torch.Tensor) -> None:
        """Set mean and scale by inputs."""
        deviation_D = x_BD.double().std(0, correction=0)
        self.mean_D.copy_(x_BD.double().mean(0))
        self.scale_D.copy_(torch.where(deviation_D > 1e-6 * self.mean_D.abs(), 1 / deviation_D, 0.0))

    def forward(self, x_BD: torch.Tensor) -> torch.Tensor:
        """Scaled inputs, clipped at +-10."""
        return ((x_BD - self.mean_D) * self.scale_D).clip(-10, 10)


class MoEClassifier(nn.Module):
    """Mixture of Experts over flat inputs; `trunk` is the width of a shared first layer, 0 for none; `graph` has the
    arguments of an `ExpertGraph` that mixes the experts' logits; `standardize` scales the inputs first."""

    def __init__(
        self,
        num_inputs: int,
        num_classes: int,
        *,
        widths: Sequence[int] = (16,) * 8,
        trunk: int = 0,
        graph: Mapping[str, Any] | None = None,
        standardize: bool = False,
    ) -> None:
        super().__init__()
        if not widths or min(widths) < 1 or trunk < 0:
            raise ValueError(f"widths {tuple(widths)} and trunk {trunk}: widths must be >= 1 and trunk >= 0")
        self.settings = {"num_inputs": num_inputs, "num_classes": num_classes, "widths": list(widths), "trunk": trunk}
        if graph is not None:
            self.settings["graph"] = dict(graph)
        if standardize:
            self.settings["standardize"] = True
        scaling = [Standardize(num_inputs)] if standardize else []
        self.trunk = nn.Sequential(*scaling, *([nn.Linear(num_inputs, trunk), nn.ReLU()] if trunk else []))
        self.gate = nn.Linear(trunk or num_inputs, len(widths))
        self.experts = ExpertStack(trunk or num_inputs, num_classes, widths)
        self.graph = None if graph is None else ExpertGraph.for_outputs(len(widths), num_classes, **graph)

    def forward(self, x_BD: torch.Tensor, k: int = 2, router: Router | None = None) -> torch.Tensor:
        """Class logits `[B, C]` of the top-k gate, or of another router."""
        h_BD = self.trunk(x_BD)
        weights_BE, members_BE, _ = (router or TopK(k))(self.gate(h_BD))
        return combine(self.experts(h_BD), weights_BE, members_BE, self.graph)


class ConvMoEClassifier(nn.Module):
    """Two convolutions, each with a maximum over 2 x 2 places, and a layer of `trunk` units in front of a Mixture of
    Experts, for square images of one channel that come flat."""

    def __init__(
        self,
        num_inputs: int,
        num_classes: int,
        *,
        channels: Sequence[int] = (16, 32),
        widths: Sequence[int] = (256,) * 8,
        trunk: int = 192,
    ) -> None:
        super().__init__()
        side = int(num_inputs**0.5)
        if side**2 != num_inputs or side % 4:
            raise ValueError(f"{num_inputs} inputs: must be a square image whose side is a multiple of 4")
        self.settings = {
            "num_inputs": num_inputs, "num_classes": num_classes, "channels": list(channels), "widths": list(widths),
            "trunk": trunk,
        }  # fmt: skip
        first, second = channels
        self.trunk = nn.Sequential(
            nn.Unflatten(1, (1, side, side)),
            nn.Conv2d(1, first, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(first, second, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
            nn.Flatten(), nn.Linear(second * (side // 4) ** 2, trunk), nn.ReLU(),
        )  # fmt: skip
        self.gate = nn.Linear(trunk, len(widths))
        self.experts = ExpertStack(trunk, num_classes, widths)
        self.graph = None

    forward = MoEClassifier.forward


def mix(
    gate_logits_BE: torch.Tensor, outputs_BEC: torch.Tensor, members_BE: torch.Tensor, graph: ExpertGraph | None = None
) -> torch.Tensor:
    """The chosen experts' logits, weighted by the gate's softmax over them, `[B, C]`; by way of a graph, if any."""
    return combine(outputs_BEC, mixing_weights(gate_logits_BE, members_BE), members_BE, graph)


def run_chosen(
    experts: Iterable[nn.Module], h_BD: torch.Tensor, members_BE: torch.Tensor, num_outputs: int
) -> torch.Tensor:
    """The experts' outputs `[B, E, num_outputs]`, 0 where they are not chosen: each runs once, on the inputs that chose
    it."""
    outputs_BEC = h_BD.new_zeros(*members_BE.shape, num_outputs)
    for number, expert in enumerate(experts):
        rows = members_BE[:, number].nonzero()[:, 0]
        if len(rows):
            outputs_BEC[rows, number] = expert(h_BD[rows])
    return outputs_BEC


def combine(
    outputs_BEC: torch.Tensor, weights_BE: torch.Tensor, members_BE: torch.Tensor, graph: ExpertGraph | None
) -> torch.Tensor:
    """The sum of weighted logits, or what a graph makes of them, `[B, C]`."""
    if graph is not None:
        return graph(outputs_BEC, weights_BE, members_BE)
    return (weights_BE.unsqueeze(-1) * outputs_BEC).sum(1)


@torch.no_grad()
def tabulate(model: MoEModel, inputs_BD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Gate logits `[B, E]` and every expert's logits `[B, E, C]` of any `MoEModel`."""
    h_BD = model.trunk(inputs_BD)
    return model.gate(h_BD), torch.stack([expert(h_BD) for expert in model.experts], dim=1)
