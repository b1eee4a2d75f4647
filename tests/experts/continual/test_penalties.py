"""Penalties: importance by hand, and what it holds."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from experts.continual import (
    Penalty,
    Stream,
)
from experts.continual.learner import StreamLearner
from experts.continual.penalties import Importance, shared
from tests.experts.continual.conftest import QUICK, SMALL, network


@pytest.mark.parametrize("kind", ["ewc", "mas"])
def test_importance_is_positive_where_weights_matter(kind: Any) -> None:
    made, x = network(), torch.randn(30, 6)
    x[:, 0] = 0  # the first input does not matter
    importance = Importance(Penalty(kind, 2.0, samples=30))
    importance.update(made, x, None, torch.Generator().manual_seed(0))
    found = importance.importance
    assert not any(name.startswith("moe.experts") for name in found)
    assert float(found["trunk.1.weight"][:, 0].abs().max()) == 0
    assert float(found["trunk.1.weight"][:, 1:].mean()) > 0
    assert float(found["moe.gate.weight"].mean()) > 0
    assert (found["head.weight"] >= 0).all()
    assert float(importance.loss(made).detach()) == 0
    with torch.no_grad():
        made.head.bias += 0.5
    by_hand = 0.5 * 2.0 * float((found["head.bias"] * 0.25).sum())
    assert float(importance.loss(made).detach()) == pytest.approx(by_hand, rel=1e-5)


def test_the_fisher_information_of_a_linear_softmax_by_hand() -> None:
    """Without experts' outputs the bias of the head has the information p (1 - p)."""
    made, x = network(), torch.randn(4000, 6)
    with torch.no_grad():
        for expert in made.moe.experts:
            expert.w_out.zero_()  # type: ignore[operator, union-attr]
        nn.init.zeros_(made.head.weight)
        made.head.bias.copy_(torch.tensor([0.5, 0.3, 0.15, 0.05]).log())
    importance = Importance(Penalty("ewc", 1.0, samples=1500))
    importance.update(made, x, None, torch.Generator().manual_seed(0))
    share = torch.tensor([0.5, 0.3, 0.15, 0.05])
    assert torch.allclose(importance.importance["head.bias"], share * (1 - share), atol=0.03)


@pytest.mark.parametrize("kind", ["ewc", "mas"])
def test_a_merged_expert_is_held_where_it_is(kind: Any) -> None:
    made, x = network(), torch.randn(20, 6)
    importance = Importance(Penalty(kind, 1.0, samples=10))
    importance.update(made, x, torch.ones(20, 1), torch.Generator().manual_seed(0))
    both = importance.importance["gate_bias"][0] + importance.importance["gate_bias"][2]
    made.merge(0, 2, torch.tensor([0.3, 0.4, 0.3]))
    importance.merge(0, 2, made)
    assert float(importance.loss(made).detach()) == 0
    assert torch.allclose(importance.importance["gate_bias"][0], both)
    assert importance.importance["task_bias"].shape == (1, 2)


def test_a_known_task_holds_only_its_own_head(blobs: Stream) -> None:
    given = Stream(blobs.name, "task", blobs.tasks[:2])
    learner = StreamLearner(given, replace(QUICK, regularizer=Penalty(samples=30)), 0, SMALL)
    learner.run(lambda share, text: None, lambda: None, 1000)
    assert learner.importance is not None
    alone = StreamLearner(
        Stream("x", "task", blobs.tasks[:1]), replace(QUICK, regularizer=Penalty(samples=30)), 0, SMALL
    )
    alone.run(lambda share, text: None, lambda: None, 1000)
    assert alone.importance is not None
    first, both = (each.importance.importance["head.bias"] for each in (alone, learner))  # type: ignore[union-attr]
    assert torch.allclose(both[:2], first)


def test_only_shared_weights_are_held() -> None:
    assert {name.split(".")[0] for name in shared(network(graph="weighted"))} == {
        "trunk", "norm", "moe", "gate_bias", "task_bias", "head",
    }  # fmt: skip
    assert not any("experts" in name or "graph" in name for name in shared(network(graph="weighted")))
