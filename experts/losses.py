"""Losses that shape a gate and its experts beside the task's own. Shape legend: T inputs, E experts, C outputs of each.

All are scalars, differentiable, and 0 or 1 where nothing is to be gained; see each.
"""

import torch
import torch.nn.functional as F


def load_balancing_loss(gate_logits_TE: torch.Tensor, members_TE: torch.Tensor) -> torch.Tensor:
    """E * sum_e f_e P_e, 1 when the load is even (Fedus et al. 2022, eq. 4); f = share of choices, P = mean gate."""
    share_E = members_TE.float().mean(0) / members_TE.float().sum(-1).mean()
    return gate_logits_TE.shape[-1] * (share_E * gate_logits_TE.softmax(-1).mean(0)).sum()


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
