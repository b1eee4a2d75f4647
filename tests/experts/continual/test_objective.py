"""Losses of a step, worked out by hand."""

from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from experts.continual import Replay, Strategy, Stream
from experts.continual.buffer import Buffer
from experts.continual.inputs import Encoding
from experts.continual.network import ContinualNetwork
from experts.continual.objective import BALANCE, TEMPERATURE, Memory, Objective, mismatch
from experts.losses import load_balancing_loss
from tests.experts.continual.conftest import QUICK, SMALL


class Step(NamedTuple):
    """The loss of a step of the third task less that of the balance, and what it was computed from."""

    loss: float
    logits: torch.Tensor  # of the new inputs
    labels: torch.Tensor
    x: torch.Tensor
    network: ContinualNetwork
    memory: Memory
    drawn: np.ndarray  # places in the replay

    @property
    def entropy(self) -> torch.Tensor:
        """Cross-entropy of the new inputs among all classes so far."""
        return F.cross_entropy(self.logits, self.labels)

    @property
    def again(self) -> torch.Tensor:
        """Logits of the replayed inputs."""
        assert self.memory.buffer is not None
        found: torch.Tensor = self.network(torch.from_numpy(self.memory.buffer.rows[self.drawn]))[0]
        return found.detach()


@pytest.fixture
def step(blobs: Stream) -> Callable[[Strategy], Step]:
    """The step of a strategy."""

    def made(strategy: Strategy) -> Step:
        torch.manual_seed(0)
        network, random = ContinualNetwork((6,), 8 if strategy.all_classes else 6, SMALL), np.random.default_rng(0)
        memory, drawn = Memory(None, None, None), np.zeros(0, np.int64)
        x, y = (part[:5] for part in blobs.tasks[2]["train"])
        rows = x
        if strategy.replay:
            buffer = Buffer(strategy.replay, 8)
            kept = np.linspace(-1, 1, 32, dtype=np.float32).reshape(4, 8)
            old_x, old_y = (part[:4] for part in blobs.tasks[0]["train"])
            buffer.add(old_x, old_y, 0, random, kept)
            memory, drawn = memory._replace(buffer=buffer), np.random.default_rng(1).integers(4, size=3)
            rows = np.concatenate([x, buffer.rows[drawn]])
        if strategy.distillation:
            snapshot = ContinualNetwork((6,), network.num_classes if strategy.all_classes else 4, SMALL)
            memory = memory._replace(snapshot=snapshot)
        objective = Objective(blobs, strategy, Encoding((6,)))
        loss, logits = objective.new(network, memory, x, y, 2, np.random.default_rng(1))
        _, statistics = network(torch.from_numpy(rows))
        balance = BALANCE * load_balancing_loss(statistics.logits, statistics.chosen)
        return Step(
            float((loss - balance).detach()), logits, torch.from_numpy(y), torch.from_numpy(x), network, memory, drawn
        )

    return made


def test_new_inputs_alone(step: Callable[[Strategy], Step]) -> None:
    found = step(QUICK)
    assert found.loss == pytest.approx(float(found.entropy), abs=1e-5)


def test_asymmetric_compares_the_classes_of_the_task(step: Callable[[Strategy], Step]) -> None:
    found = step(replace(QUICK, asymmetric=True))
    assert found.loss == pytest.approx(float(F.cross_entropy(found.logits[:, 4:6], found.labels - 4)), abs=1e-5)


def test_class_weights_are_inverse_to_counts(step: Callable[[Strategy], Step], blobs: Stream) -> None:
    found = step(replace(QUICK, balance="weights"))
    counts = np.bincount(blobs.tasks[2]["train"][1], minlength=6)[4:]
    weights = torch.from_numpy(1 / counts)[found.labels - 4]
    each = F.cross_entropy(found.logits, found.labels, reduction="none")
    assert found.loss == pytest.approx(float((each * weights).sum() / weights.sum()), abs=1e-5)


def test_replayed_inputs_count_their_weight(step: Callable[[Strategy], Step]) -> None:
    found = step(replace(QUICK, replay=Replay(batch_size=3, weight=0.5)))
    assert found.memory.buffer is not None
    old = F.cross_entropy(found.again, torch.from_numpy(found.memory.buffer.labels[found.drawn]).long())
    assert found.loss == pytest.approx(float(found.entropy + 0.5 * old), abs=1e-5)


def test_kept_logits_are_matched(step: Callable[[Strategy], Step]) -> None:
    found = step(replace(QUICK, replay=Replay(batch_size=3, weight=0.0, logits=0.3), all_classes=True))
    assert found.memory.buffer is not None
    distance = F.mse_loss(found.again, torch.from_numpy(found.memory.buffer.logits[found.drawn]))
    assert found.loss == pytest.approx(float(found.entropy + 0.3 * distance), abs=1e-5)


@pytest.mark.parametrize("all_classes", [False, True])
def test_distillation_is_of_the_classes_before(step: Callable[[Strategy], Step], all_classes: bool) -> None:
    found = step(replace(QUICK, distillation=0.7, all_classes=all_classes))
    assert found.memory.snapshot is not None
    known = found.memory.snapshot(found.x)[0][:, :4].detach()
    now, before = ((each / TEMPERATURE).log_softmax(1) for each in (found.logits[:, :4], known))
    divergence = (before.exp() * (before - now)).sum(1).mean() * TEMPERATURE**2
    assert found.loss == pytest.approx(float(found.entropy + 0.7 * divergence), abs=1e-5)


def test_logits_of_classes_that_were_not_known_are_not_matched() -> None:
    logits, kept = torch.arange(6.0).reshape(2, 3), np.array([[1, np.nan, np.nan], [3, 6, np.nan]], np.float32)
    assert float(mismatch(logits, kept)) == pytest.approx((1 + 0 + 4) / 3)


def test_distillation_follows_the_classes_in_the_order_of_the_tasks(blobs: Stream) -> None:
    turned = Stream("turned", "class", blobs.tasks[::-1])
    objective = Objective(turned, replace(QUICK, distillation=0.7), Encoding((6,)))
    logits, known = torch.randn(5, 8), torch.randn(5, 8)
    other = known.clone()
    other[:, :6] = 0  # of tasks to come
    assert torch.equal(objective.divergence(logits, known, 1), objective.divergence(logits, other, 1))
