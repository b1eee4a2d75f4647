"""Meta-optimisers in a plain torch loop: rules to the epoch, state that goes on alike, a policy that sees the same."""

import io
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
import pytorch_optimizer
import torch
import torch.nn.functional as F

from agents import PPO
from agents.deploy.metaopt import HeuristicMetaOptimizer, MetaOptimizer, PolicyMetaOptimizer, gate_metrics
from experts import tasks
from experts.model import MoEClassifier
from moe_envs.metaopt.signals import apply, observe

ID = "moe_envs:MoEMetaOpt-v0"


def setup(
    kind: type[torch.optim.Optimizer] = torch.optim.AdamW, lr: float = 0.01, decay: float = 0.01
) -> tuple[MoEClassifier, torch.optim.Optimizer, dict[str, Any]]:
    torch.manual_seed(0)
    model = MoEClassifier(64, 10, widths=(16,) * 4)
    groups = {"gate": model.gate, "experts": model.experts}
    parts: Any = [{"params": list(part.parameters())} for part in groups.values()]
    return model, kind(parts, lr=lr, weight_decay=decay), groups  # type: ignore[call-arg]


def epoch(model: MoEClassifier, optimizer: torch.optim.Optimizer, seed: int, steps: int = 5) -> dict[str, Any]:
    """Some optimiser steps and a validation on the digits."""
    task, losses = tasks.load("digits"), []
    generator = np.random.default_rng(seed)
    for _ in range(steps):
        rows = generator.integers(len(task.labels), size=64)
        loss = F.cross_entropy(model(torch.from_numpy(task.inputs[rows])), torch.from_numpy(task.labels[rows]))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    with torch.no_grad():
        x, y = torch.from_numpy(task.validation_inputs.copy()), torch.from_numpy(task.validation_labels.copy())
        logits = model(x)
        found = {"validation_loss": F.cross_entropy(logits, y).item(), "train_losses": losses}
        found["validation_accuracy"] = (logits.argmax(1) == y).float().mean().item()
        return found | gate_metrics(model.gate(x))


def test_rates_are_halved_exactly_after_three_epochs_of_plateau() -> None:
    _, optimizer, groups = setup(lr=0.08)
    meta = HeuristicMetaOptimizer(optimizer, groups)
    rates = []
    for number, loss in enumerate([1.0, 0.9, 0.9, 0.95, 0.92, 0.8, 0.8, 0.8, 0.79, 0.8, 0.8, 0.8]):
        rates.append(meta.update_hparams({"validation_loss": loss}, number)["experts/lr"])
    assert rates == pytest.approx([0.08] * 4 + [0.04] * 7 + [0.02])
    assert meta.hparams()["gate/lr"] == pytest.approx(0.01)  # half as fast
    assert optimizer.param_groups[1]["lr"] == pytest.approx(0.02)


def test_other_rules_and_clamps() -> None:
    model, optimizer, groups = setup(lr=0.2)
    meta = HeuristicMetaOptimizer(optimizer, groups, norm_rise=0.5)
    for number in range(3):
        meta.update_hparams({"validation_loss": 1.0 - number / 10, "gate_entropy": 0.1}, number)
    assert meta.hparams()["gate/lr"] == pytest.approx(0.05)  # of 0.1, after three of low entropy
    with torch.no_grad():
        for parameter in model.experts.parameters():
            parameter *= 1.6
    meta.update_hparams({"validation_loss": 0.1}, 3)
    assert (meta.hparams()["experts/weight_decay"], meta.hparams()["gate/weight_decay"]) == (0.1, 0.01)
    for number in range(200):
        meta.update_hparams({"validation_loss": 1.0}, number)
    assert meta.hparams()["experts/lr"] == 1e-5


@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.SGD])
def test_a_step_that_diverges_is_undone(kind: type[torch.optim.Optimizer]) -> None:
    model, optimizer, groups = setup(kind)
    meta = HeuristicMetaOptimizer(optimizer, groups, gate_share=1.0)
    for number in range(3):  # the first before any decision
        weights, rates = [p.detach().clone() for p in model.parameters()], meta.rates
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.fill_(torch.nan)
        meta.update_hparams({"validation_loss": float("nan")}, number)
        assert all(torch.equal(p, saved) for p, saved in zip(model.parameters(), weights, strict=True))
        np.testing.assert_allclose(meta.rates, rates / 2)
        meta.update_hparams(epoch(model, optimizer, number), number)
        assert np.isfinite(epoch(model, optimizer, 1)["validation_loss"])
        meta.update_hparams(epoch(model, optimizer, number), number)


def test_undoing_in_a_loop_is_undoing_in_the_environment() -> None:
    class Double:
        def predict(self, observation: np.ndarray, deterministic: bool = True) -> tuple[np.ndarray, None]:
            self.seen = observation[0]
            return np.array([[2, 2, 1, 1]]), None

    policy, (model, optimizer, groups) = Double(), setup(lr=0.02)
    meta = PolicyMetaOptimizer(optimizer, policy, groups, target=0.97)
    env: Any = gymnasium.make(ID, initial_rate=0.02, steps_per_action=1).unwrapped
    env.reset(seed=0)
    meta.update_hparams(epoch(model, optimizer, 0), 0)
    assert meta.rates[0] == pytest.approx(0.04)
    meta.update_hparams({"validation_loss": float("inf"), "validation_accuracy": 0.1}, 1)
    assert policy.seen[env.observation_layout["undone"].slice] == 1
    assert policy.seen[env.observation_layout["rates"].slice] == pytest.approx(np.log10(0.01) + 2.5)  # half of 0.02
    assert meta.rates[0] == pytest.approx(0.02)  # and doubled by the policy
    meta.update_hparams(epoch(model, optimizer, 1) | {"train_losses": [float("nan"), 1.0]}, 2)
    assert np.isfinite(policy.seen).all()
    with pytest.raises(ValueError, match="validation_accuracy"):
        meta.update_hparams({"validation_loss": 1.0}, 3)


def test_groups_of_one_part_keep_their_proportions() -> None:
    model, _, groups = setup()
    weights = [p for p in model.experts.parameters() if p.ndim == 2]
    biases = [p for p in model.experts.parameters() if p.ndim == 1]
    parts: Any = [
        {"params": list(model.gate.parameters()), "lr": 0.0},
        {"params": weights, "lr": 1e-2},
        {"params": biases, "lr": 1e-3, "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(parts, weight_decay=0.01)
    meta = HeuristicMetaOptimizer(optimizer, groups)
    meta._set(np.array([0.0, 2e-2]), np.array([2, 3]))
    assert [(group["lr"], group["weight_decay"]) for group in optimizer.param_groups] == [
        (0.0, 0.01), (2e-2, 0.1), (2e-3, 0.0),
    ]  # fmt: skip
    meta.update_hparams({"validation_loss": 1.0}, 0)
    assert meta.rates[0] == 0  # frozen remains frozen
    model.experts.bias_EC.requires_grad_(False)
    wanted = [p for p in model.experts.parameters() if p.requires_grad]
    HeuristicMetaOptimizer(torch.optim.SGD([{"params": list(model.gate.parameters())}, {"params": wanted}]), groups)
    with pytest.raises(ValueError, match="Rprop has no weight decay"):
        HeuristicMetaOptimizer(torch.optim.Rprop([{"params": list(p.parameters())} for p in groups.values()]), groups)


@pytest.fixture(scope="module")
def policy() -> PPO:
    return PPO("MlpPolicy", ID, n_envs=8, n_steps=32, env_kwargs={"steps_per_action": 1}).learn(512)


def make(kind: str, optimizer: torch.optim.Optimizer, groups: dict[str, Any], policy: PPO) -> MetaOptimizer:
    if kind == "rules":
        return HeuristicMetaOptimizer(optimizer, groups, patience=2)
    return PolicyMetaOptimizer(optimizer, policy, groups, target=0.97, warm_up=2)


@pytest.mark.parametrize("kind", ["rules", "policy"])
def test_saved_and_loaded_it_goes_on_alike(kind: str, policy: PPO) -> None:
    def play(cut: int | None) -> tuple[list[dict[str, float]], MetaOptimizer]:
        model, optimizer, groups = setup()
        meta = make(kind, optimizer, groups, policy)
        for number in range(8):
            meta.update_hparams(epoch(model, optimizer, number), number)
            if number == cut:
                file = io.BytesIO()
                torch.save([each.state_dict() for each in (model, optimizer, meta)], file)
                model, optimizer, groups = setup()
                meta = make(kind, optimizer, groups, policy)
                file.seek(0)
                for each, state in zip((model, optimizer, meta), _load(file), strict=True):
                    each.load_state_dict(state)
        return meta.history, meta

    whole, meta = play(None)
    for cut in (0, 3, 6):
        assert play(cut)[0] == whole
    frame = meta.timeline()
    assert list(frame["step"]) == list(range(8))
    assert {"gate/lr", "experts/weight_decay", "gate/beta1"} <= set(frame.columns)


def _load(file: io.BytesIO) -> Any:
    return torch.load(file, weights_only=True)


def test_a_policy_sees_in_a_loop_what_it_saw_in_the_environment(policy: PPO) -> None:
    """The environment's own training, repeated in torch step by step."""
    env: Any = gymnasium.make(ID, widths=(16,), initial_rate=0.01, initial_decay=0.01, steps_per_action=5).unwrapped
    env.reset(seed=4)
    vector, task = env.vector, tasks.load("digits")
    model, optimizer, groups = setup()
    model.load_state_dict(vector.training.module(0).state_dict())
    meta = PolicyMetaOptimizer(optimizer, policy, groups, target=0.97)
    meta._losses = np.full((2, 3), np.log(np.log(10)))
    x, y = torch.from_numpy(task.validation_inputs.copy()), torch.from_numpy(task.validation_labels.copy())
    chosen = np.array([1, 1, 1, 1])
    for decision in range(6):
        observation = env.step(chosen)[0]
        losses = []
        for step in range(5):
            rows = vector._orders[0, (5 * decision + step) * 64 :][:64]
            loss = F.cross_entropy(model(torch.from_numpy(task.inputs[rows])), torch.from_numpy(task.labels[rows]))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        with torch.no_grad():
            logits = model(x)
            metrics = {"validation_loss": F.cross_entropy(logits, y).item(), "train_losses": losses}
            metrics["validation_accuracy"] = (logits.argmax(1) == y).float().mean().item()
            metrics |= gate_metrics(model.gate(x))
        meta._note(metrics, metrics["validation_loss"])
        seen = observe(meta.signals())[0]
        meta.decisions += 1
        np.testing.assert_allclose(seen, observation, atol=2e-3)
        chosen, _ = policy.predict(observation)
        meta._losses = meta._losses[:, :3]
        rates, ladder = apply(chosen[None], meta.rates[None], meta.ladder[None])
        meta._set(rates[0], ladder[0])


def test_every_and_mistakes_and_plots(tmp_path: Path) -> None:
    model, optimizer, groups = setup()
    meta = HeuristicMetaOptimizer(optimizer, groups, every=2)
    for number in range(4):
        meta.update_hparams({"validation_loss": 1.0}, number)
    assert [row["step"] for row in meta.history] == [1, 3]
    meta.plot(tmp_path / "timeline.png")
    assert (tmp_path / "timeline.png").stat().st_size > 1000
    with pytest.raises(ValueError, match="must have validation_loss"):
        meta.update_hparams({"loss": 1.0}, 0)
    whole = torch.optim.AdamW(model.parameters())
    with pytest.raises(ValueError, match="parameter groups of just the gate"):
        HeuristicMetaOptimizer(whole, groups)
    with pytest.raises(ValueError, match="gate and experts"):
        HeuristicMetaOptimizer(optimizer, {"gate": model.gate})


def test_the_update_of_any_optimizer_is_measured(policy: PPO) -> None:
    model, _, groups = setup()
    parts = [{"params": part.parameters()} for part in groups.values()]
    for optimizer in (pytorch_optimizer.Lamb(parts, lr=0.02, weight_decay=0.1), torch.optim.RMSprop(parts, lr=0.01)):
        meta = PolicyMetaOptimizer(optimizer, policy, groups, target=0.97)
        x, y = torch.randn(64, 64), torch.randint(10, (64,))
        real = np.zeros(2)
        for step in range(6):
            before = [[p.detach().clone() for p in part.parameters()] for part in groups.values()]
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
            if step % 3 == 0:  # the first after a decision, and the first of all
                moved = [
                    [(p.detach() - old).square().sum().item() for p, old in zip(part.parameters(), olds, strict=True)]
                    for part, olds in zip(groups.values(), before, strict=True)
                ]
                real = np.sqrt([sum(each) for each in moved])
            if step % 3 == 2:
                norms = meta.weight_norms()
                meta.update_hparams({"validation_loss": 1.0, "validation_accuracy": 0.5}, step)
                seen = [meta._noted[f"{name} ratio"] for name in ("gate", "experts")]
                np.testing.assert_allclose(seen, real / norms, rtol=1e-4)
        again = PolicyMetaOptimizer(optimizer, policy, groups, target=0.97)
        again.load_state_dict(meta.state_dict())
        assert again.state_dict()["updates"] == meta.state_dict()["updates"]
