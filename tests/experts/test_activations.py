"""Activations of 8 bits by hand, and on a trained model."""

import torch
from torch import nn

from experts import data, reference_models
from experts.compression.activations import quantize_activations
from experts.compression.plan import Plan


def test_inputs_are_rounded_to_the_scale_of_the_examples() -> None:
    layer = nn.Linear(3, 1, bias=False)
    with torch.no_grad():
        layer.weight.fill_(1.0)
    made = quantize_activations(nn.Sequential(layer), torch.tensor([[1.27, -0.3, 0.0]]))
    found = made(torch.tensor([[0.014, 0.016, 0.0], [5.0, -0.304, 0.0]]))
    torch.testing.assert_close(found, torch.tensor([[0.01 + 0.02], [1.27 - 0.30]]))
    assert torch.equal(layer(torch.tensor([[0.014, 0.0, 0.0]])), torch.tensor([[0.014]]))  # the original is as it was


def test_a_trained_model_keeps_its_accuracy_and_its_file_has_the_scales() -> None:
    model = reference_models.load("digits-mlp")
    made = quantize_activations(model, torch.from_numpy(reference_models.examples("digits-mlp").calibration))
    inputs, labels = (torch.from_numpy(each) for each in data.load("digits")["test"])
    with torch.no_grad():
        before, after = ((each(inputs).argmax(1) == labels).float().mean() for each in (model, made))
        assert (model(inputs) != made(inputs)).any()
    assert after > before - 0.01
    assert Plan.of(made, 1).bytes == Plan.of(model, 1).bytes + 4 * 4  # of trunk, gate and hidden units: 3 + 1 scales
