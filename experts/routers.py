"""Who answers an input: gate logits [B, E] turned into a boolean set of experts, and its mixing weights.

Shape legend: B inputs, E experts.
"""

import torch


def top_k(gate_logits_BE: torch.Tensor, k: int) -> torch.Tensor:
    """The k experts of largest gate logit, as a boolean `[B, E]` (Shazeer et al. 2017)."""
    experts_Bk = gate_logits_BE.topk(k, dim=-1).indices
    return torch.zeros_like(gate_logits_BE, dtype=torch.bool).scatter_(-1, experts_Bk, True)


def random_subsets(gate_logits_BE: torch.Tensor, max_size: int, generator: torch.Generator) -> torch.Tensor:
    """1 to `max_size` experts drawn at random for each input, as a boolean `[B, E]`."""
    rank_BE = torch.rand(gate_logits_BE.shape, generator=generator).argsort(dim=-1)
    size_B1 = torch.randint(1, max_size + 1, (len(gate_logits_BE), 1), generator=generator)
    return rank_BE < size_B1


def mixing_weights(gate_logits_BE: torch.Tensor, members_BE: torch.Tensor) -> torch.Tensor:
    """Softmax of the gate over the chosen experts only, 0 for the others, `[B, E]`."""
    return gate_logits_BE.masked_fill(~members_BE, -torch.inf).softmax(dim=-1)


def load_balancing_loss(gate_logits_BE: torch.Tensor, members_BE: torch.Tensor) -> torch.Tensor:
    """E * sum_e f_e P_e, 1 when the load is even (Fedus et al. 2022, eq. 4); f = share of choices, P = mean gate."""
    share_E = members_BE.float().mean(0) / members_BE.float().sum(-1).mean()
    return gate_logits_BE.shape[-1] * (share_E * gate_logits_BE.softmax(-1).mean(0)).sum()
