"""Hybrid training: experts learn by cross-entropy, the gate by policy gradient on quality minus cost.

Shape legend: B inputs, E experts, C classes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

from experts.model import MoEClassifier, mix

CostOf = Callable[[torch.Tensor], torch.Tensor]  # selected experts, boolean `[B, E]` -> relative cost per input


@dataclass(frozen=True, kw_only=True)
class HybridSettings:
    """The loss is cross-entropy + `alpha` * policy gradient - `entropy` * the gate's entropy.

    Experts are drawn by the Gumbel-max trick from the gate's softmax at a temperature that falls in a straight line.
    With `straight_through` the cross-entropy's gradient reaches the gate as well, by the Gumbel-softmax estimator (Jang
    et al. 2017); without it the gradients are split. The reward's quality is 1 for a correct answer, or with a
    `reward_temperature` the probability of the right class, the logits divided by it (`experts.confidence`).
    """

    alpha: float = 1.0
    cost_weight: float = 0.2
    entropy: float = 0.01
    temperature: tuple[float, float] = (2.0, 1.0)
    straight_through: bool = False
    reward_temperature: float | None = None
    epochs: int = 10
    batch_size: int = 32
    learning_rate: float = 1e-3
    seed: int = 0


class Losses(NamedTuple):
    """Loss terms of a batch and its reward, as scalars."""

    total: torch.Tensor
    cross_entropy: torch.Tensor
    policy_gradient: torch.Tensor
    entropy: torch.Tensor
    reward: torch.Tensor
    accuracy: torch.Tensor
    cost: torch.Tensor


def train_hybrid(
    model: MoEClassifier,
    inputs: np.ndarray,
    labels: np.ndarray,
    cost_of: CostOf,
    settings: HybridSettings,
    after_epoch: Callable[[dict[str, float]], object] = lambda row: None,
) -> list[dict[str, float]]:
    """Train a model in place on inputs `[n, d]` float32 and labels `[n]`; means of both losses, reward, accuracy, cost
    and entropy of each epoch, the same bits for the same seed."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    generator, x, y = torch.Generator().manual_seed(settings.seed), torch.from_numpy(inputs), torch.from_numpy(labels)
    optimizer = torch.optim.Adam(model.parameters(), lr=settings.learning_rate)
    baseline, log = torch.zeros(()), []
    model.train()
    try:
        for epoch in range(settings.epochs):
            share = epoch / max(1, settings.epochs - 1)
            temperature = settings.temperature[0] + share * (settings.temperature[1] - settings.temperature[0])
            rows = []
            for batch in torch.randperm(len(x), generator=generator).split(settings.batch_size):
                losses = hybrid_loss(model, x[batch], y[batch], cost_of, settings, baseline, temperature, generator)
                optimizer.zero_grad()
                losses.total.backward()
                optimizer.step()
                baseline = 0.95 * baseline + 0.05 * losses.reward
                rows.append(torch.stack([part.detach() for part in losses]))
            means = torch.stack(rows).mean(0).tolist()
            log.append({"epoch": epoch, "temperature": temperature, **dict(zip(Losses._fields, means, strict=True))})
            after_epoch(log[-1])
    finally:
        torch.set_num_threads(threads)
    model.eval()
    return log


def hybrid_loss(
    model: MoEClassifier,
    x_BD: torch.Tensor,
    y_B: torch.Tensor,
    cost_of: CostOf,
    settings: HybridSettings,
    baseline: torch.Tensor,
    temperature: float,
    generator: torch.Generator,
) -> Losses:
    """Loss of one batch with one sampled expert per input."""
    h_BD = model.trunk(x_BD)
    gate_BE = model.gate(h_BD.detach()) / temperature
    uniform_BE = torch.rand(gate_BE.shape, generator=generator).clamp_min(1e-10)
    noisy_BE = gate_BE - (-uniform_BE.log()).log()
    chosen_B = noisy_BE.argmax(1)
    members_BE = F.one_hot(chosen_B, gate_BE.shape[1]).bool()
    if settings.straight_through:
        soft_BE = noisy_BE.softmax(1)
        weights_BE = members_BE + soft_BE - soft_BE.detach()
        logits_BC = (weights_BE.unsqueeze(-1) * model.experts(h_BD)).sum(1)
    else:
        logits_BC = mix(gate_BE.detach(), model.experts(h_BD), members_BE)
    cross_entropy = F.cross_entropy(logits_BC, y_B)
    with torch.no_grad():
        correct_B, cost_B = (logits_BC.argmax(1) == y_B).float(), cost_of(members_BE).float()
        quality_B = correct_B
        if settings.reward_temperature is not None:
            quality_B = (logits_BC / settings.reward_temperature).softmax(-1).gather(1, y_B[:, None])[:, 0]
        reward_B = quality_B - settings.cost_weight * cost_B
        advantage_B = (reward_B - baseline) / (reward_B.std(correction=0) + 1e-3)
    log_prob_BE = gate_BE.log_softmax(1)
    policy_gradient = -(advantage_B * log_prob_BE.gather(1, chosen_B[:, None])[:, 0]).mean()
    entropy = -(log_prob_BE.exp() * log_prob_BE).sum(1).mean()
    total = cross_entropy + settings.alpha * policy_gradient - settings.entropy * entropy
    return Losses(total, cross_entropy, policy_gradient, entropy, reward_B.mean(), correct_B.mean(), cost_B.mean())
