"""Use a policy of MoERouting-v0 as the router of the real model; only selected experts are run.

Shape legend: B inputs, G groups of T inputs routed in turn, E experts, F features, C classes.
"""

from __future__ import annotations

import copy
import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from agents.learner import Learner
from agents.networks import Network, advice_of
from agents.preprocessing import CLIP
from agents.set_network import SetNetwork
from experts import bundle as bundles
from experts.bundle import FEATURE_BOUND, Bundle
from experts.bundle.estimates import Estimator, centred
from experts.model import combine, mix, run_chosen
from experts.routers import mixing_weights
from moe_envs.routing.moves import edges_of
from moe_envs.routing.observations import BATCH_SCALE
from moe_envs.routing.planning import PLAN_BOUND, pool_experts, pool_members

if TYPE_CHECKING:
    from stable_baselines3.common.base_class import BaseAlgorithm

    from moe_envs.routing.env import MoERoutingVectorEnv

POOLED = 2**20  # inputs times pools at once


class RoutedMoE(nn.Module):
    """Classifier of a bundle, routed by a policy trained in MoERouting-v0, ours or SB3's, or by the rule "plan": for
    each input the best expert of the pool that the estimates of the whole batch favour.

    Inputs `[B, D]` are split into groups of `batch_size`, the episode length of the policy. All groups are routed in
    parallel; their decisions are those of the environment, where inputs are routed in turn. `env_kwargs` are the
    arguments of the policy's environment. `module` is a fresh module to fill with the weights, for a bundle of your own
    model: yours, or an `AdaptedMoE` of it. `points` limits the inputs that are searched for nearest neighbours, which
    takes most of the router's time: estimates get a little worse.
    """

    def __init__(
        self,
        bundle: str | Bundle,
        policy: Learner | BaseAlgorithm | Literal["plan"],
        env_kwargs: dict[str, Any] | None = None,
        module: nn.Module | None = None,
        points: int | None = None,
    ) -> None:
        super().__init__()
        from moe_envs.routing.env import MoERoutingVectorEnv

        loaded = bundles.load(bundle) if isinstance(bundle, str) else bundle
        arguments = {**(env_kwargs or {}), "bundle": str(loaded.path), "split": "test"}
        env = MoERoutingVectorEnv(1, **arguments)
        if env.action == "top-m":
            raise ValueError("action='top-m' is not deployed: train with action='expert' or 'subset'")
        self.action, self.batch_size, self.num_experts = env.action, env.tables.batch_size, env.tables.num_experts
        model: Any = loaded.model(module)
        self.trunk, self.gate, self.head = model.trunk, model.gate, getattr(model, "head", None)
        self.experts = nn.ModuleList(model.experts)
        if self.head is not None:
            self.module = model  # whose weights the head uses
        with torch.no_grad():
            self.width = self.experts[0](self.trunk(torch.from_numpy(loaded.examples[:1]))).shape[1]
        if isinstance(policy, str) and policy != "plan":
            raise ValueError(f'policy={policy!r}: must be "plan", or a learner')
        self.policy = _plan(env) if isinstance(policy, str) else _checked(policy, env)
        mean, projection = (torch.from_numpy(part) for part in loaded.projection)
        self.mean, self.projection = (nn.Parameter(part, requires_grad=False) for part in (mean, projection))
        singles = env.tables.column(env.tables.codes)
        costs = [torch.from_numpy(part[singles, 0]) for part in (env.tables.fixed, env.tables.slope)]
        self.estimator = loaded.estimator() if env.tables.by_place else None
        if points is not None:
            if self.estimator is None:
                raise ValueError(f'points={points}: observation="features" searches no neighbours')
            self.estimator.thin(points)
        for name in ("pool_price", "first_price", "input_price"):
            self.register_buffer(name, torch.from_numpy(getattr(env.tables, name)).float())
        self.graph = getattr(model, "graph", None)
        self.register_buffer("edges", None if loaded.edges is None else torch.from_numpy(loaded.edges))
        small = None if env.tables.complete else (pool_experts(self.num_experts), pool_members(self.num_experts))
        self.register_buffer("pools", None if small is None else torch.from_numpy(small[0].copy()))
        self.register_buffer("pool_members", None if small is None else torch.from_numpy(small[1].copy()))
        self.register_buffer("fixed", costs[0])
        self.register_buffer("slope", costs[1])
        self.eval()

    edges: torch.Tensor | None
    pools: torch.Tensor | None
    pool_members: torch.Tensor
    first_price: torch.Tensor
    pool_price: torch.Tensor
    input_price: torch.Tensor
    fixed: torch.Tensor
    slope: torch.Tensor

    def forward(self, x_BD: torch.Tensor) -> torch.Tensor:
        """Class logits `[B, C]`."""
        h_BD = self.trunk(x_BD)
        gate_BE = self.gate(h_BD)
        return self.answer(h_BD, gate_BE, self.route(x_BD, gate_BE))

    def answer(self, h_BD: torch.Tensor, gate_BE: torch.Tensor, members_BE: torch.Tensor) -> torch.Tensor:
        """Class logits `[B, C]` of selected experts, from the trunk's outputs and the gate's logits; each expert runs
        once on its routed inputs."""
        outputs_BEH = run_chosen(self.experts, h_BD, members_BE, self.width)
        weights_BE = mixing_weights(gate_BE, members_BE).nan_to_num(0.0)
        mixed_BH = combine(outputs_BEH, weights_BE, members_BE, self.graph)
        return mixed_BH if self.head is None else self.head(h_BD, mixed_BH)

    def route(self, x_BD: torch.Tensor, gate_BE: torch.Tensor) -> torch.Tensor:
        """Selected experts, boolean `[B, E]`."""
        features_BF = ((x_BD - self.mean) @ self.projection).clip(-FEATURE_BOUND, FEATURE_BOUND).half().float()
        centred_BE = centred(gate_BE)
        whole = len(x_BD) // self.batch_size * self.batch_size
        parts = [
            self._route_groups(features.unflatten(0, (-1, size)), gate.unflatten(0, (-1, size)))
            for features, gate, size in (
                (features_BF[:whole], centred_BE[:whole], self.batch_size),
                (features_BF[whole:], centred_BE[whole:], len(x_BD) - whole),
            )
            if size and len(features)
        ]
        return torch.cat(parts) if parts else gate_BE > 0

    def _route_groups(self, features_GTF: torch.Tensor, gate_GTE: torch.Tensor) -> torch.Tensor:
        """Route groups of inputs, all groups at once, by features and centred gate logits."""
        share_GE = gate_GTE.softmax(-1).mean(1) * self.num_experts
        if self.estimator is None:
            seen_GTO = torch.cat([features_GTF, gate_GTE], dim=2)
            batch_GO = torch.cat([share_GE, (features_GTF * BATCH_SCALE).mean(1)], dim=1)
        else:
            worth_GTE = self._worth(self.estimator, features_GTF, gate_GTE)
            seen_GTO, plan_GE = torch.cat([worth_GTE, gate_GTE.softmax(-1)], dim=2), self._plan(worth_GTE)
            detour_GE = torch.where(plan_GE > 0, 0, plan_GE - 1)
            batch_GO = torch.cat([worth_GTE.mean(1), share_GE, plan_GE, detour_GE], dim=1)
        settle = self._in_turn if torch.compiler.is_compiling() else self._at_once
        return settle(seen_GTO, batch_GO).flatten(0, 1) > 0

    def _at_once(self, seen_GTO: torch.Tensor, batch_GO: torch.Tensor) -> torch.Tensor:
        """Decisions 0 or 1 `[G, T, E]` for all inputs at once, from what was decided for those before; repeated until
        none changes. The first input is settled by the first pass, the next one by the second at the latest: the result
        is that of deciding in turn."""
        size = seen_GTO.shape[1]
        batch_GTO = batch_GO[:, None].expand(-1, size, -1)
        progress_GT1 = (torch.arange(size, device=seen_GTO.device) / size)[None, :, None].expand(len(seen_GTO), -1, -1)
        chosen_GTE = seen_GTO.new_zeros(*seen_GTO.shape[:2], self.num_experts)
        for _ in range(size):
            paid_GTE = chosen_GTE.cummax(1).values
            used_GTE = F.pad(paid_GTE, (0, 0, 1, -1))
            costs_GT1 = ((paid_GTE - used_GTE) * self.fixed + chosen_GTE * self.slope).sum(2, keepdim=True).cumsum(1)
            before = chosen_GTE
            cost_before_GT1 = F.pad(costs_GT1, (0, 0, 1, -1))
            chosen_GTE = self._decide(seen_GTO, batch_GTO, used_GTE, cost_before_GT1, progress_GT1)
            if torch.equal(before, chosen_GTE):
                break
        return chosen_GTE

    def _in_turn(self, seen_GTO: torch.Tensor, batch_GO: torch.Tensor) -> torch.Tensor:
        """As `_at_once`, input by input, without a branch: for an export."""
        groups, size = seen_GTO.shape[:2]
        used_GE, cost_G1 = seen_GTO.new_zeros(groups, self.num_experts), self.fixed.new_zeros(groups, 1)
        found = []
        for step in range(size):
            progress_G1 = seen_GTO.new_full((groups, 1), step / size)
            chosen_GE = self._decide(seen_GTO[:, step], batch_GO, used_GE, cost_G1, progress_G1)
            cost_G1 = cost_G1 + (chosen_GE * (1 - used_GE) * self.fixed + chosen_GE * self.slope).sum(1, keepdim=True)
            used_GE = torch.maximum(used_GE, chosen_GE)
            found.append(chosen_GE)
        return torch.stack(found, dim=1)

    def _decide(
        self, seen: torch.Tensor, batch: torch.Tensor, used: torch.Tensor, cost: torch.Tensor, progress: torch.Tensor
    ) -> torch.Tensor:
        """Experts chosen, 0 or 1 `[..., E]`, from the parts of observations `[..., *]`."""
        paid = [used] if self.edges is None else [used, edges_of(used, self.edges)]
        if self.estimator is not None:
            paid.append(self.input_price + (1 - used) * self.first_price)
        observations = torch.cat([seen, batch, *paid, cost.float(), progress], dim=-1)
        head = self.policy(observations.flatten(0, -2)).unflatten(0, observations.shape[:-1])
        if self.action == "expert":
            return F.one_hot(head.argmax(-1), self.num_experts).to(used.dtype)
        return (head > 0).to(used.dtype)

    def _worth(self, estimator: Estimator, features_GTF: torch.Tensor, gate_GTE: torch.Tensor) -> torch.Tensor:
        """P(correct) of each expert for inputs in the context of their group, less the price of an input."""
        estimates_BE = estimator(features_GTF.flatten(0, 1), gate_GTE.flatten(0, 1)).half().float()
        estimates_GTE = estimates_BE.unflatten(0, gate_GTE.shape[:2])
        return estimator.in_batches(estimates_GTE, gate_GTE, features_GTF) - self.input_price

    def _plan(self, worth_GTE: torch.Tensor) -> torch.Tensor:
        """`moe_envs.routing.planning.plan_margins` of groups, `[G, E]`."""
        if self.pools is not None:
            return self._plan_small(worth_GTE, self.pools)
        best_GTS = torch.full_like(worth_GTE[..., :1], -100.0)
        for expert in range(self.num_experts):
            best_GTS = torch.cat([best_GTS, torch.maximum(best_GTS, worth_GTE[..., expert, None])], dim=2)
        returns_GS = best_GTS.sum(1) - self.pool_price
        halves = (returns_GS.unflatten(1, (-1, 2, 1 << expert)) for expert in range(self.num_experts))
        margins = [half[:, :, 1].amax((1, 2)) - half[:, :, 0].amax((1, 2)) for half in halves]
        return torch.stack(margins, dim=1).clip(-PLAN_BOUND, PLAN_BOUND)

    def _plan_small(self, worth_GTE: torch.Tensor, pools_P3: torch.Tensor) -> torch.Tensor:
        """The same for pools of at most three experts, some of them at once: memory stays bounded."""
        sums = []
        for part_p3 in pools_P3.split(max(1, POOLED // worth_GTE[..., 0].numel())):
            of_first, of_second, of_third = (worth_GTE[..., experts] for experts in part_p3.T)
            sums.append(torch.maximum(torch.maximum(of_first, of_second), of_third).sum(1))
        returns_GP = torch.cat(sums, dim=1) - self.pool_price
        margins = [
            returns_GP.where(inside_P, -torch.inf).amax(1) - returns_GP.where(~inside_P, -torch.inf).amax(1)
            for inside_P in self.pool_members.T
        ]
        return torch.stack(margins, dim=1).clip(-PLAN_BOUND, PLAN_BOUND)

    def export_onnx(self, path: str | Path, batch_size: int | None = None) -> None:
        """Write an ONNX model of `input [batch_size, D] -> logits [batch_size, C]`, for batches of this size only.

        The graph is static: it runs all experts and multiplies unselected ones by 0.
        """
        if importlib.util.find_spec("onnxscript") is None:
            raise ImportError("an export to ONNX needs onnx and onnxscript: pip install 'moe-envs[export]'")
        size = batch_size or self.batch_size
        example = torch.zeros(size, self.mean.shape[0])
        torch.onnx.export(
            DenseRouted(self).eval(), (example,), str(path), input_names=["input"], output_names=["logits"],
            dynamo=True, external_data=False, verbose=False,
        )  # fmt: skip


class DenseRouted(nn.Module):
    """Runs all experts on all inputs and mixes them by the choice of the policy."""

    def __init__(self, routed: RoutedMoE) -> None:
        super().__init__()
        self.routed = routed

    def forward(self, x_BD: torch.Tensor) -> torch.Tensor:
        h_BD = self.routed.trunk(x_BD)
        gate_BE = self.routed.gate(h_BD)
        members_BE = self.routed.route(x_BD, gate_BE)
        outputs_BEH = torch.stack([expert(h_BD) for expert in self.routed.experts], dim=1)
        mixed_BH = mix(gate_BE, outputs_BEH, members_BE, self.routed.graph).nan_to_num(0.0)
        return mixed_BH if self.routed.head is None else self.routed.head(h_BD, mixed_BH)


def _plan(env: MoERoutingVectorEnv) -> nn.Module:
    """The environment's advice as a policy."""
    if not env.advice:
        raise ValueError('policy="plan" needs observation="estimates" and action="expert"')
    advice = advice_of(env, env.tables.width, env.tables.num_experts)
    return _linear(advice, np.zeros(advice.shape[1], dtype=np.float32))


def _checked(policy: Any, env: MoERoutingVectorEnv) -> nn.Module:
    """The network of a policy that was trained in environments such as this one."""
    spaces = env.single_observation_space, env.single_action_space
    of_policy: Any = policy.rows if isinstance(policy, Learner) else policy
    if (of_policy.observation_space, of_policy.action_space) != spaces:
        raise ValueError(
            f"the policy observes {of_policy.observation_space} and acts in {of_policy.action_space}, the "
            f"environment has {spaces[0]} and {spaces[1]}: give the bundle and the env_kwargs of its training"
        )
    return policy_module(policy)


def policy_module(policy: Learner | BaseAlgorithm) -> nn.Module:
    """Policy network from observations `[n, width]` to its head as a module; from our learners or SB3's `MlpPolicy`."""
    if isinstance(policy, Learner) and isinstance(policy.network, SetNetwork):
        return _OfSet(policy.network).eval()
    if isinstance(policy, Learner):
        if not isinstance(policy.network, Network) or policy.network.gru:
            raise ValueError("a policy with a GRU is not deployed: train with gru=0")
        weights, layers = policy.network.weights, list[nn.Module]()
        names = [f"{place}" for place in range(policy.network.depth)]
        moments = policy.preprocessor.moments
        if policy.preprocessor.normalize:
            layers.append(_Normalize(moments.mean, moments.scale()))
        for name in names:
            layers += [_linear(weights[f"{name}.weight"][0], weights[f"{name}.bias"][0, 0]), nn.Tanh()]
        found: nn.Module = nn.Sequential(*layers, _linear(weights["policy.weight"], weights["policy.bias"]))
        if policy.network.residual is not None:
            found = _Residual(found, policy.network.residual)
    else:
        network: Any = policy.policy
        if hasattr(network, "q_net"):  # DQN
            found = network.q_net.q_net
        elif hasattr(network, "quantile_net"):  # QR-DQN
            found = _QuantileMeans(network.quantile_net.quantile_net, network.n_quantiles)
        elif hasattr(network, "mlp_extractor") and not hasattr(network, "lstm_actor"):
            found = nn.Sequential(network.mlp_extractor.policy_net, network.action_net)
        else:
            raise ValueError(f"a {type(network).__name__} is not deployed: train with an MlpPolicy")
    found = copy.deepcopy(found)  # leaves the training policy unchanged
    return found.to("cpu").eval().requires_grad_(False)


class _QuantileMeans(nn.Module):
    """Mean over quantiles: action values from a network `[n, quantiles * actions]`."""

    def __init__(self, network: nn.Module, quantiles: int) -> None:
        super().__init__()
        self.network, self.quantiles = network, quantiles

    def forward(self, observations: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.network(observations).unflatten(1, (self.quantiles, -1)).mean(1)
        return found


class _OfSet(nn.Module):
    """The head of a `SetNetwork`."""

    flat: torch.Tensor

    def __init__(self, network: SetNetwork) -> None:
        super().__init__()
        self.network = network
        self.register_buffer("flat", network.flat.clone())

    def forward(self, observations: torch.Tensor) -> torch.Tensor:
        return self.network.torch_forward(self.flat, observations)[0]


class _Residual(nn.Module):
    """Adds a fixed linear map of the observation to the head."""

    residual: torch.Tensor

    def __init__(self, network: nn.Module, residual: np.ndarray) -> None:
        super().__init__()
        self.network = network
        self.register_buffer("residual", torch.from_numpy(residual.copy()))

    def forward(self, observations: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.network(observations) + observations @ self.residual
        return found


class _Normalize(nn.Module):
    """Normalises observations like `Preprocessor`."""

    mean: torch.Tensor
    scale: torch.Tensor

    def __init__(self, mean: np.ndarray, scale: np.ndarray) -> None:
        super().__init__()
        self.register_buffer("mean", torch.from_numpy(mean.astype(np.float32)))
        self.register_buffer("scale", torch.from_numpy(scale))

    def forward(self, observations: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = ((observations - self.mean) * self.scale).clip(-CLIP, CLIP)
        return found


def _linear(weight: np.ndarray, bias: np.ndarray) -> nn.Linear:
    layer = nn.Linear(*weight.shape)
    with torch.no_grad():
        layer.weight.copy_(torch.from_numpy(weight.T))
        layer.bias.copy_(torch.from_numpy(bias))
    return layer
