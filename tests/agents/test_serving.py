"""Controllers of a server: baselines, the optimum, discounts by elapsed time, a policy in the real server."""

import asyncio
from pathlib import Path
from typing import Any, ClassVar

import gymnasium
import numpy as np
import pytest

from agents import runs
from agents.baselines import serving as rules
from agents.baselines.serving_bound import Foresight, Optimal, solved
from agents.deploy.serving import controller_of, load
from agents.evaluate import evaluate
from agents.ppo import PPO
from agents.rollouts import Collector, Rows
from experts.serving.batching import Batcher
from experts.serving.control import Choices, RequestClass, Service
from experts.serving.rules import Fixed, rule_of
from moe_envs.serving import MoEServingVectorEnv

ID = "moe_envs:MoEServing-v0"
SHORT: dict[str, Any] = {"seconds": 2.0}


def _return(policy: Any, episodes: int = 32, **kwargs: Any) -> float:
    return float(evaluate(policy, ID, episodes, 0, split="test", **(SHORT | kwargs))["return"].mean())


def test_the_optimum_is_what_it_says_and_above_every_fixed_rule() -> None:
    kwargs: dict[str, Any] = {"answers": "latency", "load": 0.7, "seconds": 8.0}
    env = MoEServingVectorEnv(1, **kwargs)
    _, gain = solved(env)
    optimum = _return(Optimal(), 64, **kwargs)
    assert 1 + optimum == pytest.approx(gain / (0.7 * env.capacity), abs=0.02)
    for cap in (4, 8, 16):
        for timeout in (0.0, 0.05):
            for level in (0, 1):
                rule = rules.ServingRule(lambda env, own=(cap, timeout, level): Fixed(env.choices, *own))
                assert _return(rule, 64, **kwargs) < optimum
    with pytest.raises(ValueError, match="the optimum is known for"):
        Optimal().watch(MoEServingVectorEnv(1))


def test_who_knows_the_future_is_above_who_does_not() -> None:
    ahead = _return(Foresight(), 16, cost_weight=0.0, load=1.0)
    for rule in (Fixed, lambda choices: Fixed(choices, 16, 0.1, 1)):
        made = rules.ServingRule(lambda env, rule=rule: rule(env.choices))
        assert _return(made, 16, cost_weight=0.0, load=1.0) < ahead


def test_who_knows_the_future_may_not_wait_where_nobody_may() -> None:
    kwargs: dict[str, Any] = {"trace": "bursts", "load": 1.1, "seconds": 4.0, "deadline": 0.25}
    ahead = _return(Foresight(), 16, **kwargs)
    for name in ("plan", "slackfit"):
        made = rules.ServingRule(lambda env, name=name: rule_of(name)(env.choices, env.service, env.classes))
        assert _return(made, 16, **kwargs) < ahead


def test_rules_are_tuned_on_validation(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rules, "TRIES", 3)
    monkeypatch.setattr(rules, "TUNED", 4)
    shares: list[float] = []
    found = rules.baselines(ID, report=shares.append, **SHORT)
    assert set(found) > {"fixed", "SlackFit", "thresholds", "random choices"}
    assert shares == sorted(shares)
    assert shares[-1] == 1
    again = rules.baselines(ID, **SHORT)
    assert [getattr(each, "about", None) for each in again.values()] == [
        getattr(each, "about", None) for each in found.values()
    ]
    assert -1 < _return(found["random choices"], 4) < 1
    assert rules.bound(ID, classes="mixed") is None
    assert rules.bound(ID, answers="latency") is None
    assert rules.bound(ID, time_weight=0.5, energy_weight=0.5) is None
    assert isinstance(rules.bound(ID, time_weight=1), Foresight)


def test_settings_stay_where_they_mean_something() -> None:
    family, random = rules.families(MoEServingVectorEnv(1))["adaptive (Clipper)"], np.random.default_rng(0)
    settings = family.drawn(random)
    for _ in range(100):
        settings = family.near(settings, random)
        assert 0.5 <= settings["decrease"] <= 0.95


def test_a_tuned_rule_of_classes_is_written_for_a_server() -> None:
    env = MoEServingVectorEnv(2, classes="mixed", **SHORT)
    family = rules.families(env)["by class"]
    random = np.random.default_rng(0)
    own = family.near(family.near(family.drawn(random), random), random)
    again = controller_of(rules.text_of("by class", own, env))(env.choices, env.service, env.classes)
    made = family.make(env, own)
    assert {name: list(getattr(again, name)) for name in own} == {
        name: pytest.approx(list(getattr(made, name)), rel=1e-4) for name in own
    }
    assert "by class" not in rules.families(MoEServingVectorEnv(1, **SHORT))


class Timed(gymnasium.Env[np.ndarray, int]):
    """Pays 1 after each step; step i takes i seconds, and a reward counts half a second later."""

    observation_space = gymnasium.spaces.Box(0, 10, (1,), np.float32)
    action_space: ClassVar[Any] = gymnasium.spaces.Discrete(2)

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[np.ndarray, dict[str, Any]]:
        super().reset(seed=seed)
        self.steps = 0
        return np.zeros(1, dtype=np.float32), {}

    def step(self, action: int) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        self.steps += 1
        here = np.full(1, self.steps, dtype=np.float32)
        return here, 1.0, self.steps == 3, False, {"discount": 0.5**self.steps}


@pytest.mark.parametrize("mode", ["NextStep", "SameStep", "Disabled"])
def test_discounts_are_collected_and_used(mode: str) -> None:
    vector = gymnasium.vector.SyncVectorEnv([Timed, Timed], autoreset_mode=gymnasium.vector.AutoresetMode(mode))
    collector = Collector(Rows(vector), lambda each: each, np.zeros((2, 0), dtype=np.float32))
    collector.begin(0)
    rollout = collector.collect(4, lambda flat, state, masks: (np.zeros(2, dtype=np.int64), state))
    assert rollout.discount is not None
    assert rollout.discount[:3, 0].tolist() == [0.5, 0.25, 0.125]
    learner = PPO("MlpPolicy", vector, n_steps=4, batch_size=8, n_epochs=1, gamma=0.9, gae_lambda=1.0, seed=0)
    learner.collector.begin(0)
    batch = learner._batch(learner.collector.collect(4, learner._act))
    third = 1.0
    wanted = [1 + 0.9 * 0.5 * (1 + 0.9 * 0.25 * third), 1 + 0.9 * 0.25 * third, third]
    np.testing.assert_allclose(batch.returns.reshape(4, 2)[:3, 0], wanted, rtol=1e-5)


def test_a_trained_policy_decides_in_a_server(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    settings = {"n_envs": 4, "n_steps": 16, "batch_size": 32, "total_timesteps": 64, "policy_kwargs": {"net_arch": [8]}}
    runs.train(ID, "ppo", 0, tmp_path / "run", SHORT, settings)
    made = controller_of(f"policy:{tmp_path / 'run'}")
    env = MoEServingVectorEnv(1, **SHORT)
    classes = (RequestClass(deadline=2.0),)
    two = Service(env.service.levels[:2], env.service.sizes, env.service.seconds[:2], env.service.quality[:2])
    with pytest.raises(ValueError, match="this server, with 2 levels"):
        made(Choices(2), two, classes)
    assert "was trained for other requests: RequestClass(name='default', deadline=0.25" in caplog.text
    caplog.clear()
    controller = made(env.choices, env.service, env.classes)
    assert not caplog.text
    env.reset(seed=0)
    policy, _ = runs.load(tmp_path / "run")
    wanted = policy.predict(env._observe(), action_masks=env.action_masks())[0]
    assert controller.decide(env.seen(), np.array([True])).tolist() == wanted.tolist()

    async def main() -> Any:
        batcher = Batcher(lambda rows, level: list(rows), controller, env.choices, env.service, classes)
        batcher.start()
        found = await asyncio.gather(*(batcher.submit([row]) for row in range(20)))
        await batcher.stop()
        return [answers for answers, _ in found]

    assert asyncio.run(main()) == [[row] for row in range(20)]


def test_other_runs_do_not_decide_nor_serve(tmp_path: Path) -> None:
    settings = {"n_envs": 2, "n_steps": 8, "batch_size": 16, "total_timesteps": 16, "policy_kwargs": {"net_arch": [8]}}
    kwargs = {"bundle": "digits", "batch_size": 8}
    runs.train("moe_envs:MoERouting-v0", "ppo", 0, tmp_path / "run", kwargs, settings)
    with pytest.raises(ValueError, match="not of MoEServing-v0"):
        controller_of(f"policy:{tmp_path / 'run'}")
    served = load(tmp_path / "run")
    rows = served.examples(3)
    answers = served.run(rows, 0)
    assert [len(each["probabilities"]) for each in answers] == [10, 10, 10]
    assert all(each["experts"] for each in answers)
