"""Use a policy of MoELayerTopK-v0 in a language model, ours or one of transformers: it decides how many experts each
token runs in each layer.

Shape legend: N tokens of a call, D width, E experts, L layers.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from agents.baselines.layertopk import TopKRule, routed
from experts.huggingface import AdaptedModel
from experts.language import LanguageModel
from moe_envs.core.spaces import layout
from moe_envs.layertopk.observations import projection, seen, token_parts


class AdaptiveK:
    """Numbers of experts by a policy; give it to the model wherever it takes `k`, e.g. `model.generate(text, k=...)`.

    `policy` is a learner of MoELayerTopK-v0 with `observation="token"` and `granularity="layer"`, ours or SB3's, a rule
    of `agents.baselines.layertopk` without budget, or a function of layer, inputs `[N, D]` and logits `[N, E]`, as
    `AdaK` is one. `model` is a `LanguageModel`, or an `AdaptedModel` of transformers, whose calls are routed inside
    `with adaptive.active(): ...`. Raises `ValueError` for another policy.
    """

    def __init__(self, model: LanguageModel | AdaptedModel, policy: Any) -> None:
        self.model, self.policy = model, policy
        if isinstance(model, LanguageModel):
            settings = model.settings
            self.k, self.layers, width = settings.k, settings.layers, settings.d_model
        else:
            self.k, self.layers, width = model.own_k, model.layers, model.d_model
        self.parts = layout(token_parts(self.k, self.layers))
        self.width = max(part.slice.stop for part in self.parts.values())
        self.projection = torch.from_numpy(projection(width))
        self.constant: dict[int, int] = {}
        self._experts: list[np.ndarray] = []
        self._decide: Callable[[int, torch.Tensor, torch.Tensor], Any] = self._by_learner
        if isinstance(policy, TopKRule):
            if policy.reserve:
                raise ValueError("this rule keeps experts for later under a budget, which a model has not")
            self._decide = self._by_rule
        elif callable(policy):
            self._decide = policy
        else:
            self._require_fitting(policy)

    @torch.no_grad()
    def __call__(self, layer: int, inputs_ND: torch.Tensor, logits_NE: torch.Tensor) -> torch.Tensor:
        """Numbers of experts `[N]`; layers of a call come in order."""
        if layer == 0:
            self._experts = []
        if layer in self.constant:
            k = np.full(len(logits_NE), self.constant[layer])
        else:
            found = self._decide(layer, inputs_ND, logits_NE.float())
            k = np.asarray(found.cpu() if isinstance(found, torch.Tensor) else found).clip(0, self.k)
        self._experts.append(k)
        return torch.from_numpy(k).to(logits_NE.device)

    def calibrate(self, ids: Any) -> dict[int, int]:
        """Find the layers in which the policy takes the same number for every token of the ids `[B, T]`; from now on it
        is not asked there. Returns these numbers by layer."""
        self.constant, numbers = {}, [set[int]() for _ in range(self.layers)]

        def watched(layer: int, inputs_ND: torch.Tensor, logits_NE: torch.Tensor) -> torch.Tensor:
            k = self(layer, inputs_ND, logits_NE)
            numbers[layer] |= set(k.tolist())
            return k

        given = torch.as_tensor(np.asarray(ids), dtype=torch.int64)
        with torch.inference_mode():
            if isinstance(self.model, LanguageModel):
                self.model.network(given.to(next(self.model.network.parameters()).device), watched)
            else:
                with self.model.choosing(watched):
                    self.model.model(given.to(next(self.model.model.parameters()).device))
        self.constant = {layer: found.pop() for layer, found in enumerate(numbers) if len(found) == 1}
        return self.constant

    def active(self) -> AbstractContextManager[None]:
        """Route the calls of a model of transformers inside the block."""
        if isinstance(self.model, LanguageModel):
            raise ValueError("our own model takes the policy as k: model.generate(text, k=adaptive)")
        return self.model.choosing(self)

    def _by_rule(self, layer: int, inputs_ND: torch.Tensor, logits_NE: torch.Tensor) -> np.ndarray:
        return np.asarray(self.policy.count(routed(logits_NE, layer, self.k)), dtype=np.int64)

    def _by_learner(self, layer: int, inputs_ND: torch.Tensor, logits_NE: torch.Tensor) -> np.ndarray:
        experts = np.zeros((len(logits_NE), self.layers))
        for place, before in enumerate(self._experts):
            experts[:, place] = before
        hidden = F.linear(inputs_ND.float(), self.projection.to(inputs_ND.device))
        layers = np.full(len(logits_NE), layer)
        values = seen(logits_NE.cpu().numpy(), hidden.cpu().numpy(), layers, experts, self.k)
        observation = np.empty((len(logits_NE), self.width), dtype=np.float32)
        for name, part in self.parts.items():
            observation[:, part.slice] = values[name]
        return np.asarray(self.policy.predict(observation, deterministic=True)[0], dtype=np.int64)

    def _require_fitting(self, policy: Any) -> None:
        of_policy = getattr(policy, "rows", policy)
        if not hasattr(of_policy, "observation_space"):
            raise ValueError(f"{type(policy).__name__} decides in its environment only: give a learner or a rule")
        shape, actions = of_policy.observation_space.shape, getattr(of_policy.action_space, "n", None)
        if shape != (self.width,) or actions != self.k + 1:
            raise ValueError(
                f"the policy observes {shape} and has {actions} actions; for this model it must be trained with "
                f'observation="token", granularity="layer" and no budget: {(self.width,)} and {self.k + 1}'
            )
        require_no_memory(policy, self.width)


def require_no_memory(policy: Any, width: int) -> None:
    """Raise `ValueError` for a recurrent policy: in a model it is not asked at each step, as its memory needs."""
    if policy.predict(np.zeros((1, width), dtype=np.float32), deterministic=True)[1] is not None:
        raise ValueError("the policy is recurrent: give one without a memory")
