"""What a model and each subset of its experts answer.

Shape legend: N inputs, S subsets, B inputs of a part, E experts, C classes.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from experts.adapter import AdaptedMoE
from experts.model import MoEModel, mix, tabulate

Answer = Callable[[slice, torch.Tensor], torch.Tensor]  # (rows, members [S, B, E]) -> class logits [S, B, C]


@torch.no_grad()
def answers(model: MoEModel, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, Answer, bool]:
    """Gate logits `[N, E]`, class logits `[N, E, C]` of each expert alone, what subsets answer, and whether that is the
    gate-weighted sum of the experts' logits."""
    gate_NE, outputs = tabulate(model, x)
    graph = getattr(model, "graph", None)

    def answer(rows: slice, members_SBE: torch.Tensor) -> torch.Tensor:
        count, members = len(members_SBE), members_SBE.flatten(0, 1)
        h, gate, found = (
            each[rows].expand(count, *each[rows].shape).flatten(0, 1) for each in (hidden, gate_NE, outputs)
        )
        if isinstance(model, AdaptedMoE):
            logits = model.answer(h, gate, found, members)
        else:
            logits = mix(gate, found, members, graph)
        return logits.unflatten(0, members_SBE.shape[:2])

    hidden = model.trunk(x)
    if not isinstance(model, AdaptedMoE):
        return gate_NE, outputs, answer, graph is None
    each_ENE = torch.eye(gate_NE.shape[1], dtype=torch.bool)[:, None].expand(-1, len(x), -1)
    return gate_NE, answer(slice(0, len(x)), each_ENE).transpose(0, 1).contiguous(), answer, False
