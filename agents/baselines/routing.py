"""Baselines for MoERouting-v0: simple rules tuned on validation.

All baselines use an observation, like a learner, and know the costs. A scorer rates subsets of experts for an input:
the gate itself, nearest neighbours, a supervised predictor, or the estimates of `observation="estimates"`. A planner
weighs scores against costs: greedily given the experts already paid, within a fixed pool of experts, within a pool per
batch, or, with estimates, within the best pool by the estimates of the whole batch. Subset codes have bit e set for
expert e. With more than 10 experts, pools have at most 3 experts, and at most two experts answer an input: those of the
largest gate logits.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache, cached_property, lru_cache, partial
from itertools import product
from typing import Any

import gymnasium
import numpy as np

from agents.baselines.routing_bound import Oracle, SingleOracle
from agents.baselines.supervised import Predictor, nearest_neighbours, probabilities, values
from agents.evaluate import Policy, make_rows, play
from experts.bundle import subsets
from moe_envs.routing.env import MoERoutingVectorEnv
from moe_envs.routing.planning import pool_members

Rule = Callable[[np.ndarray], np.ndarray]  # observations [n, d] -> subset codes [n]
Family = Callable[[], list[tuple[Rule, bool]]]  # rules of different parameters, and whether they take one expert
Scorers = dict[str, list[tuple[Callable[[np.ndarray], np.ndarray], np.ndarray]]]

TUNING_EPISODES = 1000
POOL_BATCHES = 2000
AMORTISATIONS = (0.01, 0.02, 0.03, 0.05, 0.08, 0.1, 0.15, 0.2, 0.3, 0.5, 1.0)
TOP_P = (0.3, 0.5, 0.7, 0.8, 0.9, 0.95, 0.99)
CONFIDENCES = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95)
NEIGHBOURS = (10, 50)
MARGINS = (-0.5, -0.2, -0.1, -0.05, 0.0, 0.05, 0.1, 0.2, 0.5)  # in correct answers


class Baseline:
    """Rule with SB3's `predict`; `env_kwargs` requests its observation, and other actions if the action space cannot
    express it: subsets, or top-m actions where not all subsets are tabulated."""

    kind = "baseline"

    def __init__(self, rule: Rule, problem: RoutingProblem, single: bool) -> None:
        self.rule = rule
        if problem.complete:
            self.action = problem.action if single and problem.action == "expert" else "subset"
        else:
            self.action = "expert" if single else "top-m"
        self.env_kwargs = {"observation": problem.observation}
        if self.action != problem.action:
            self.env_kwargs["action"] = self.action
        self._experts = np.arange(problem.num_experts)

    def predict(
        self, observation: np.ndarray, state: Any = None, episode_start: Any = None, deterministic: bool = True
    ) -> tuple[np.ndarray, Any]:
        """Actions `[n, ...]` for observations `[n, d]`; one observation `[d]` gives one action."""
        codes = self.rule(np.atleast_2d(observation))
        members = codes[:, None] >> self._experts & 1
        if self.action == "subset":
            actions = members.astype(np.int8)
        else:
            actions = members.argmax(1) if self.action == "expert" else members.sum(1) - 1
        return (actions if observation.ndim == 2 else actions[0]), state


class RoutingProblem:
    """Data for the baselines: observation layout, relative costs of subsets, and tables of the splits `rl_train` (for
    fitting) and `validation` (for selection)."""

    def __init__(
        self, env_id: str, episodes: int = TUNING_EPISODES, observation: str = "features", **env_kwargs: Any
    ) -> None:
        self.env_id, self.episodes, self.observation = env_id, episodes, observation
        self.env_kwargs = {**env_kwargs, "observation": observation, "split": "validation"}
        train, validation = (
            _vector_env(env_id, {**self.env_kwargs, "split": split}) for split in ("rl_train", "validation")
        )
        self._envs: dict[str, gymnasium.vector.VectorEnv[Any, Any, Any]] = {}
        self.train, self.validation = train.tables, validation.tables
        self.action, self.cost_weight = train.action, train.reward.cost_weight
        self.num_experts, self.batch_size, self.layout = (
            self.train.num_experts,
            self.train.batch_size,
            self.train.layout,
        )
        self.complete, self.column = self.train.complete, self.train.column
        self.fixed = self.cost_weight * self.train.fixed[:, 0]
        self.slope = self.cost_weight * self.train.slope[:, 0]
        self.singles = subsets.singles(self.num_experts)
        pairs = self.singles[:, None] | self.singles
        self.pairs = np.unique(pairs)  # codes of one or two experts
        self.most = self.num_experts if self.complete else 2  # experts for an input

    @cached_property
    def pools(self) -> np.ndarray:
        """Codes of the pools of experts to choose from: all of up to 10 experts, else those of at most 3."""
        if self.complete:
            return np.arange(1, 2**self.num_experts)
        found: np.ndarray = pool_members(self.num_experts) @ self.singles
        return found

    def fixed_of(self, codes: np.ndarray) -> np.ndarray:
        """Weighted cost of the first use of subsets of experts."""
        if self.complete:
            return self.fixed[codes]
        found: np.ndarray = subsets.members(codes, self.num_experts) @ self.fixed[self.column(self.singles)]
        return found

    def part(self, observation: np.ndarray, name: str) -> np.ndarray:
        """A named part of observations, `[n, size]`."""
        return observation[:, self.layout[name].slice]

    def features(self, observation: np.ndarray) -> np.ndarray:
        """Features of the current input, `[n, F]`."""
        return self.part(observation, "features")

    def input(self, observation: np.ndarray) -> np.ndarray:
        """Parts of the observation about the current input, `[n, F + E]`."""
        return np.hstack([self.features(observation), self.part(observation, "gate_logits")])

    def estimates(self, observation: np.ndarray) -> np.ndarray:
        """Estimated P(correct) of each expert, `[n, E]`."""
        return self.part(observation, "worth") + self.train.input_price

    def batch(self, observation: np.ndarray) -> np.ndarray:
        """Parts of the observation about the whole batch, `[n, .]`."""
        return observation[:, self.train.of_batch]

    def used(self, observation: np.ndarray) -> np.ndarray:
        """Codes of the experts already paid, `[n]`."""
        return (self.part(observation, "experts_used") > 0.5) @ self.singles

    def remaining(self, observation: np.ndarray) -> np.ndarray:
        """Share of the batch that remains, including the current input, `[n, 1]`."""
        return 1 - self.part(observation, "progress")

    def gate(self, observation: np.ndarray) -> np.ndarray:
        """Gate probabilities, `[n, E]`."""
        odds = np.exp(self.part(observation, "gate_logits"))
        return odds / odds.sum(1, keepdims=True)

    def tune(self, candidates: list[tuple[Rule, bool]]) -> Baseline:
        """Candidate with the largest mean return on validation."""
        baselines = [Baseline(rule, self, single) for rule, single in candidates]
        if len(baselines) == 1:
            return baselines[0]
        return max(baselines, key=self.mean_return)

    def mean_return(self, baseline: Baseline) -> float:
        """Mean return over validation episodes."""
        if baseline.action not in self._envs:
            arguments = {**self.env_kwargs, "action": baseline.action}
            self._envs[baseline.action] = make_rows(self.env_id, self.episodes, **arguments)
        return float(play(baseline, self._envs[baseline.action], self.episodes, seed=0)["return"].mean())


class Planner:
    """Rules that weigh scores `[n, K]` of candidate subsets `codes [K]` against costs."""

    def __init__(self, problem: RoutingProblem, scorer: Rule, codes: np.ndarray) -> None:
        self.problem, self.scorer, self.codes = problem, scorer, codes
        self.single = bool((codes & (codes - 1) == 0).all())

    @cached_property
    def gains(self) -> list[np.ndarray]:
        """`worth` of all inputs of `rl_train` and of `validation`."""
        tables = (self.problem.train, self.problem.validation)
        return [self.worth(t.seen[:-1]) for t in tables]

    def worth(self, observation: np.ndarray) -> np.ndarray:
        """Contribution of each candidate to the return without fixed cost, `[n, K]`."""
        return self.scorer(observation) / self.problem.batch_size - self.problem.slope[self.problem.column(self.codes)]

    def greedy(self, amortisation: float, rising: bool) -> Rule:
        """Candidate with the largest worth minus a share of the unpaid fixed cost; the share is constant, or rises to 1
        as fewer inputs remain."""

        def rule(observation: np.ndarray) -> np.ndarray:
            new = self.codes & ~self.problem.used(observation)[:, None]
            share = amortisation if not rising else np.minimum(1, amortisation / self.problem.remaining(observation))
            return self.codes[(self.worth(observation) - share * self.problem.fixed_of(new)).argmax(1)]

        return rule

    def in_pool(self, worth: np.ndarray, pool: np.ndarray | int) -> np.ndarray:
        """Candidate with the largest worth within a pool (one code, or one per row), `[n]`."""
        outside = self.codes & ~np.asarray(pool)[..., None] != 0
        return self.codes[np.where(outside, -np.inf, worth).argmax(1)]

    def fixed_pool(self) -> Rule:
        """Fixed pool with the largest mean return on validation batches."""
        best = self.problem.pools[self.pool_returns(validation=True).mean(0).argmax()]
        return lambda observation: self.in_pool(self.worth(observation), best)

    def batch_pool(self) -> Rule:
        """Pool with the largest predicted return, by regression from batch summaries to the returns of all pools."""
        tables = (self.problem.train, self.problem.validation)
        returns = self.pool_returns(validation=False), self.pool_returns(validation=True)
        train, validation = ((t.summaries[: len(r)], r) for t, r in zip(tables, returns, strict=True))
        predict = values(train, validation)
        return lambda observation: self.in_pool(
            self.worth(observation), self.problem.pools[predict(self.problem.batch(observation)).argmax(1)]
        )

    def pool_returns(self, validation: bool) -> np.ndarray:
        """True return of each batch (2,000 for validation) with each of the problem's pools, `[batches, pools]`."""
        tables, worth = (self.problem.validation, self.gains[1]) if validation else (self.problem.train, self.gains[0])
        count = POOL_BATCHES if validation else len(tables.summaries)
        batches = tables.deck[:-1].reshape(-1, tables.batch_size + 1)[:count, :-1]
        inputs = np.arange(tables.num_inputs)
        correct = tables.outcomes(inputs)
        result = np.empty((count, len(self.problem.pools)), dtype=np.float32)
        for place, pool in enumerate(self.problem.pools):
            codes = self.in_pool(worth, pool)
            columns = self.problem.column(codes)
            gain = correct[inputs, columns] / tables.batch_size - self.problem.slope[columns]
            used = np.bitwise_or.reduce(codes[batches], axis=1)
            result[:, place] = gain[batches].sum(1) - self.problem.fixed_of(used)
        return result


def baselines(
    env_id: str,
    *,
    report: Callable[[float], object] = lambda share: None,
    scorers: Scorers | None = None,
    episodes: int = TUNING_EPISODES,
    **env_kwargs: Any,
) -> dict[str, Policy]:
    """All baselines of an environment by name, each the best of its family on validation.

    Pass `scorers` from `fit_scorers` for the same bundle to avoid refitting for another cost weight. `report` receives
    the finished share; the parameters of each family are selected on `episodes` validation episodes.
    """
    env_kwargs.pop("observation", None)
    problem = RoutingProblem(env_id, episodes, **env_kwargs)
    estimated = RoutingProblem(env_id, episodes, "estimates", **env_kwargs)
    fitted = scorers or _fitted(env_id, json.dumps(_of_scorers(env_kwargs), sort_keys=True))
    sizes = range(1, problem.num_experts + 1)
    families: dict[str, tuple[RoutingProblem, Family]] = {"random": (problem, lambda: [(_random(problem), True)])}
    for m in range(1, problem.most + 1):
        families[f"gate top-{m}"] = problem, partial(lambda m: [(_top_m(problem, m), m == 1)], m)
    families["top-p"] = problem, lambda: [(_top_p(problem, p), False) for p in TOP_P]
    families["confidence threshold"] = problem, lambda: [(_threshold(problem, c), False) for c in CONFIDENCES]
    families["pool by batch gate"] = problem, lambda: [(_top_gates(problem, size), True) for size in sizes]
    for name, several in fitted.items():
        families |= _planned(problem, name, several)
    by_estimates = Planner(estimated, estimated.estimates, estimated.singles)
    families["greedy (estimates)"] = estimated, lambda: _greedy([by_estimates])
    families["plan (estimates)"] = estimated, lambda: [(_plan(estimated, margin), True) for margin in MARGINS]
    found: dict[str, Policy] = {}
    for number, (name, (of_family, family)) in enumerate(families.items()):
        found[name] = of_family.tune(family())
        report((number + 1) / len(families))
    return found


def _planned(
    problem: RoutingProblem, name: str, scorers: list[tuple[Rule, np.ndarray]]
) -> dict[str, tuple[RoutingProblem, Family]]:
    """Baselines of one scorer with the three planners."""

    @cache
    def planners() -> list[Planner]:
        return [Planner(problem, scorer, codes) for scorer, codes in scorers]

    return {
        f"greedy ({name})": (problem, lambda: _greedy(planners())),
        f"fixed pool ({name})": (problem, lambda: [(p.fixed_pool(), p.single) for p in planners()]),
        f"batch pool ({name})": (problem, lambda: [(p.batch_pool(), p.single) for p in planners()]),
    }


def _greedy(planners: list[Planner]) -> list[tuple[Rule, bool]]:
    shares = product(planners, AMORTISATIONS, (False, True))
    return [(planner.greedy(share, rising), planner.single) for planner, share, rising in shares]


def bound(env_id: str, **env_kwargs: Any) -> Policy:
    """The exact bound; with more than 10 experts, of one expert for each input."""
    env = _vector_env(env_id, {**env_kwargs, "observation": "features"})
    return Oracle() if env.tables.complete else SingleOracle()


def _of_scorers(env_kwargs: dict[str, Any]) -> dict[str, Any]:
    """Arguments that scorers depend on; the cost weight is not among them."""
    return {key: value for key, value in env_kwargs.items() if not key.endswith("_weight") and key != "split"}


@lru_cache(maxsize=2)
def _fitted(env_id: str, arguments: str) -> Scorers:
    return fit_scorers(RoutingProblem(env_id, **json.loads(arguments)))


def fit_scorers(problem: RoutingProblem) -> Scorers:
    """Fit all scorers on `rl_train`; returns scorers and their subset codes by name."""
    train, validation = (
        (problem.input(t.seen[:-1]), t.outcomes(np.arange(t.num_inputs))) for t in (problem.train, problem.validation)
    )
    predict = probabilities(train, validation)
    singles = problem.singles
    right = train[1][:, problem.column(singles)]
    neighbours = nearest_neighbours(problem.features(problem.train.seen[:-1]), right, NEIGHBOURS)
    candidates = (singles, problem.pairs) if problem.complete else (singles,)
    predicted = (
        (partial(_scores, predict=predict, see=problem.input, columns=problem.column(codes)), codes)
        for codes in candidates
    )
    return {
        "gate": [(problem.gate, singles)],
        "kNN": [(partial(_scores, predict=near, see=problem.features), singles) for near in neighbours],
        "predictor": list(predicted),
    }


def _scores(
    observation: np.ndarray, predict: Predictor, see: Rule, columns: np.ndarray | slice = slice(None)
) -> np.ndarray:
    return predict(see(observation))[:, columns]


def _random(problem: RoutingProblem) -> Rule:
    generator = np.random.default_rng(0)
    return lambda observation: 1 << generator.integers(problem.num_experts, size=len(observation))


def _top_m(problem: RoutingProblem, m: int) -> Rule:
    return lambda observation: _largest(problem.gate(observation), np.full(len(observation), m))


def _top_p(problem: RoutingProblem, p: float) -> Rule:
    """Smallest set of experts whose gate probabilities sum to p; of at most two, with more than 10 experts."""

    def rule(observation: np.ndarray) -> np.ndarray:
        gate = problem.gate(observation)
        before = np.sort(gate, axis=1)[:, ::-1].cumsum(axis=1)
        return _largest(gate, np.minimum((before < p).sum(1) + 1, problem.most))

    return rule


def _threshold(problem: RoutingProblem, confidence: float) -> Rule:
    """One expert if the gate is confident, else two."""

    def rule(observation: np.ndarray) -> np.ndarray:
        gate = problem.gate(observation)
        return _largest(gate, np.where(gate.max(1) >= confidence, 1, 2))

    return rule


def _top_gates(problem: RoutingProblem, size: int) -> Rule:
    """Top-1 expert among the `size` experts of largest mean gate probability in the batch."""

    def rule(observation: np.ndarray) -> np.ndarray:
        pool = _largest(problem.part(observation, "batch_gate"), np.full(len(observation), size))
        inside = pool[:, None] >> np.arange(problem.num_experts) & 1
        return 1 << (problem.gate(observation) * inside).argmax(1)

    return rule


def _plan(problem: RoutingProblem, margin: float) -> Rule:
    """Expert of largest worth within the pool of experts whose margin in the plan of the batch exceeds `margin`."""

    def rule(observation: np.ndarray) -> np.ndarray:
        plan, worth = problem.part(observation, "plan"), problem.part(observation, "worth")
        outside = (plan <= margin) & (plan < plan.max(1, keepdims=True))
        return problem.singles[np.where(outside, -np.inf, worth).argmax(1)]

    return rule


def _largest(scores: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Codes of the `counts [n]` largest scores `[n, E]`."""
    order = np.argsort(-scores, axis=1, kind="stable")
    return ((1 << order) * (np.arange(scores.shape[1]) < counts[:, None])).sum(1)


def _vector_env(env_id: str, env_kwargs: dict[str, Any]) -> MoERoutingVectorEnv:
    try:
        env = gymnasium.make_vec(env_id, num_envs=1, vectorization_mode="vector_entry_point", **env_kwargs).unwrapped
    except TypeError as error:  # constructor of another environment without our arguments
        raise ValueError(f"{env_id} is not a routing environment: {error}") from error
    if not isinstance(env, MoERoutingVectorEnv):
        raise ValueError(f"{env_id} is not a routing environment; these baselines are for MoERouting-v0")
    return env
