"""Slices of a loss: filters keep their norms, a quadratic is one, and the model is as it was."""

import numpy as np
import torch
from torch import nn

from experts.landscape import direction, landscape


def test_a_direction_s_filters_are_as_long_as_the_model_s() -> None:
    model = nn.Sequential(nn.Conv2d(2, 3, 3), nn.Flatten(), nn.Linear(12, 4))
    for weights, drawn in zip(model.parameters(), direction(model, 1), strict=True):
        norms = [each.flatten(1).norm(dim=1) for each in (weights, drawn)] if weights.ndim > 1 else [drawn, 0 * drawn]
        torch.testing.assert_close(*norms)


def test_a_quadratic_loss_has_a_quadratic_slice() -> None:
    model, positions = nn.Linear(5, 3), np.linspace(-1, 1, 5)
    before = [weights.clone() for weights in model.parameters()]
    goal, drawn = before[0].clone(), direction(model, 0)[0]

    def loss() -> torch.Tensor:
        return (model.weight - goal).square().sum()

    square = float(drawn.square().sum())
    np.testing.assert_allclose(landscape(model, loss, positions), positions**2 * square, rtol=1e-4, atol=1e-6)
    other = direction(model, 1)[0]
    wanted = [[float((a * drawn + b * other).square().sum()) for b in positions] for a in positions]
    np.testing.assert_allclose(landscape(model, loss, positions, (0, 1)), wanted, rtol=1e-4, atol=1e-6)
    assert all(torch.equal(*pair) for pair in zip(before, model.parameters(), strict=True))


def test_the_scale_of_the_weights_does_not_matter() -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(4, 8, bias=False), nn.ReLU(), nn.Linear(8, 2, bias=False)), torch.randn(20, 4)
    positions = np.linspace(-1, 1, 7)
    before = landscape(model, lambda: model(x).square().mean(), positions)
    with torch.no_grad():
        model[0].weight *= 10
        model[2].weight /= 10
    np.testing.assert_allclose(landscape(model, lambda: model(x).square().mean(), positions), before, rtol=1e-4)
