"""Policies in a server: one that routes the inputs of a classifier, and what `moe-serve` loads by name."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from agents import runs
from agents.deploy.routing import RoutedMoE
from agents.evaluate import takes_masks
from experts import bundle
from experts.bundle import Bundle
from experts.serving import served as models
from experts.serving.control import (
    WAITS,
    Choices,
    Controller,
    MakeController,
    RequestClass,
    Seen,
    Service,
    must_send,
)
from experts.serving.rules import rule_of
from experts.serving.served import Served, classes
from moe_envs.serving.env import classes_of
from moe_envs.serving.observations import Observer, parts_of

log = logging.getLogger("moe_envs.serve")


def routed_of_run(folder: Path) -> tuple[RoutedMoE, Bundle]:
    """The bundle of a run of MoERouting-v0, and its classifier routed by the policy; raises `ValueError` for a run of
    another environment."""
    policy, config = runs.load(folder)
    if not config["env"].endswith("MoERouting-v0"):
        raise ValueError(f"{folder} is a run of {config['env']}; policies of MoERouting-v0 route a model")
    arguments = {name: value for name, value in config["env_kwargs"].items() if name != "bundle"}
    found = bundle.load(config["env_kwargs"].get("bundle", "fashion-mnist"))
    learner: Any = policy
    return RoutedMoE(found, learner, arguments), found


class RoutedClassifier(Served):
    """The classifier of a bundle, routed by a policy of MoERouting-v0: the requests of a batch are decided together."""

    levels, quality, dtype = ("policy",), (1.0,), "float32"

    def __init__(self, folder: Path) -> None:
        self.routed, found = routed_of_run(folder)
        self.inputs = np.asarray(found.examples, dtype=np.float32)
        self.shape = tuple(self.inputs.shape[1:])
        about = {"kind": "classifier", "name": found.path.name, "sha256": found.sha256, "policy": folder.name}
        self.manifest = models.manifest_of(self, about)

    def run(self, rows: Sequence[np.ndarray], level: int) -> list[dict[str, Any]]:
        """Label, probabilities and the experts that ran, for each row."""
        with torch.inference_mode():
            x_BD = torch.from_numpy(np.stack(rows))
            h_BD = self.routed.trunk(x_BD)
            gate_BE = self.routed.gate(h_BD)
            members_BE = self.routed.route(x_BD, gate_BE)
            logits_BC = self.routed.answer(h_BD, gate_BE, members_BE)
        return classes(logits_BC.numpy(), members_BE.numpy())

    def examples(self, count: int) -> list[np.ndarray]:
        """Inputs that come with the bundle."""
        return list(np.take(self.inputs, np.arange(count), axis=0, mode="wrap"))


def load(path: Path | str) -> Served:
    """As `experts.serving.served.load`, and run folders of MoERouting-v0."""
    place = Path(path)
    return RoutedClassifier(place) if (place / runs.SETTINGS).exists() else models.load(path)


class PolicyController:
    """A policy of MoEServing-v0, ours or SB3's, as a controller of a server with the same levels and classes.

    Raises `ValueError` for a policy of other observations or actions.
    """

    def __init__(
        self, policy: Any, rule: str, cost_weight: float, choices: Choices, service: Service,
        classes: Sequence[RequestClass],
    ) -> None:  # fmt: skip
        self.policy, self.observer = policy, Observer(rule, cost_weight, choices, service, classes)
        self.masked = takes_masks(policy)
        self._choices, self._state = len(choices), None
        self._fastest = float(service.seconds[:, 0].min())
        wanted = max(part.slice.stop for part in parts_of(choices).values())
        of_policy = getattr(policy, "rows", policy)
        seen = getattr(getattr(of_policy, "observation_space", None), "shape", None)
        actions = getattr(getattr(of_policy, "action_space", None), "n", None)
        if seen != (wanted,) or actions != len(choices):
            raise ValueError(
                f"the policy observes {seen} and has {actions} actions; this server, with {choices.levels} levels and "
                f"{choices.classes} classes of requests, needs {(wanted,)} and {len(choices)}"
            )

    def decide(self, seen: Seen, starts: np.ndarray) -> np.ndarray:
        """Choices `[n]`."""
        more = {}
        if self.masked:
            allowed = np.ones((len(starts), self._choices), dtype=np.bool_)
            allowed[:, WAITS] = seen.slack.min(1) >= must_send(self._fastest)
            more = {"action_masks": allowed}
        observation = self.observer(seen)
        found, self._state = self.policy.predict(
            observation, state=self._state, episode_start=starts, deterministic=True, **more
        )
        return np.asarray(found)


def controller_of(text: str) -> MakeController:
    """The controller of "policy:RUN_DIR", a run of MoEServing-v0, or a rule as "fixed:cap=16"
    (`experts.serving.rules.rule_of`). Raises `ValueError` for a run of another environment."""
    name, _, folder = text.partition(":")
    if name != "policy":
        return rule_of(text)
    policy, config = runs.load(Path(folder))
    if not config["env"].endswith("MoEServing-v0"):
        raise ValueError(f"{folder} is a run of {config['env']}, not of MoEServing-v0")
    trained = classes_of(**config["env_kwargs"])

    def make(choices: Choices, service: Service, classes: Sequence[RequestClass]) -> Controller:
        if [replace(each, name="") for each in classes] != [replace(each, name="") for each in trained]:
            log.warning("%s was trained for other requests: %s", folder, "; ".join(map(str, trained)))
        rule = config["env_kwargs"].get("rule", "plan")
        return PolicyController(policy, rule, config["cost_weight"], choices, service, classes)

    return make
