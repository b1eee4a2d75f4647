"""Routers: map gate logits `[T, E]` to experts and their weights.

A router is called with logits and returns a `Routing`; it keeps nothing. Given a `torch.Generator` it is noisy, if it
has noise at all; without one it is deterministic. Any callable of this signature is a router.

Shape legend: T inputs, E experts, G groups of experts.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Protocol

import torch

from experts.losses import entropy_weighted_balance_loss, load_balancing_loss, z_loss

FROM_ZERO = "noise", "p"
ABOVE_ZERO = "k", "capacity_factor", "max_k", "groups", "top_groups", "temperature"


@dataclass(frozen=True, eq=False)
class RoutingStatistics:
    """Statistics of a routing, computed on demand; losses are differentiable.

    `chosen` are the choices before capacity cut some off, `members` what was left, both boolean `[T, E]`;
    `log_probability [T]` is that of the choice, of routers that draw it. Columns from `real` on are experts that copy
    their input or do nothing: they count in losses, and in nothing else.
    """

    logits: torch.Tensor
    chosen: torch.Tensor
    members: torch.Tensor
    log_probability: torch.Tensor | None = None
    real: int | None = None

    @property
    def load(self) -> torch.Tensor:
        """The share of the choices that each expert got, `[E]`."""
        counts_E = self.chosen[:, : self.real].sum(0).float()
        return counts_E / counts_E.sum().clamp_min(1)

    @property
    def utilisation(self) -> torch.Tensor:
        """The entropy of the load over that of an even one: 1 where all are chosen as often, 0 where only one is."""
        load_E = self.load
        return torch.special.entr(load_E).sum() / max(math.log(len(load_E)), 1e-12)

    @property
    def gate_entropy(self) -> torch.Tensor:
        """Mean entropy of the gate's softmax in nats."""
        return -(self.logits.softmax(-1) * self.logits.log_softmax(-1)).sum(-1).mean()

    @property
    def experts_per_input(self) -> torch.Tensor:
        """Mean number of experts per input."""
        return self.members[:, : self.real].sum(-1).float().mean()

    @property
    def dropped(self) -> torch.Tensor:
        """Share of the choices dropped because the expert was full."""
        return (self.chosen & ~self.members).sum() / self.chosen.sum().clamp_min(1)

    @property
    def balance_loss(self) -> torch.Tensor:
        """`load_balancing_loss` of the choices."""
        return load_balancing_loss(self.logits, self.chosen)

    @property
    def entropy_weighted_balance_loss(self) -> torch.Tensor:
        """`entropy_weighted_balance_loss` of the choices."""
        return entropy_weighted_balance_loss(self.logits, self.chosen)

    @property
    def z_loss(self) -> torch.Tensor:
        """`losses.z_loss` of the logits."""
        return z_loss(self.logits)


class Routing(NamedTuple):
    """Weights `[T, E]` of the experts' outputs, 0 for those that do not answer; who answers, boolean `[T, E]`."""

    weights: torch.Tensor
    members: torch.Tensor
    statistics: RoutingStatistics


class Router(Protocol):
    """Logits `[T, E]` to a `Routing`; noisy where a generator is given."""

    def __call__(self, logits_TE: torch.Tensor, generator: torch.Generator | None = None) -> Routing: ...


class _InRange:
    """Validates the options of a router at construction."""

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if name in FROM_ZERO and not 0 <= value < math.inf:
                raise ValueError(f"{name}={value}: must be a number from 0 on")
            if name in ABOVE_ZERO and value is not None and not 0 < value < math.inf:
                raise ValueError(f"{name}={value}: must be a number above 0")


@dataclass(frozen=True)
class TopK(_InRange):
    """The k experts of largest logit, weighted by the softmax over them (Shazeer et al. 2017), or over all experts
    without `normalize`: of a single expert the softmax is 1, and the task's loss does not reach the gate.

    `noise` is the standard deviation of normal noise on the logits. With `capacity_factor` an expert answers at most
    that times T * k / E inputs, those of largest logit; what it drops is not replaced, and what one input gets depends
    on the others.
    """

    k: int = 2
    noise: float = 0.0
    capacity_factor: float | None = None
    normalize: bool = True

    def __call__(self, logits_TE: torch.Tensor, generator: torch.Generator | None = None) -> Routing:
        noisy_TE = _noisy(logits_TE, self.noise, generator)
        chosen_TE = top_k(noisy_TE, self.k)
        members_TE = _capped(chosen_TE, noisy_TE, self.k, self.capacity_factor)
        weights_TE = _weights(noisy_TE, chosen_TE, self.normalize) * members_TE
        return Routing(weights_TE, members_TE, RoutingStatistics(logits_TE, chosen_TE, members_TE))


@dataclass(frozen=True, eq=False)
class TopKEach:
    """The `k [T]` experts of largest logit, another number for each input, weighted by the softmax over them; an input
    of none gets nothing. Where `allowed` is given, boolean `[E]` or `[T, E]`, only these are chosen."""

    k: torch.Tensor
    allowed: torch.Tensor | None = None

    def __call__(self, logits_TE: torch.Tensor, generator: torch.Generator | None = None) -> Routing:
        possible_TE = logits_TE if self.allowed is None else logits_TE.masked_fill(~self.allowed, -torch.inf)
        most = min(int(self.k.max()), possible_TE.shape[-1])
        values_Tk, experts_Tk = possible_TE.topk(most, dim=-1)
        taken_Tk = (torch.arange(most, device=self.k.device) < self.k.unsqueeze(-1)) & (values_Tk > -torch.inf)
        chosen_TE = torch.zeros_like(possible_TE, dtype=torch.bool).scatter(-1, experts_Tk, taken_Tk)
        weights_TE = possible_TE.masked_fill(~chosen_TE, -torch.inf).softmax(-1).nan_to_num(0.0)
        return Routing(weights_TE, chosen_TE, RoutingStatistics(logits_TE, chosen_TE, chosen_TE))


@dataclass(frozen=True)
class Switch(_InRange):
    """The one expert of largest logit, weighted by its softmax over all (Fedus et al. 2022); see `TopK`."""

    noise: float = 0.0
    capacity_factor: float | None = 1.25

    def __call__(self, logits_TE: torch.Tensor, generator: torch.Generator | None = None) -> Routing:
        return TopK(1, self.noise, self.capacity_factor, normalize=False)(logits_TE, generator)


@dataclass(frozen=True)
class ExpertChoice(_InRange):
    """Each expert takes the T * k / E inputs (rounded up) of largest softmax, which is their weight (Zhou et al. 2022).

    Every expert is full; an input may get no expert. What one input gets depends on the others.
    """

    k: float = 2
    noise: float = 0.0

    def __call__(self, logits_TE: torch.Tensor, generator: torch.Generator | None = None) -> Routing:
        scores_TE = _noisy(logits_TE, self.noise, generator).softmax(-1)
        inputs, experts = scores_TE.shape
        members_TE = top_k(scores_TE.T, min(inputs, _ceil(inputs * self.k / experts))).T
        return Routing(scores_TE * members_TE, members_TE, RoutingStatistics(logits_TE, members_TE, members_TE))


@dataclass(frozen=True)
class TopP(_InRange):
    """The fewest experts whose softmax sums to `p`, at most `max_k`, weighted by the softmax over them (Huang et al.
    2024): inputs that the gate is sure of get fewer."""

    p: float = 0.5
    max_k: int | None = None
    noise: float = 0.0

    def __call__(self, logits_TE: torch.Tensor, generator: torch.Generator | None = None) -> Routing:
        noisy_TE = _noisy(logits_TE, self.noise, generator)
        largest_TE, experts_TE = noisy_TE.softmax(-1).sort(dim=-1, descending=True)
        before_TE = largest_TE.cumsum(-1) - largest_TE  # what larger ones sum to; 0 for the first, which always answers
        taken_TE = before_TE < self.p
        taken_TE[:, 0] = True
        if self.max_k is not None:
            taken_TE[:, self.max_k :] = False
        members_TE = torch.zeros_like(taken_TE).scatter(-1, experts_TE, taken_TE)
        weights_TE = mixing_weights(noisy_TE, members_TE)
        return Routing(weights_TE, members_TE, RoutingStatistics(logits_TE, members_TE, members_TE))


@dataclass(frozen=True)
class Hierarchical(_InRange):
    """First the `top_groups` of G equal groups of neighbouring experts, by the logsumexp of their logits; then the k
    experts of largest logit in them (after Jordan & Jacobs 1994, and DeepSeek-V3's group-limited routing)."""

    k: int = 2
    groups: int = 2
    top_groups: int = 1
    noise: float = 0.0
    normalize: bool = True

    def __call__(self, logits_TE: torch.Tensor, generator: torch.Generator | None = None) -> Routing:
        experts = logits_TE.shape[1]
        if experts % self.groups or not self.k <= experts // self.groups * self.top_groups <= experts:
            raise ValueError(
                f"groups={self.groups}, top_groups={self.top_groups}, k={self.k} for {experts} experts: groups must "
                "divide the experts, and the groups taken must hold k of them"
            )
        noisy_TE = _noisy(logits_TE, self.noise, generator)
        best_TG = top_k(noisy_TE.unflatten(-1, (self.groups, -1)).logsumexp(-1), self.top_groups)
        inside_TE = best_TG.repeat_interleave(experts // self.groups, dim=-1)
        members_TE = top_k(noisy_TE.masked_fill(~inside_TE, -torch.inf), self.k)
        weights_TE = _weights(noisy_TE, members_TE, self.normalize)
        return Routing(weights_TE, members_TE, RoutingStatistics(logits_TE, members_TE, members_TE))


@dataclass(frozen=True)
class WithNull:
    """Another router over the experts and `num_null` that do nothing, the last columns of the logits: an input that
    takes a null expert is answered by fewer. Weights are over the real ones again (Zeng et al. 2024, AdaMoE)."""

    router: Router
    num_null: int = 1

    def __post_init__(self) -> None:
        if self.num_null < 1:
            raise ValueError(f"num_null={self.num_null}: must be at least 1")

    def __call__(self, logits_TE: torch.Tensor, generator: torch.Generator | None = None) -> Routing:
        found = self.router(logits_TE, generator)
        weights_TE, members_TE = found.weights[:, : -self.num_null], found.members[:, : -self.num_null]
        total_T1 = weights_TE.sum(-1, keepdim=True)
        weights_TE = weights_TE * (found.weights.sum(-1, keepdim=True) / total_T1.clamp_min(1e-12))
        return Routing(weights_TE, members_TE, replace(found.statistics, real=members_TE.shape[1]))


@dataclass(frozen=True)
class Sampled(_InRange):
    """k experts drawn without replacement from the softmax at a temperature, weighted by the softmax (at 1) over them;
    the statistics have the log probability of the choice, for a policy gradient. Without a generator: the k largest."""

    k: int = 1
    temperature: float = 1.0

    def __call__(self, logits_TE: torch.Tensor, generator: torch.Generator | None = None) -> Routing:
        heated_TE = noisy_TE = logits_TE / self.temperature
        if generator is not None:
            uniform_TE = torch.rand(logits_TE.shape, generator=generator, device=logits_TE.device)
            noisy_TE = heated_TE - (-uniform_TE.clamp_min(1e-10).log()).log()  # Gumbel's
        order_Tk = noisy_TE.topk(self.k, dim=-1).indices
        log_probability_T = heated_TE.new_zeros(len(heated_TE))
        members_TE = torch.zeros_like(heated_TE, dtype=torch.bool)
        for column_T1 in order_Tk.split(1, dim=-1):
            left_TE = heated_TE.masked_fill(members_TE, -torch.inf)
            log_probability_T = log_probability_T + left_TE.log_softmax(-1).gather(-1, column_T1)[:, 0]
            members_TE = members_TE.scatter(-1, column_T1, True)
        statistics = RoutingStatistics(logits_TE, members_TE, members_TE, log_probability_T)
        return Routing(mixing_weights(logits_TE, members_TE), members_TE, statistics)


@dataclass(frozen=True)
class Decided:
    """Experts that a policy decides on: it gets the logits and returns a boolean `[T, E]`; none is allowed."""

    policy: Callable[[torch.Tensor], torch.Tensor]

    def __call__(self, logits_TE: torch.Tensor, generator: torch.Generator | None = None) -> Routing:
        members_TE = self.policy(logits_TE)
        weights_TE = mixing_weights(logits_TE, members_TE).nan_to_num(0.0)
        return Routing(weights_TE, members_TE, RoutingStatistics(logits_TE, members_TE, members_TE))


ROUTERS: dict[str, Callable[..., Router]] = {
    "topk": TopK,
    "switch": Switch,
    "expert-choice": ExpertChoice,
    "top-p": TopP,
    "hierarchical": Hierarchical,
    "sampled": Sampled,
}


def make_router(router: str | Router, k: int | None = None, options: Mapping[str, Any] | None = None) -> Router:
    """A router by its name in `ROUTERS`, with its `options` and, where it has one, `k`; or a callable as it is."""
    if callable(router):
        if options:
            raise ValueError(f"options {dict(options)} are of routers that are named; {router!r} is one already")
        return router
    if router not in ROUTERS:
        raise ValueError(f"router={router!r} is not one of {', '.join(ROUTERS)}, nor a callable")
    kind: Any = ROUTERS[router]
    known = kind.__dataclass_fields__
    if unknown := set(options or {}) - set(known):
        raise ValueError(f"router {router!r} has no {', '.join(sorted(unknown))}; it has {', '.join(known)}")
    return kind(**({"k": k} if k is not None and "k" in known else {}), **(options or {}))


def top_k(gate_logits_TE: torch.Tensor, k: int) -> torch.Tensor:
    """The k experts of largest gate logit, as a boolean `[T, E]` (Shazeer et al. 2017)."""
    if not min(1, gate_logits_TE.shape[-1]) <= k <= gate_logits_TE.shape[-1]:
        raise ValueError(f"k={k}: must be from 1 to {gate_logits_TE.shape[-1]}")
    experts_Tk = gate_logits_TE.topk(k, dim=-1).indices
    return torch.zeros_like(gate_logits_TE, dtype=torch.bool).scatter_(-1, experts_Tk, 1)


def random_subsets(gate_logits_TE: torch.Tensor, max_size: int, generator: torch.Generator) -> torch.Tensor:
    """1 to `max_size` experts drawn at random for each input, as a boolean `[T, E]`."""
    rank_TE = torch.rand(gate_logits_TE.shape, generator=generator).argsort(dim=-1)
    size_T1 = torch.randint(1, max_size + 1, (len(gate_logits_TE), 1), generator=generator)
    return rank_TE < size_T1


def mixing_weights(gate_logits_TE: torch.Tensor, members_TE: torch.Tensor) -> torch.Tensor:
    """Softmax of the gate over the chosen experts only, 0 for the others, `[T, E]`."""
    return gate_logits_TE.masked_fill(~members_TE, -torch.inf).softmax(dim=-1)


def _weights(logits_TE: torch.Tensor, members_TE: torch.Tensor, normalize: bool) -> torch.Tensor:
    return mixing_weights(logits_TE, members_TE) if normalize else logits_TE.softmax(-1) * members_TE


def _ceil(number: float) -> int:
    return math.ceil(round(number, 9))  # 1.1 * 200 / 4 is 55, and a little more


def _noisy(logits_TE: torch.Tensor, noise: float, generator: torch.Generator | None) -> torch.Tensor:
    if generator is None or not noise:
        return logits_TE
    drawn_TE = torch.randn(logits_TE.shape, generator=generator, device=logits_TE.device, dtype=logits_TE.dtype)
    return logits_TE + noise * drawn_TE


def _capped(chosen_TE: torch.Tensor, logits_TE: torch.Tensor, k: int, factor: float | None) -> torch.Tensor:
    """Choices left when each expert is limited to `factor` times its uniform share."""
    if factor is None:
        return chosen_TE
    inputs, experts = chosen_TE.shape
    most = min(inputs, _ceil(factor * inputs * k / experts))
    best_TE = top_k(logits_TE.masked_fill(~chosen_TE, -torch.inf).T, most).T
    return chosen_TE & best_TE
