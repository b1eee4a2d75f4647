"""Experts by cross-entropy, gate by policy gradient: gradients are split, or not where they are asked to meet."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from experts import data
from experts.hybrid import HybridSettings, hybrid_loss, train_hybrid
from experts.model import MoEClassifier

SETTINGS = HybridSettings(epochs=12, cost_weight=0.3)


def cost_of(members_BE: torch.Tensor) -> torch.Tensor:
    return members_BE.float() @ torch.tensor([0.1, 0.1, 1.0, 1.0])


def model(trunk: int = 0) -> MoEClassifier:
    torch.manual_seed(0)
    return MoEClassifier(64, 10, widths=(8, 8, 8, 8), trunk=trunk)


@pytest.mark.parametrize("part", ["cross_entropy", "policy_gradient"])
@pytest.mark.parametrize("straight_through", [False, True])
def test_gradients_are_split_as_said(part: str, straight_through: bool) -> None:
    mixture, (x, y) = model(trunk=16), data.load("digits")["train"]
    settings = replace(SETTINGS, straight_through=straight_through)
    generator = torch.Generator().manual_seed(0)
    rows = torch.from_numpy(x[:200]), torch.from_numpy(y[:200])
    losses = hybrid_loss(mixture, *rows, cost_of, settings, torch.zeros(()), 1.0, generator)
    getattr(losses, part).backward()
    reached = {
        name: any(p.grad is not None and bool(p.grad.abs().sum() > 0) for p in module.parameters())
        for name, module in (("gate", mixture.gate), ("experts", mixture.experts), ("trunk", mixture.trunk))
    }
    by_cross_entropy = part == "cross_entropy"
    assert reached == {
        "gate": not by_cross_entropy or straight_through, "experts": by_cross_entropy, "trunk": by_cross_entropy,
    }  # fmt: skip


def test_reward_rises_and_cost_falls() -> None:
    x, y = data.load("digits")["train"]
    for seed in range(3):  # passes for 10 of the seeds 0 to 9
        mixture = model()
        log = train_hybrid(mixture, x, y, cost_of, replace(SETTINGS, seed=seed))
        assert len(log) == 12
        assert log[-1]["reward"] > log[0]["reward"] + 0.2
        assert log[-1]["cost"] < log[0]["cost"] - 0.2
        assert log[0]["temperature"] == 2
        assert all(torch.isfinite(p).all() for p in mixture.parameters())


def test_the_reward_s_quality_is_the_right_class_s_probability_where_asked() -> None:
    mixture, rows = model(), [torch.from_numpy(part[:50]) for part in data.load("digits")["train"]]
    settings = replace(SETTINGS, cost_weight=0.0, reward_temperature=0.5)

    def mean(settings: HybridSettings) -> float:
        generator = torch.Generator().manual_seed(0)
        return hybrid_loss(mixture, *rows, cost_of, settings, torch.zeros(()), 1.0, generator).reward.item()

    assert 0.05 < mean(settings) < 0.2  # untrained: about a tenth
    correct, sharp = (mean(replace(settings, reward_temperature=t)) for t in (None, 1e-6))
    assert sharp == pytest.approx(correct, abs=1e-6)


def test_a_last_batch_of_one_input_is_learnt_from() -> None:
    x, y = (part[:33] for part in data.load("digits")["train"])
    mixture = model()
    (log,) = train_hybrid(mixture, x, y, cost_of, replace(SETTINGS, epochs=1))
    assert all(np.isfinite(list(log.values())))
    assert all(torch.isfinite(p).all() for p in mixture.parameters())


def test_the_same_seed_gives_the_same_bits() -> None:
    x, y = data.load("digits")["train"]
    first, second = (train_hybrid(model(), x, y, cost_of, replace(SETTINGS, epochs=2)) for _ in range(2))
    assert first == second
