"""AutoRate sets the rate of torch trainings as the environment does; baselines by hand."""

from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
import pytorch_optimizer
import torch
import torch.nn.functional as F
from torch import nn

from agents.baselines import autorate as baselines
from agents.deploy.autorate import AutoRate, load_policy
from agents.evaluate import evaluate
from experts import data
from moe_envs.autorate.estimator import LAYOUT
from moe_envs.autorate.signals import BACK, CLIMB, KEEP

ID = "moe_envs:MoEAutoRate-v0"
STEPS = 80


class Script:
    """A policy of given actions that notes what it observes."""

    def __init__(self, actions: list[int]) -> None:
        self.actions, self.seen = list(actions), list[np.ndarray]()

    def predict(self, observation: np.ndarray, deterministic: bool = True) -> tuple[np.ndarray, None]:
        self.seen.append(observation[0])
        return np.array([self.actions.pop(0) if self.actions else KEEP]), None


class Training:
    """Digits and a perceptron, one seed."""

    def __init__(self, make: Any = torch.optim.AdamW, **arguments: Any) -> None:
        digits = data.load("digits")
        self.inputs, self.labels = map(torch.from_numpy, digits["rl_train"])
        self.held_out = tuple(map(torch.from_numpy, digits["validation"]))
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(64, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 10))
        self.optimizer = make(self.model.parameters(), **arguments)
        self.step = 0

    def validation(self) -> float:
        self.model.eval()
        with torch.no_grad():
            loss = float(F.cross_entropy(self.model(self.held_out[0]), self.held_out[1]))
        self.model.train()
        return loss

    def run(self, auto: AutoRate, steps: int) -> None:
        for _ in range(steps):
            rows = (self.step * 32 + torch.arange(32)) % len(self.labels)
            loss = F.cross_entropy(self.model(self.inputs[rows]), self.labels[rows])
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            self.step += 1
            auto.step(loss)


@pytest.mark.parametrize("number", [0, 1])
def test_it_observes_what_the_environment_observes(number: int) -> None:
    """AdamW and SGD: the same training in torch, decision by decision, with a way back."""
    actions = [KEEP, CLIMB, KEEP, BACK, KEEP, 2]  # the first is not asked for
    env: Any = gymnasium.make_vec(ID, 1, "vector_entry_point", initial_rate=0.003, split="test").unwrapped
    for seed in range(99):
        observation, _ = env.reset(seed=seed)
        context = env.describe(0)
        if context.sgd == number and context.experts == 4:
            break
    trainings = env.trainings
    model = trainings.training.module(0)
    made: Any = torch.optim.SGD if context.sgd else torch.optim.AdamW
    more = {"momentum": 0.9} if context.sgd else {}
    optimizer = made(model.parameters(), lr=0.003, weight_decay=0.0, **more)
    inputs = torch.from_numpy(env.task.validation_inputs[:200] * np.float32(context.scale))
    labels = torch.from_numpy(env.task.validation_labels[:200].copy())

    def validation() -> float:
        with torch.no_grad():
            return float(F.cross_entropy(model(inputs), labels))

    script = Script(actions[1:])
    auto = AutoRate(
        optimizer, script, validation=validation, steps=10 * context.decisions, decisions=context.decisions,
        range_test=False,
    )  # fmt: skip
    expected = [observation[0]]
    for action in actions:
        observation, *_ = env.step(np.array([action]))
        expected.append(observation[0])
    for step in range(10 * len(actions)):
        places = (step * 32 + np.arange(32)) % context.subset
        chosen = trainings._subset[0, places]
        loss = F.cross_entropy(
            model(torch.from_numpy(env.task.inputs[chosen] * np.float32(context.scale))),
            torch.from_numpy(trainings._labels[0, chosen].astype(np.int64)),
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        auto.step(loss)
    assert len(script.seen) == len(actions)
    for ours, theirs in zip(script.seen, expected[1:], strict=True):
        np.testing.assert_allclose(ours, theirs, atol=0.02)


@pytest.mark.parametrize("policy", ["default", "rule"])
@pytest.mark.parametrize("make", [torch.optim.AdamW, torch.optim.SGD, pytorch_optimizer.Lamb])
def test_no_rate_is_needed(policy: str, make: Any) -> None:
    training = Training(make, lr=1e-8)
    first = training.validation()
    auto = AutoRate(
        training.optimizer, policy, validation=training.validation, steps=300, decisions=20, module=training.model
    )
    training.run(auto, 300)
    loss = auto.finish()
    assert loss == pytest.approx(training.validation(), rel=1e-5)
    assert loss < 0.25 * first
    assert len(auto.timeline()) == 20
    assert auto.timeline()["validation_loss"].min() == pytest.approx(loss)


def test_the_range_test_leaves_no_trace_but_the_rate() -> None:
    training, script = Training(lr=1.0), Script([])
    before = [each.detach().clone() for each in (*training.model.parameters(), *training.model.buffers())]
    auto = AutoRate(training.optimizer, script, validation=training.validation, steps=600, module=training.model)
    training.run(auto, 60)
    after = [*training.model.parameters(), *training.model.buffers()]
    assert all(torch.equal(one, other) for one, other in zip(before, after, strict=True))
    assert not training.optimizer.state_dict()["state"]
    assert 1e-4 < auto.rate < 0.3
    assert auto.decisions == 1


def test_groups_keep_the_ratios_of_their_rates() -> None:
    layers = nn.Linear(3, 3), nn.Linear(3, 3)
    optimizer = torch.optim.SGD(
        [{"params": layers[0].parameters(), "lr": 0.1}, {"params": layers[1].parameters()}], 0.3
    )
    auto = AutoRate(optimizer, Script([]), validation=lambda: 1.0, steps=100, range_test=False)
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([0.1, 0.3])
    auto.step(1.0)
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([0.1, 0.3])


def test_it_resumes_bit_for_bit() -> None:
    """Saved in the range test, between two decisions, and before a way back."""
    for stop in (20, 47, 130):
        losses = []
        for interrupted in (False, True):
            training = Training(lr=0.1)
            arguments: dict[str, Any] = {"validation": training.validation, "steps": 300, "module": training.model}
            auto = AutoRate(training.optimizer, "rule", **arguments)
            training.run(auto, stop)
            if interrupted:
                saved = auto.state_dict(), training.model.state_dict(), training.optimizer.state_dict()
                saved = torch.load(_written(saved), weights_only=True)
                training, step = Training(lr=0.1), training.step
                arguments |= {"validation": training.validation, "module": training.model}
                auto = AutoRate(training.optimizer, "rule", **arguments)
                auto.load_state_dict(saved[0])
                training.model.load_state_dict(saved[1])
                training.optimizer.load_state_dict(saved[2])
                training.step = step
            training.run(auto, 300 - stop)
            losses.append(auto.finish())
        assert losses[0] == losses[1]


def _written(content: Any) -> Any:
    import io

    file = io.BytesIO()
    torch.save(content, file)
    file.seek(0)
    return file


def test_schedule_free_is_validated_and_put_back_in_its_own_modes() -> None:
    training = Training(pytorch_optimizer.ScheduleFreeAdamW, lr=1.0)
    training.optimizer.train()
    first = training.validation()
    auto = AutoRate(training.optimizer, "rule", validation=training.validation, steps=300, module=training.model)
    training.run(auto, 300)
    auto.finish()
    training.optimizer.eval()
    assert training.validation() < 0.5 * first
    assert training.validation() == pytest.approx(auto.best_loss, rel=1e-3)


def test_a_training_that_turns_nan_goes_back() -> None:
    training = Training(torch.optim.SGD, lr=1e-3)
    script = Script([KEEP, 6, 6])
    auto = AutoRate(
        training.optimizer, script, validation=training.validation, steps=200, range_test=False, module=training.model
    )
    training.run(auto, 10)
    with torch.no_grad():
        training.model[0].weight.fill_(float("nan"))
    training.run(auto, 10)
    assert auto.backs >= 1
    assert all(bool(each.isfinite().all()) for each in training.model.parameters())
    assert np.isfinite(script.seen[-1]).all()


def test_it_is_drawn(tmp_path: Path) -> None:
    training = Training(lr=0.1)
    auto = AutoRate(training.optimizer, "rule", validation=training.validation, steps=STEPS)
    training.run(auto, STEPS)
    auto.plot(tmp_path / "rates.png")
    assert (tmp_path / "rates.png").stat().st_size > 5_000
    with pytest.raises(ValueError, match="more than steps=80"):
        auto.step(0.1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"steps": 5}, "steps=5"),
        ({"decisions": 0}, "decisions=0"),
        ({"policy": "defualt"}, '\'defualt\'.*"default", "rule"'),
        ({"validation": lambda: float("nan")}, "returned nan"),
    ],
)
def test_wrong_arguments_say_what_to_do(arguments: dict[str, Any], message: str) -> None:
    training = Training(lr=0.1)
    with pytest.raises(ValueError, match=message):
        AutoRate(training.optimizer, **({"validation": training.validation, "steps": 100} | arguments))


def test_a_saved_learner_is_a_policy(tmp_path: Path) -> None:
    from agents import PPO

    PPO("MlpPolicy", ID, n_envs=2, n_steps=4, batch_size=8, seed=0).save(tmp_path / "saved")
    assert hasattr(load_policy(tmp_path / "saved"), "predict")


def test_the_rule_climbs_until_it_is_worse_and_then_keeps() -> None:
    observation = np.zeros((5, LAYOUT["rating"].slice.stop), dtype=np.float32)
    observation[:, LAYOUT["best_over_first"].slice.start] = np.log([0.5, 0.5, 0.5, 0.5, 0.1])
    observation[:, LAYOUT["over_first"].slice.start] = np.log([0.5, 0.6, 0.5, 0.6, 0.12])
    observation[[2, 3], LAYOUT["backs"].slice.start] = 1
    assert baselines.rule(observation).tolist() == [CLIMB, BACK, KEEP, KEEP, CLIMB]  # the last rise is noise
    assert baselines.rule(observation, climb=False).tolist() == [KEEP] * 5


def test_baselines_are_found_by_the_spec_and_set_the_rates(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(baselines, "EPISODES", 8)
    found = baselines.baselines(ID, task="digits")
    assert baselines.bound(ID) is None
    assert len(found) == 8
    means = {name: evaluate(policy, ID, 16, split="test")["return"].mean() for name, policy in found.items()}
    assert means["range test, cosine"] == means["cosine"]  # the episodes start there
    assert means["range test, cosine"] > means["random actions"]
    drawn = {"initial_rate": (1e-5, 1.0), "split": "test"}
    assert evaluate(found["cosine"], ID, 16, **drawn)["return"].mean() < means["cosine"]
    assert evaluate(found["range test, cosine"], ID, 16, **drawn)["return"].mean() == means["cosine"]
