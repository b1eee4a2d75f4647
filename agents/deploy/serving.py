"""Policies in a server: one that routes the inputs of a classifier, and what `moe-serve` loads by name."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from agents import runs
from agents.deploy.routing import RoutedMoE
from experts import bundle
from experts.serving import served as models
from experts.serving.control import MakeController, rule_of
from experts.serving.served import Served, classes


class Routed(Served):
    """The classifier of a bundle, routed by a policy of MoERouting-v0: the requests of a batch are decided together."""

    levels, quality, dtype = ("policy",), (1.0,), "float32"

    def __init__(self, folder: Path) -> None:
        policy, config = runs.load(folder)
        if not config["env"].endswith("MoERouting-v0"):
            raise ValueError(f"{folder} is a run of {config['env']}; policies of MoERouting-v0 route a model")
        arguments = {name: value for name, value in config["env_kwargs"].items() if name != "bundle"}
        found = bundle.load(config["env_kwargs"].get("bundle", "fashion-mnist"))
        learner: Any = policy
        self.routed = RoutedMoE(found, learner, arguments)
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
    return Routed(place) if (place / runs.SETTINGS).exists() else models.load(path)


def controller_of(text: str) -> MakeController:
    """The controller of "slackfit", "fixed:cap=16", ... (`experts.serving.control.rule_of`)."""
    return rule_of(text)
