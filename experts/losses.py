"""Auxiliary losses for gates and experts. Shape legend: T inputs, E experts, C outputs of each.

All are scalars and differentiable.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F


def load_balancing_loss(gate_logits_TE: torch.Tensor, members_TE: torch.Tensor) -> torch.Tensor:
    """E * sum_e f_e P_e, 1 when the load is even (Fedus et al. 2022, eq. 4); f = share of choices, P = mean gate."""
    share_E = members_TE.float().mean(0) / members_TE.float().sum(-1).mean().clamp_min(1e-12)
    return gate_logits_TE.shape[-1] * (share_E * gate_logits_TE.softmax(-1).mean(0)).sum()


def entropy_weighted_balance_loss(gate_logits_TE: torch.Tensor, members_TE: torch.Tensor) -> torch.Tensor:
    """The same with each input counted by the entropy of its gate over that of an even one: inputs that the gate is
    sure of stay with their experts, those that it is not sure of even out the load."""
    probability_TE = gate_logits_TE.softmax(-1)
    entropy_T = torch.special.entr(probability_TE).sum(-1).detach() / math.log(max(2, gate_logits_TE.shape[-1]))
    weight_T1 = (entropy_T / entropy_T.sum().clamp_min(1e-12)).unsqueeze(1)
    chosen_TE = weight_T1 * members_TE
    share_E = chosen_TE.sum(0) * len(members_TE) / members_TE.sum().clamp_min(1)
    return entropy_T.mean() * gate_logits_TE.shape[-1] * (share_E * (weight_T1 * probability_TE).sum(0)).sum()


def drift_loss(weights: Sequence[torch.Tensor], averages: Sequence[torch.Tensor]) -> torch.Tensor:
    """The squared distance of weights from their moving averages over the averages' squares: 0 where nothing moves.

    An expert that a few batches pull away comes back; one that keeps learning takes its average along.
    """
    moved = sum((now - mean).square().sum() for now, mean in zip(weights, averages, strict=True))
    return torch.as_tensor(moved) / torch.as_tensor(sum(mean.square().sum() for mean in averages)).clamp_min(1e-12)


def z_loss(gate_logits_TE: torch.Tensor) -> torch.Tensor:
    """The mean square of logsumexp, which keeps logits small (Zoph et al. 2022, ST-MoE, eq. 5)."""
    return gate_logits_TE.logsumexp(-1).square().mean()


def diversity_loss(outputs_TEC: torch.Tensor) -> torch.Tensor:
    """The mean squared cosine between two different experts' outputs of the same inputs, each centred over the inputs:
    0 where experts' outputs are orthogonal, 1 where they differ by a factor only."""
    flat_EN = (outputs_TEC - outputs_TEC.mean(0)).transpose(0, 1).flatten(1)
    cosine_EE = F.normalize(flat_EN, dim=1) @ F.normalize(flat_EN, dim=1).T
    experts = len(cosine_EE)
    return (cosine_EE.square().sum() - cosine_EE.diagonal().square().sum()) / max(1, experts * (experts - 1))
