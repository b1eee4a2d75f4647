"""Use a policy of MoEExpertCache-v0 in the offloading runtime: it decides which missing experts are loaded while a
model writes.

Shape legend: T tokens of a call, D width, E experts, K experts of a token, L layers.
"""

from __future__ import annotations

from collections.abc import Callable
from copy import copy
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from agents import runs
from agents.baselines.expertcache import LoadRule
from agents.baselines.rollout_classifier import RolloutClassifier
from agents.checkpoints import MANIFEST
from agents.deploy.layertopk import require_no_memory
from cost.arguments import choose
from cost.timing import torch_threads
from experts.language import LanguageModel
from experts.offload.demand import EVICTIONS, Demand, NextLayer, Requests, best, eviction_scores, odds, picked
from experts.offload.eviction import Static
from experts.offload.model import Decision
from experts.offload.store import Weights, expert_bytes
from moe_envs.core.spaces import layout
from moe_envs.expertcache.env import FALLBACKS
from moe_envs.expertcache.observations import LATELY, answering, request_parts, request_values, staying
from moe_envs.layertopk.observations import projection


class CacheControl:
    """Decides for one `OffloadedModel`, given to it as `policy`: `OffloadedModel(model, memory, CacheControl(...))`.

    `policy` is a learner of MoEExpertCache-v0, ours or SB3's, with the same K and number of layers, or a rule of
    `agents.baselines.expertcache`; what leaves and what runs instead are a rule's `env_kwargs`. A call of one token is
    decided by it; the tokens of a prompt get all experts that they ask for, each read once. `capacity` is the number of
    experts of a layer that stay in memory, `demand` what `fit_demand` returns.

    Raises `ValueError` for a policy of another problem, or an eviction that needs the future.
    """

    def __init__(
        self, policy: Any, model: LanguageModel, capacity: int, demand: Demand, *, eviction: str = "predicted",
        fallback: str = "substitute",
    ) -> None:  # fmt: skip
        settings = model.settings
        self.k, self.layers, self.experts = settings.k, settings.layers, settings.num_experts
        if not 1 <= capacity <= self.experts:
            raise ValueError(f"capacity={capacity}: must be from 1 to {self.experts} experts of a layer")
        own = getattr(policy, "env_kwargs", {})
        self.eviction, fallback = own.get("eviction", eviction), own.get("fallback", fallback)
        choose("eviction", self.eviction, EVICTIONS)
        choose("fallback", fallback, FALLBACKS)
        self.policy, self.capacity, self.demand, self.substitute = policy, capacity, demand, fallback == "substitute"
        self.observation_layout = layout(request_parts(self.k, self.layers))
        self.width = max(part.slice.stop for part in self.observation_layout.values())
        if getattr(policy, "source", "model") != "model":
            raise ValueError("the policy is a rule for recorded routing: it decides what is loaded in advance")
        if isinstance(policy, LoadRule):
            self.policy = copy(policy)  # others may watch the same rule
            self.policy.watch(self)
        else:
            self._require_fitting(policy)
        self.projection = torch.from_numpy(projection(settings.d_model))
        self.requests = Requests.empty(1, self.layers, self.experts)
        self.lately = 0.0
        self._logits, self._wanted = np.zeros((1, self.experts)), np.zeros((1, self.k), dtype=np.int64)
        self._resident = np.zeros((1, self.experts), dtype=np.bool_)

    def start(self) -> list[set[int]]:
        """Begin anew. In memory at first: the experts most often asked for in other texts."""
        self.requests.forget(np.zeros(1, dtype=np.int64))
        self.lately = 0.0
        return [set(each) for each in self.demand.most(self.capacity).tolist()]

    def decide(self, layer: int, inputs_TD: torch.Tensor, logits_TE: torch.Tensor, resident: set[int]) -> Decision:
        """Weights of the experts that run, and who stays."""
        logits = logits_TE.detach().float().cpu().numpy()
        row, where = np.zeros(1, dtype=np.int64), np.array([layer])
        there = np.zeros((1, self.experts), dtype=np.bool_)
        there[0, list(resident)] = True
        wanted = best(logits, self.k)
        for each in wanted:
            self.requests.add(row, where, each[None])
        weights, each_row = np.zeros_like(logits), np.arange(len(logits))[:, None]
        missing = ~there[0, wanted]
        if not missing.any():
            self.lately *= LATELY
            weights[each_row, wanted] = odds(picked(logits, wanted))
            return Decision(torch.from_numpy(weights).to(logits_TE), resident)
        chances, available = odds(logits), there.copy()
        predicted = self.demand.predict(self.requests, row, where, chances[-1:])
        if len(logits) > 1:
            available[0, wanted.ravel()] = True
            weights[each_row, wanted] = odds(picked(logits, wanted))
        else:
            self._logits, self._wanted, self._resident = logits, wanted, there
            load = self._loads(layer, inputs_TD, request_values(chances, wanted, there, predicted)) & missing[0]
            available[0, wanted[0]] |= load
            experts, each = answering(logits, wanted, available, self.substitute)
            weights[each_row, experts] = each
            self.lately = LATELY * self.lately + (1 - LATELY) * float(load.sum()) / self.k
        scores = eviction_scores(self.eviction, self.requests, row, where, predicted, self.demand.frequency)
        stay = staying(available, scores, self.capacity)[0].nonzero()[0]
        return Decision(torch.from_numpy(weights).to(logits_TE), set(stay.tolist()))

    def wanted(self) -> np.ndarray:
        """The experts asked for, `[1, K]`, for rules."""
        return self._wanted

    def residents(self) -> np.ndarray:
        """Which experts of the layer are in memory, `[1, E]`, for rules."""
        return self._resident

    def logits(self) -> np.ndarray:
        """Router logits `[1, E]`, for rules."""
        return self._logits

    def _loads(self, layer: int, inputs_TD: torch.Tensor, values: dict[str, np.ndarray]) -> np.ndarray:
        """Which of the best experts are loaded if they are missing, `[K]`."""
        values |= {"layer": np.arange(self.layers)[None] == layer, "loads": np.array([self.lately])}
        if getattr(self.policy, "sees_hidden", True):
            hidden = F.linear(inputs_TD.float(), self.projection.to(inputs_TD.device)).cpu().numpy()
            values["hidden"] = hidden.clip(-10, 10)
        observation = np.zeros((1, self.width), dtype=np.float32)
        for name, found in values.items():
            observation[:, self.observation_layout[name].slice] = found.reshape(1, -1)
        return np.asarray(self.policy.predict(observation, deterministic=True)[0][0] > 0)

    def _require_fitting(self, policy: Any) -> None:
        of_policy = getattr(policy, "rows", policy)
        shape = getattr(getattr(of_policy, "observation_space", None), "shape", None)
        actions = getattr(getattr(of_policy, "action_space", None), "shape", None)
        if shape != (self.width,) or actions != (self.k,):
            raise ValueError(
                f"the policy observes {shape} and has actions {actions}; for this model it must be trained in "
                f"MoEExpertCache-v0 without learned eviction, and not on recorded routing: {(self.width,)} and "
                f"{(self.k,)}"
            )
        require_no_memory(policy, self.width)


def control_of_run(folder: Path, model: LanguageModel, memory: int, weights: Weights, texts: Any) -> CacheControl:
    """The policy of a run folder, or a saved `RolloutClassifier`, in a memory of so many bytes for experts of this
    precision; demand is fitted to the texts (ids `[n, T]`). Raises `ValueError` for a run of another environment, or if
    no expert of each layer fits, `RunError` or `CheckpointError` for a damaged folder."""
    settings = model.settings
    policy: Any
    if (folder / MANIFEST).exists():
        policy, kwargs = RolloutClassifier.load(folder), {}
    else:
        policy, config = runs.load(folder)
        kwargs = config["env_kwargs"]
        if not config["env"].endswith("MoEExpertCache-v0"):
            raise ValueError(f"{folder} is a run of {config['env']}, not of MoEExpertCache-v0")
    of_layers = expert_bytes(settings.d_model, settings.d_ff, weights) * settings.layers
    if memory < of_layers:
        raise ValueError(f"memory={memory}: not even one expert of each layer fits, {of_layers} bytes")
    chosen = {name: kwargs[name] for name in ("eviction", "fallback") if name in kwargs}
    capacity = min(memory // of_layers, settings.num_experts)
    return CacheControl(policy, model, capacity, fit_demand(model, texts), **chosen)


def fit_demand(model: LanguageModel, texts: Any) -> Demand:
    """Demand for a model's experts, fitted to its own routing on texts (ids `[n, T]`)."""
    return Demand.fit(_logits(model, texts), model.settings.k)


def fit_static(model: LanguageModel, texts: Any) -> Callable[[int], Static]:
    """The eviction, for `OffloadedModel(policy=...)`, that keeps the experts which a model asks for most on texts (ids
    `[n, T]`)."""
    return partial(Static, scores=dict(np.ndenumerate(fit_demand(model, texts).frequency)))


def fit_next_layer(model: LanguageModel, texts: Any) -> NextLayer:
    """What the next layer will ask for, fitted to a model's own routing on texts (ids `[n, T]`)."""
    return NextLayer.fit(best(_logits(model, texts), model.settings.k), model.settings.num_experts)


def _logits(model: LanguageModel, texts: Any) -> np.ndarray:
    """Router logits `[n, T, L, E]`."""
    given = torch.as_tensor(np.asarray(texts), dtype=torch.int64)
    with torch_threads(1), torch.inference_mode():
        routing = model.network(given).routing
    logits: np.ndarray = torch.stack([each.logits for each in routing], 1).numpy()
    return logits.reshape(*given.shape, model.settings.layers, model.settings.num_experts)
