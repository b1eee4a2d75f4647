"""MoERouting-v0 on a bundle whose experts cooperate by a graph."""

from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch

from agents import PPO
from agents.deploy.routing import RoutedMoE
from cost.profile import measure_experts
from experts import bundle, data, model
from experts.bundle import Bundle
from experts.training import TrainingSettings

ID = "moe_envs:MoERouting-v0"


@pytest.fixture(params=["sum", "weighted", "conv"])
def cooperating(request: pytest.FixtureRequest, own_cache: Path) -> Bundle:
    source = data.load("digits")
    settings = TrainingSettings(
        widths=(2, 4, 8, 8), epochs=6, batch_size=32, top1_share=0.2, graph={"mode": request.param, "init": "random"}
    )
    return bundle.build("team", source.inputs, source.labels, splits=source.splits, settings=settings,
                        profile=measure_experts, progress=False)  # fmt: skip


def test_outcomes_are_the_model_s_own_answers(cooperating: Bundle) -> None:
    inputs, labels = data.load("digits")["test"]
    trained: Any = cooperating.model()
    gate, outputs = model.tabulate(trained, torch.from_numpy(inputs))
    env: Any = gymnasium.make(ID, bundle="team", split="test", action="subset").unwrapped
    outcomes = env.vector.tables.outcomes(np.arange(len(labels)))
    assert not outcomes[:, 0].any()
    alone = 0
    for code in range(1, 16):
        members = (torch.tensor(code) >> torch.arange(4) & 1).bool().expand(len(labels), 4)
        with torch.inference_mode():
            correct = model.mix(gate, outputs, members, trained.graph).argmax(1).numpy() == labels
            alone += int((model.mix(gate, outputs, members).argmax(1).numpy() == labels).sum())
        assert (outcomes[:, code] == correct).mean() > 0.997  # ties of rounding apart
    assert alone != outcomes[:, 1:].sum()  # the graph changes answers
    with torch.inference_mode():
        top_2 = float((trained(torch.from_numpy(inputs)).argmax(1).numpy() == labels).mean())
    assert cooperating.metadata["accuracy"]["test/top-2"] == pytest.approx(top_2, abs=0.003)


@pytest.mark.parametrize("cooperating", ["weighted"], indirect=True)
def test_edges_of_the_experts_already_chosen_are_seen(cooperating: Bundle) -> None:
    trained: Any = cooperating.model()
    np.testing.assert_allclose(cooperating.edges, trained.graph.adjacency.detach(), atol=1e-6)
    env: Any = gymnasium.make(ID, bundle="team").unwrapped
    part = env.observation_layout["edges"].slice
    first, _ = env.reset(seed=0)
    assert not first[part].any()
    seen = [env.step(action)[0][part] for action in (2, 2, 0)]
    edges = trained.graph.adjacency.detach().numpy()
    np.testing.assert_allclose(seen[0], edges[2], atol=1e-6)
    np.testing.assert_array_equal(seen[0], seen[1])
    np.testing.assert_allclose(seen[2], (edges[0] + edges[2]) / 2, atol=1e-6)
    many = gymnasium.make_vec(ID, 1, vectorization_mode="vector_entry_point", bundle="team")
    many.reset(seed=0)
    for step, action in enumerate((2, 2, 0)):
        np.testing.assert_array_equal(many.step(np.array([action]))[0][0, part], seen[step])
    assert "edges" not in gymnasium.make(ID, bundle="digits").unwrapped.observation_layout  # type: ignore[attr-defined]


def test_a_deployed_team_answers_as_in_the_environment(cooperating: Bundle) -> None:
    kwargs = {"bundle": "team", "action": "subset"}
    policy = PPO("MlpPolicy", ID, env_kwargs=kwargs, n_envs=16, n_steps=32, n_epochs=3).learn(4_000)
    routed = RoutedMoE(cooperating, policy, kwargs)
    inputs, labels = data.load("digits")["test"]
    env: Any = gymnasium.make(ID, **kwargs, split="test").unwrapped
    deployed, played = [], []
    for episode in range(10):
        observation, _ = env.reset(seed=episode)
        batch = env.batch_inputs()
        for _ in range(32):
            observation, _, ended, _, info = env.step(policy.predict(observation, deterministic=True)[0])
            played.append(info["reward/quality"] * 32)
        assert ended
        with torch.inference_mode():
            answers = routed(torch.from_numpy(inputs[batch])).argmax(1).numpy()
        deployed += (answers == labels[batch]).astype(float).tolist()
    assert np.mean(deployed) == pytest.approx(np.mean(played), abs=0.01)
