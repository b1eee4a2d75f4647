"""The one way to train: the weights best on validation are kept, looks end a training, resumed runs look alike."""

from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest

from agents import training
from agents.training import Look, Watcher, train

ID = "moe_envs:MoERouting-v0"
SMALL: dict[str, Any] = {"n_envs": 4, "n_steps": 32, "batch_size": 128, "total_timesteps": 512}


@pytest.mark.parametrize("backend", ["own", "sb3"])
@pytest.mark.parametrize("sign", [1, -1])
def test_the_weights_best_on_validation_are_kept(sign: int, backend: str) -> None:
    seen = gymnasium.make(ID, bundle="digits").observation_space.shape or ()
    observations = np.random.default_rng(0).normal(size=(500, *seen)).astype(np.float32)
    actions: list[np.ndarray] = []

    def judge(agent: Any) -> float:
        actions.append(agent.predict(observations, deterministic=True)[0])
        return float(sign * agent.num_timesteps)

    found = train(ID, "ppo", backend, env_kwargs={"bundle": "digits"}, settings=SMALL, judge=judge, looks=20)
    assert [look.steps for look in found.curve] == [128, 256, 384, 512]
    wanted, other = (actions[-1], actions[0])[::sign]
    assert (found.agent.predict(observations, deterministic=True)[0] == wanted).all()
    assert (wanted != other).any()
    assert (np.diff([look.cpu_s for look in found.curve]) > 0).all()


@pytest.mark.parametrize("backend", ["own", "sb3"])
def test_a_look_ends_a_training(backend: str) -> None:
    seen: list[Look] = []

    def on_look(look: Look) -> bool:
        seen.append(look)
        return len(seen) < 2

    shares: list[float] = []
    kwargs = {"bundle": "digits"}
    found = train(ID, "ppo", backend, env_kwargs=kwargs, settings=SMALL, judge=lambda agent: 1.0, looks=4,
                  on_look=on_look, report=shares.append)  # fmt: skip
    assert [look.steps for look in found.curve][:2] == [128, 256]
    assert found.curve[-1].steps < 512
    assert shares[:2] == [0.25, 0.5]


def test_what_prepares_a_training_is_called_after_each_update() -> None:
    steps: list[int] = []

    def prepare(agent: Any, total: int) -> Any:
        assert total == 512
        return lambda agent: steps.append(agent.num_timesteps)

    train(ID, env_kwargs={"bundle": "digits"}, settings=SMALL, judge=lambda agent: 0.0, looks=1, prepare=prepare)
    assert steps == [128, 256, 384, 512]


def test_a_resumed_watcher_knows_the_looks_up_to_its_checkpoint(tmp_path: Path) -> None:
    scores = {128: 3.0, 256: 1.0, 384: 2.0, 512: 0.0}
    agent = training.make(ID, "ppo", "own", {"bundle": "digits"}, 0, SMALL)
    watcher = Watcher(lambda agent: scores[agent.num_timesteps], 100, tmp_path)
    agent.learn(512, watcher)
    again = Watcher(lambda agent: scores[agent.num_timesteps], 100, tmp_path)
    agent.num_timesteps = 300  # as a checkpoint between the second and the third look
    again.resume(agent)
    assert [(look.steps, look.score) for look in again.curve] == [(128, 3.0), (256, 1.0)]
    agent.num_timesteps = 355
    assert again(agent)
    assert len(again.curve) == 2
    assert again.end(again_at(agent, 512)).num_timesteps == 128


def again_at(agent: Any, steps: int) -> Any:
    agent.num_timesteps = steps
    return agent


def test_a_training_that_memorises_is_told_from_one_that_does_not() -> None:
    def curve(scores: list[float], train: list[float]) -> list[training.Look]:
        return [training.Look(100 * k, k, k, s, t) for k, (s, t) in enumerate(zip(scores, train, strict=True), 1)]

    said = training.parting(curve([0.30, 0.32, 0.29, 0.25], [0.30, 0.35, 0.45, 0.53]))
    assert said is not None
    assert said.startswith("from step 200 to 400 the training return rose from 0.350 to 0.530 and validation fell")
    assert training.parting(curve([0.30, 0.32, 0.32, 0.33], [0.30, 0.35, 0.45, 0.53])) is None
    assert training.parting(curve([0.30, 0.32, 0.30, 0.28], [0.30, 0.35, 0.34, 0.33])) is None
    assert training.parting([training.Look(1, 0, 0, 0.1)]) is None
