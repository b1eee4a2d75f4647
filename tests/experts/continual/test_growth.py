"""Networks that grow: outputs stay until an expert is opened, equal experts merge."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from experts.continual import (
    Stream,
)
from experts.continual.learner import StreamLearner
from tests.experts.continual.conftest import QUICK, SMALL, network


@pytest.mark.parametrize("graph", [None, "weighted", "sum", "conv"])
def test_outputs_stay_until_a_new_expert_is_opened(graph: str | None) -> None:
    made, x = network(graph=graph), torch.randn(50, 6)
    before, _ = made(x)
    expert = made.add_expert()
    made.add_classes(6)
    after, statistics = made(x)
    assert torch.equal(before, after[:, :4])
    assert after.shape == (50, 6)
    assert float(statistics.load[expert]) == 0
    if graph is not None:
        assert made.moe.graph.edges.shape == (4, 4)  # type: ignore[union-attr]
    made.open(expert, x)
    logits, statistics = made(x)
    assert float(statistics.load[expert]) > 0.05
    assert logits.shape == (50, 6)


def test_experts_that_are_equal_merge_into_the_same_function() -> None:
    made, x = network(3, k=3, graph="weighted"), torch.randn(20, 6)
    with torch.no_grad():
        for own, other in zip(made.moe.experts[0].parameters(), made.moe.experts[2].parameters(), strict=True):
            other.copy_(own)
    assert float(made.likeness(x)[0, 2]) == pytest.approx(1, abs=1e-5)
    kept = [weights.clone() for weights in made.moe.experts[0].parameters()]
    made.merge(0, 2, torch.tensor([0.5, 0.2, 0.3]))
    assert made.num_experts == 2
    assert all(torch.allclose(a, b) for a, b in zip(kept, made.moe.experts[0].parameters(), strict=True))
    assert made.moe.graph.edges.shape == (2, 2)  # type: ignore[union-attr]
    assert made.gate_bias.shape == (2,)
    assert made.task_bias.shape == (1, 2)


def test_the_step_of_experts_of_earlier_tasks_is_scaled(blobs: Stream) -> None:
    """SGD without momentum's history: the first step of a slow expert is a tenth of that of a free one."""
    moved = {}
    for freezing in (1.0, 0.1):
        learner = StreamLearner(blobs, replace(QUICK, optimizer="sgd", freezing=freezing, learning_rate=0.1), 0, SMALL)
        learner.begin()
        learner.slow_E = np.array([True, False])
        learner.optimizer = learner.new_optimizer()
        before = [weights.detach().clone() for weights in learner.network.moe.experts.parameters()]
        learner._learn(next(learner._batches()))
        after = learner.network.moe.experts.parameters()
        moved[freezing] = [new.detach() - old for new, old in zip(after, before, strict=True)]
    assert torch.allclose(moved[0.1][0], 0.1 * moved[1.0][0], atol=1e-6)
    assert torch.allclose(moved[0.1][2], moved[1.0][2])
    assert float(moved[1.0][0].abs().max()) > 1e-4
