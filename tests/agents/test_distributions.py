"""Distributions of actions against torch's, by value and gradient."""

from typing import Any

import numpy as np
import pytest
import torch
from gymnasium import spaces
from torch import distributions as reference

from agents.distributions import distribution

N = 50
SPACES: list[spaces.Space[Any]] = [
    spaces.Discrete(5),
    spaces.Discrete(3, start=-1),
    spaces.MultiDiscrete([3, 3]),
    spaces.MultiDiscrete([2, 5, 3]),
    spaces.MultiBinary(4),
    spaces.Box(-1, 1, (3,)),
]


def by_torch(space: spaces.Space[Any], head: torch.Tensor, actions: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
    taken = torch.from_numpy(actions)
    if isinstance(space, spaces.Discrete):
        found = reference.Categorical(logits=head)
        return found.log_prob(taken - int(space.start)), found.entropy()
    if isinstance(space, spaces.MultiDiscrete):
        each = [reference.Categorical(logits=part) for part in head.split(space.nvec.tolist(), dim=1)]
        log_prob = torch.stack([one.log_prob(taken[:, place]) for place, one in enumerate(each)])
        return log_prob.sum(0), torch.stack([one.entropy() for one in each]).sum(0)
    if isinstance(space, spaces.MultiBinary):
        bits = reference.Bernoulli(logits=head)
        return bits.log_prob(taken.float()).sum(1), bits.entropy().sum(1)
    normal = reference.Normal(*(part.exp() if place else part for place, part in enumerate(head.chunk(2, dim=1))))
    return normal.log_prob(taken).sum(1), normal.entropy().sum(1)


@pytest.mark.parametrize("space", SPACES, ids=str)
def test_values_and_gradients_are_torchs(space: spaces.Space[Any]) -> None:
    found, generator = distribution(space), np.random.default_rng(0)
    head = generator.standard_normal((N, found.size)).astype(np.float32)
    actions = found.sample(head, generator)
    weights, of_entropy = generator.standard_normal(N).astype(np.float32), 0.3
    leaf = torch.from_numpy(head.copy()).requires_grad_()
    log_prob, entropy = by_torch(space, leaf, actions)
    (torch.from_numpy(weights) @ log_prob + of_entropy * entropy.sum()).backward()
    mine = found.evaluate(head, actions)
    assert leaf.grad is not None
    np.testing.assert_allclose(mine.log_prob, log_prob.detach(), atol=1e-5)
    np.testing.assert_allclose(mine.entropy, entropy.detach(), atol=1e-5)
    np.testing.assert_allclose(found.gradient(mine, weights, of_entropy), leaf.grad, atol=1e-5)
    assert mine.log_prob.dtype == np.float32


@pytest.mark.parametrize("space", SPACES, ids=str)
def test_samples_lie_in_the_space_and_follow_the_head(space: spaces.Space[Any]) -> None:
    found, generator = distribution(space), np.random.default_rng(0)
    head = np.repeat(generator.standard_normal((1, found.size)).astype(np.float32), 20_000, axis=0)
    actions = found.sample(head, generator)
    if not isinstance(space, spaces.Box):
        assert all(space.contains(action) for action in actions[:50])
        assert space.contains(found.mode(head[:1])[0])
    evaluation = found.evaluate(head, actions)
    assert -evaluation.log_prob.mean() == pytest.approx(evaluation.entropy[0], abs=0.03)
    assert found.evaluate(head[:1], found.mode(head[:1])).log_prob[0] >= evaluation.log_prob.max() - 1e-5


@pytest.mark.parametrize("space", SPACES[:5], ids=str)
def test_masked_actions_are_never_taken(space: spaces.Space[Any]) -> None:
    found, generator = distribution(space), np.random.default_rng(0)
    head = generator.standard_normal((2000, found.size)).astype(np.float32) * 5
    masks = np.zeros(head.shape, dtype=np.bool_)
    if isinstance(space, spaces.MultiBinary):
        masks[:, 1] = True
        allowed = np.array([0, 1, 0, 0])
    else:
        sizes = np.array([space.n]) if isinstance(space, spaces.Discrete) else space.nvec  # type: ignore[attr-defined]
        masks[:, np.cumsum(sizes) - 1] = True  # the last of each choice
        allowed = sizes - 1 + np.asarray(space.start)  # type: ignore[attr-defined]
    actions = found.sample(head, generator, masks)
    assert (actions.reshape(len(head), -1) <= allowed).all()
    assert (actions.reshape(len(head), -1) >= (0 if isinstance(space, spaces.MultiBinary) else allowed)).all()
    evaluation = found.evaluate(head, actions, masks)
    gradient = found.gradient(evaluation, np.ones(len(head), np.float32), 0.1)
    assert np.isfinite(evaluation.log_prob).all()
    np.testing.assert_allclose(gradient[~masks], 0, atol=1e-6)


def test_other_spaces_are_refused() -> None:
    with pytest.raises(ValueError, match="must be Discrete"):
        distribution(spaces.Text(3))
