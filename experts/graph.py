"""Expert graphs: a learned graph mixes the outputs of the selected experts of an input.

The gate picks a team; edge A[e, j], a softmax over the team, says how much of expert j's output goes into what expert e
contributes. Shape legend: T inputs, E experts, C outputs of each expert.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

MODES = ("sum", "weighted", "conv")
INITS = ("identity", "random")
OWN = 4.0  # logit of an expert's edge to itself at an "identity" start: 0.98 of a team of two, 0.89 of eight


class ExpertGraph(nn.Module):
    """E experts as nodes, their edges learned as logits `[E, E]`.

    What expert e contributes is y'_e = (1 - strength) * y_e + strength * sum_j A[e, j] y_j over the team, and the
    answer is the sum of y' over the team ("sum"; the gate learns by a straight-through gradient), the sum weighted by
    the gate ("weighted"), or, weighted too, with a graph convolution beside it ("conv", which needs the `width` of the
    outputs: y'_e = y_e + strength * relu(sum_j A[e, j] y_j) W, W 0 at first; after Kipf & Welling 2017).
    """

    def __init__(
        self,
        num_experts: int,
        mode: str = "weighted",
        init: str = "identity",
        *,
        strength: float = 1.0,
        width: int | None = None,
    ) -> None:
        super().__init__()
        if mode not in MODES or init not in INITS:
            raise ValueError(f"mode={mode!r}, init={init!r}: modes are {', '.join(MODES)}; inits {', '.join(INITS)}")
        if not 0 <= strength <= 1:
            raise ValueError(f"strength={strength!r}: must be from 0 to 1")
        if (mode == "conv") != bool(width):
            raise ValueError(
                f"mode={mode!r}, width={width!r}: the outputs' width belongs to mode 'conv', and only to it"
            )
        self.settings = {"mode": mode, "init": init, "strength": strength}
        self.mode, self.strength = mode, strength
        start = OWN * torch.eye(num_experts) if init == "identity" else torch.randn(num_experts, num_experts)
        self.edges = nn.Parameter(start)
        self.convolution = nn.Parameter(torch.zeros(width, width)) if width else None

    @classmethod
    def for_outputs(cls, num_experts: int, width: int, mode: str = "weighted", **options: Any) -> ExpertGraph:
        """Graph for experts with `width` outputs; only mode "conv" needs the width."""
        return cls(num_experts, mode, width=width if mode == "conv" else None, **options)

    @property
    def adjacency(self) -> torch.Tensor:
        """Edge weights of a team of all experts, `[E, E]`; rows sum to 1."""
        return self.edges.softmax(-1)

    def weights(self, weights_TE: torch.Tensor, members_TE: torch.Tensor) -> torch.Tensor:
        """What each expert's output is multiplied by in the end, `[T, E]`, of modes "sum" and "weighted", which are
        linear in the outputs: no output is needed to know it."""
        dtype, weights_TE = weights_TE.dtype, weights_TE.float()  # what is small vanishes in half precision
        present_TE = members_TE.float()
        if self.mode == "sum":
            weights_TE = present_TE * (1 + weights_TE - weights_TE.detach())  # a gradient for the gate
        odds_EE = self._odds()
        with torch.autocast(members_TE.device.type, enabled=False):
            of_team_TE = (present_TE @ odds_EE.T).clamp_min(1e-30)
            mixed_TE = (weights_TE / of_team_TE * present_TE) @ odds_EE * present_TE
        return torch.lerp(weights_TE, mixed_TE, self.strength).to(dtype)

    def forward(self, outputs_TEC: torch.Tensor, weights_TE: torch.Tensor, members_TE: torch.Tensor) -> torch.Tensor:
        """The team's answer `[T, C]`, of all experts' outputs (those outside the team are not looked at)."""
        if self.convolution is None:
            return torch.einsum("te,tec->tc", self.weights(weights_TE, members_TE), outputs_TEC)
        present_T1E = members_TE.to(outputs_TEC.dtype).unsqueeze(1)
        team_TEE = self.edges.masked_fill(~members_TE.unsqueeze(1), -torch.inf).softmax(-1).nan_to_num(0.0)
        messages_TEC = (team_TEE @ (outputs_TEC * present_T1E.mT)).relu() @ self.convolution
        return torch.einsum("te,tec->tc", weights_TE, outputs_TEC + self.strength * messages_TEC)

    def share_of_others(self, members_TE: torch.Tensor) -> torch.Tensor:
        """Mean share of other experts of the team in an expert's contribution; 0 in teams of one."""
        present_TE, odds_EE = members_TE.float(), self._odds()
        own_TE = odds_EE.diagonal() / (present_TE @ odds_EE.T).clamp_min(1e-30)
        return self.strength * ((1 - own_TE) * present_TE).sum() / present_TE.sum().clamp_min(1)

    def _odds(self) -> torch.Tensor:
        """Edges before a team's softmax, the largest of each row 1, none vanishing in float32."""
        edges = self.edges.float()
        return (edges - edges.amax(-1, keepdim=True)).clamp_min(-60).exp()

    def sparsity_loss(self) -> torch.Tensor:
        """L1 of the edges between different experts: the mean share of others in a team of all."""
        return 1 - self.adjacency.diagonal().mean()

    def sparsity(self, threshold: float) -> float:
        """Share of edges between different experts below a threshold."""
        adjacency = self.adjacency.detach()
        others = ~torch.eye(len(adjacency), dtype=torch.bool, device=adjacency.device)
        return float((adjacency[others] < threshold).float().mean())


def parameter_groups(model: nn.Module, rate: float, edge_rate: float, decay: float = 0.0) -> list[dict[str, Any]]:
    """For an optimiser: the edges of graphs, which are logits, learn `edge_rate` times as fast as the rest and do not
    decay."""
    named = list(model.named_parameters())
    edges = [weights for name, weights in named if name.endswith("graph.edges")]
    others = [weights for name, weights in named if not name.endswith("graph.edges")]
    groups: list[dict[str, Any]] = [
        {"params": others, "lr": rate, "weight_decay": decay},
        {"params": edges, "lr": edge_rate * rate, "weight_decay": 0.0},
    ]
    return groups if edges else groups[:1]
