"""Baselines for MoEServing-v0: the rules of `experts.serving.rules`, tuned on the validation split, and bounds.

Shape legend: n rows, C request classes, L quality levels.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from functools import partial
from typing import Any

import gymnasium
import numpy as np
from gymnasium.vector import AutoresetMode, VectorEnv

from agents.baselines.serving_bound import Foresight, Optimal
from agents.evaluate import play
from cost.arguments import choose
from experts.serving.control import CAPS, Controller, RequestClass
from experts.serving.rules import Adaptive, ByClass, Fixed, Regression, ServingPlan, SlackFit, Thresholds
from moe_envs.serving.env import MoEServingVectorEnv

ID = "moe_envs:MoEServing-v0"
TUNED = 32  # validation episodes on which rules are compared
TRACES = "poisson", "bursts"
TRIES = 40  # random settings of a rule, of which the best is taken, and as many near it
Make = Callable[[MoEServingVectorEnv], Controller]


class ServingRule:
    """A rule as a policy: it looks at the watched servers, not at the observation."""

    kind = "baseline"

    def __init__(self, make: Make, about: Mapping[str, Any] | None = None) -> None:
        self.make, self.about = make, dict(about or {})

    def __repr__(self) -> str:
        return f"ServingRule({self.about})"

    def watch(self, env: VectorEnv[Any, Any, Any]) -> None:
        """Attach to a vector environment."""
        servers: Any = env
        self.env: MoEServingVectorEnv = servers
        self.controller = self.make(servers)

    def predict(
        self, observation: np.ndarray, state: Any = None, episode_start: Any = None, deterministic: bool = True
    ) -> tuple[np.ndarray, Any]:
        """Choices `[n]`."""
        starts = np.zeros(len(observation), dtype=np.bool_) if episode_start is None else episode_start
        return np.asarray(self.controller.decide(self.env.seen(), starts)), state


class RandomChoices:
    """Random choices from a separate generator."""

    kind = "baseline"

    def __init__(self, count: int, seed: int = 0) -> None:
        self._count, self._generator = count, np.random.default_rng(seed)

    def predict(
        self, observation: np.ndarray, state: Any = None, episode_start: Any = None, deterministic: bool = True
    ) -> tuple[np.ndarray, Any]:
        """Random choices."""
        return self._generator.integers(0, self._count, len(observation)), state


@dataclass(frozen=True)
class Family:
    """Settings of a rule: `drawn(random)` draws some, `near(settings, random)` changes one or two of them; `bounded`
    ones are then drawn anew."""

    make: Callable[[MoEServingVectorEnv, dict[str, Any]], Controller]
    ranges: Mapping[str, Callable[[np.random.Generator], Any]]
    bounded: Collection[str] = ()

    def drawn(self, random: np.random.Generator) -> dict[str, Any]:
        """Random settings."""
        return {name: draw(random) for name, draw in self.ranges.items()}

    def near(self, settings: dict[str, Any], random: np.random.Generator) -> dict[str, Any]:
        """The settings with one or two of them drawn anew, numbers near what they were."""
        names = random.choice(list(self.ranges), size=min(2, len(self.ranges)), replace=False)
        changed = settings | {name: _near(settings[name], self.ranges[name](random), random) for name in names}
        return changed | {name: self.ranges[name](random) for name in names if name in self.bounded}


def _near(old: Any, new: Any, random: np.random.Generator) -> Any:
    if isinstance(old, float):
        return float(old * np.exp(random.normal(0, 0.3)))
    if isinstance(old, list) and isinstance(old[0], float):
        return [float(each * np.exp(random.normal(0, 0.3))) for each in old]
    if isinstance(old, list):
        place = int(random.integers(len(old)))
        return [*old[:place], new[place], *old[place + 1 :]]
    return new


def _cap(random: np.random.Generator) -> int:
    return int(random.choice(CAPS))


def _between(low: float, high: float) -> Callable[[np.random.Generator], float]:
    return lambda random: float(np.exp(random.uniform(np.log(low), np.log(high))))


def _integer(high: int) -> Callable[[np.random.Generator], int]:
    return lambda random: int(random.integers(high))


def _of_classes(
    env: MoEServingVectorEnv, draw: Callable[[RequestClass], Callable[[np.random.Generator], Any]]
) -> Callable[[np.random.Generator], list[Any]]:
    """A list with a value of each class of requests."""
    return lambda random: [draw(each)(random) for each in env.classes]


def families(env: MoEServingVectorEnv) -> dict[str, Family]:
    """The rules and the ranges in which their settings are searched; thresholds choose between levels."""
    choices, service, levels = env.choices, env.service, len(env.service.levels)
    deadline = min(each.deadline for each in env.classes)
    order, level = {"order": _integer(choices.orders)}, {"level": _integer(levels)}

    def limits(most: float) -> Callable[[np.random.Generator], list[float]]:
        return lambda random: sorted(_between(1, most)(random) for _ in range(levels - 1))

    def thresholds(env: MoEServingVectorEnv, own: dict[str, Any]) -> Controller:
        rates = [each * env.capacity / 100 for each in own["rates"]]  # in per cent of what the best level serves
        return Thresholds(choices, service, **(own | {"rates": sorted(rates), "queues": sorted(own["queues"])}))

    found = {
        "fixed": Family(
            lambda env, own: Fixed(choices, **own), {"cap": _cap, "timeout": _between(1e-4, deadline)} | order | level
        ),
        "regression (BentoML)": Family(
            lambda env, own: Regression(choices, service, **own), {"cap": _cap} | order | level
        ),
        "adaptive (Clipper)": Family(
            lambda env, own: Adaptive(choices, **own),
            {"target": _between(deadline / 20, deadline), "timeout": _between(1e-4, deadline),
             "decrease": lambda random: float(random.uniform(0.5, 0.95))} | order | level,
            bounded=("decrease",),
        ),
        "SlackFit": Family(
            lambda env, own: SlackFit(choices, service, **own),
            {"buckets": lambda random: int(random.integers(1, 65)), "margin": _between(1e-4, deadline / 2)} | order,
        ),
        "plan": Family(
            lambda env, own: ServingPlan(choices, service, env.classes, **own),
            {"price": _between(0.02, 0.5), "ahead": _between(0.7, 2.0), "margin": _between(1e-3, deadline / 2),
             "scale": _integer(4)} | order,
        ),
        "thresholds": Family(
            thresholds,
            {"queues": limits(4 * CAPS[-1]), "rates": limits(400), "cap": _cap, "fill": _cap,
             "margin": _between(1e-3, deadline / 2), "scale": _integer(4)} | order,
        ),
    }  # fmt: skip
    if levels < 2:
        del found["thresholds"]
    if len(env.classes) > 1:
        found["by class"] = Family(lambda env, own: ByClass(choices, service, **own), {
            "levels": _of_classes(env, lambda each: _integer(levels)), "caps": _of_classes(env, lambda each: _cap),
            "fills": _of_classes(env, lambda each: _cap), "queues": _of_classes(env, lambda each: _between(1, 256)),
            "leads": _of_classes(env, lambda each: _between(1e-3, each.deadline / 2)),
        })  # fmt: skip
    return found


def tuned(
    family: Family, envs: Sequence[VectorEnv[Any, Any, Any]], tries: int | None = None,
    report: Callable[[float], object] = lambda share: None,
) -> ServingRule:  # fmt: skip
    """The best of `tries` random settings, then of as many changes to it, by the mean return on the same validation
    episodes of all environments."""
    random, best, settings, tries = np.random.default_rng(0), -np.inf, dict[str, Any](), tries or TRIES
    for number in range(2 * tries):
        tried = family.drawn(random) if number < tries else family.near(settings, random)
        found = mean_return(_rule(family, tried), envs)
        if found > best:
            best, settings = found, tried
        report((number + 1) / (2 * tries))
    return _rule(family, settings)


def mean_return(rule: ServingRule, envs: Sequence[VectorEnv[Any, Any, Any]]) -> float:
    """Of an episode of each row of all environments."""
    return float(np.mean([play(rule, env, env.num_envs, seed=0)["return"].mean() for env in envs]))


def _rule(family: Family, settings: dict[str, Any]) -> ServingRule:
    return ServingRule(lambda env: family.make(env, settings), settings)


def all_tuned(
    envs: Sequence[VectorEnv[Any, Any, Any]], tries: int | None = None,
    report: Callable[[float], object] = lambda share: None,
) -> dict[str, ServingRule]:  # fmt: skip
    """Each rule as it is best on the validation episodes of all environments."""
    of: Any = envs[0].unwrapped
    every, found = families(of), dict[str, ServingRule]()
    for number, (name, family) in enumerate(every.items()):
        found[name] = tuned(family, envs, tries, partial(_report_part, report, number, len(every)))
    return found


def _report_part(report: Callable[[float], object], number: int, parts: int, share: float) -> None:
    report((number + share) / parts)


def tuned_rule(name: str, tries: int | None = None, **env_kwargs: Any) -> ServingRule:
    """The tuned rule of one of the `families`."""
    with closing(_episodes(ID, "validation", **env_kwargs)) as env:
        of: Any = env.unwrapped
        every = families(of)
        choose("rule", name, every)
        return tuned(every[name], [env], tries)


def best_rule(
    tries: int | None = None, report: Callable[[float], object] = lambda share: None, **env_kwargs: Any
) -> dict[str, Any]:
    """Which of the tuned rules and SlackFit as it is has the best mean return on validation, over Poisson and bursty
    arrivals. Returns the `rule` as `moe-serve --controller` takes it, its returns on validation and test, and that of
    SlackFit on test."""
    with ExitStack() as stack:
        made = {
            split: [stack.enter_context(closing(_episodes(ID, split, trace=trace, **env_kwargs))) for trace in TRACES]
            for split in ("validation", "test")
        }
        of: Any = made["validation"][0].unwrapped
        plain = ServingRule(lambda env: SlackFit(env.choices, env.service))
        found = all_tuned(made["validation"], tries, report)
        rules = {"slackfit": plain} | {text_of(name, rule.about, of): rule for name, rule in found.items()}
        scores = {text: mean_return(rule, made["validation"]) for text, rule in rules.items()}
        best = max(scores, key=lambda text: scores[text])
        return {
            "rule": best, "validation_return": scores[best], "test_return": mean_return(rules[best], made["test"]),
            "slackfit_test_return": mean_return(plain, made["test"]),
        }  # fmt: skip


def _episodes(env_id: str, split: str, **env_kwargs: Any) -> VectorEnv[Any, Any, Any]:
    mode = AutoresetMode.SAME_STEP.value
    given = {"rule": "fixed"} | env_kwargs | {"split": split}  # the cheapest one in observations that no rule looks at
    return gymnasium.make_vec(env_id, TUNED, "vector_entry_point", autoreset_mode=mode, **given)


NAMES = {
    "regression (BentoML)": "regression", "adaptive (Clipper)": "adaptive", "SlackFit": "slackfit",
    "by class": "by-class",
}  # fmt: skip


def text_of(name: str, settings: Mapping[str, Any], env: MoEServingVectorEnv) -> str:
    """A rule of one of the `families` with these settings, as `moe-serve --controller` takes it."""
    own = dict(settings)
    for key in [key for key, value in own.items() if isinstance(value, list)]:
        scale = env.capacity / 100 if key == "rates" else 1
        values = sorted(own[key]) if name == "thresholds" else own[key]
        own[key] = "/".join(f"{each * scale:.6g}" for each in values)
    parts = [f"{key}={value:.6g}" if isinstance(value, float) else f"{key}={value}"
             for key, value in own.items()]  # fmt: skip
    return f"{NAMES.get(name, name)}:{','.join(parts)}"


def baselines(
    env_id: str, *, report: Callable[[float], object] = lambda share: None, **env_kwargs: Any
) -> dict[str, Any]:
    """Random choices, everything at once at the best level, and the tuned rules."""
    with closing(_episodes(env_id, "validation", **env_kwargs)) as made:
        env: Any = made.unwrapped
        return {
            "random choices": RandomChoices(len(env.choices)),
            "at once, best level": ServingRule(lambda env: Fixed(env.choices)),
            **all_tuned([made], None, report),
        }


def _varying(env_kwargs: Mapping[str, Any]) -> bool:
    return bool(env_kwargs.get("jitter")) or env_kwargs.get("slowdown", 1.0) != 1.0


def bound(env_id: str, **env_kwargs: Any) -> Foresight | Optimal | None:
    """With one class of requests what a server reaches that knows the future, or, where it is known, the optimum of
    one that does not (`agents.baselines.serving_bound`); None with several, with other weights of the costs, and where
    times vary."""
    load = env_kwargs.get("load", (0.5, 1.1))
    other = env_kwargs.get("time_weight", 1) != 1 or any(
        env_kwargs.get(name, 0) for name in ("memory_weight", "energy_weight")
    )
    if env_kwargs.get("classes", "one") != "one" or other or _varying(env_kwargs):
        return None
    if env_kwargs.get("answers", "in time") == "in time":
        return Foresight()
    known = env_kwargs.get("trace", "poisson") == "poisson" and not isinstance(load, tuple | list)
    return Optimal() if known else None
