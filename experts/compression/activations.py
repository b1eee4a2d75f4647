"""8-bit activations: inputs of each matrix are rounded with a scale calibrated on examples."""

from __future__ import annotations

import copy
from typing import TypeVar

import torch
from torch import nn

from experts.model import ExpertStack

Model = TypeVar("Model", bound=nn.Module)


@torch.no_grad()
def quantize_activations(model: Model, inputs: torch.Tensor) -> Model:
    """Copy of a model that rounds the inputs of convolutions, linear layers and experts to 255 steps.

    The scale is the largest absolute value on `inputs [n, ...]` / 127 (Jacob et al. 2018, symmetric); it is a buffer of
    the module, so that plans count its bytes. The arithmetic is simulated in float32: products of such integers are
    exact there up to 2^24.
    """
    found = copy.deepcopy(model).eval()
    experts = {id(each.hidden) for each in found.modules() if isinstance(each, ExpertStack)}
    layers = [each for each in found.modules() if isinstance(each, nn.Linear | nn.Conv2d)]
    for layer in layers:
        layer.register_buffer("input_scale", torch.zeros(()))
        layer.register_forward_pre_hook(_round_input)
        if id(layer) in experts:
            layer.register_buffer("output_scale", torch.zeros(()))
            layer.register_forward_hook(_round_output)
    found(inputs)  # scales of 0 take what they see
    return found


def _round_input(layer: nn.Module, given: tuple[torch.Tensor, ...]) -> torch.Tensor:
    return _rounded(given[0], layer.input_scale)  # type: ignore[arg-type]


def _round_output(layer: nn.Module, given: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
    """The hidden units of experts, whose ReLU comes after this: it leaves the steps as they are."""
    return _rounded(output.relu(), layer.output_scale)  # type: ignore[arg-type]


def _rounded(x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    if scale == 0:
        scale.copy_(x.abs().max().clamp_min(1e-12) / 127)
    return (x / scale).round().clamp(-127, 127) * scale
