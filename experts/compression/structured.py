"""Structured pruning: removes neurons and returns a smaller model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from experts.model import ConvMoEClassifier, MoEClassifier

Model = MoEClassifier | ConvMoEClassifier


def smaller_experts(model: Model, share: float, importance: Mapping[str, np.ndarray]) -> Model:
    """Model with only the most important share of each expert's neurons.

    A neuron matters by the root mean square of its activation, of `pieces.importance`, times the norm of its outgoing
    weights.
    """
    stack, kept, start = model.experts, [], 0
    for expert, width in enumerate(stack.widths):
        out = stack.out_HC[start : start + width].detach().norm(dim=1).numpy()
        matters = np.sqrt(importance[f"experts.{expert}.out"]) * out
        kept.append(start + np.sort(np.argsort(-matters, kind="stable")[: max(1, round(share * width))]))
        start += width
    rows = torch.from_numpy(np.concatenate(kept))
    settings: dict[str, Any] = model.settings | {"widths": [len(each) for each in kept]}
    smaller = type(model)(**settings)
    weights = dict(model.state_dict())
    for name in ("experts.hidden.weight", "experts.hidden.bias", "experts.out_HC"):
        weights[name] = weights[name][rows]
    smaller.load_state_dict(weights)
    return smaller.eval()
