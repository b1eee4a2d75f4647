"""What a policy sees of its queues; the environment and the server use the same code.

Shape legend: n queues, C request classes, R time scales.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from experts.serving.control import CAPS, SCALES, Choices, RequestClass, Seen, Service
from experts.serving.rules import rule_of
from moe_envs.core.spaces import Layout, layout

LOAD, AGES = 8.0, 2.0  # largest load and age over deadline that are seen
LATEST = 6.0  # largest -log10 of seconds since the last arrival


def parts_of(choices: Choices) -> Layout:
    """The parts of an observation."""
    classes = choices.classes
    return layout([
        ("queue", classes, 0, 2, "log of 1 + waiting rows, over log 65"),
        ("age", classes, 0, AGES, "how long the oldest request waits, over its deadline"),
        ("slack", classes, 0, 1, "time until the first deadline, over the deadline; 1 if nothing waits"),
        ("since", 1, 0, LATEST, "-log10 of the seconds since the last arrival"),
        ("load", len(SCALES), 0, LOAD, "arrival rate over what the best level serves, averaged over 0.02 to 2.5 s"),
        ("last", 2, 0, AGES, "rows of the last batch over 64, its seconds over the first class's deadline"),
        ("waited", 1, 0, AGES, "mean wait of served requests over the first class's deadline"),
        ("plan", len(choices), 0, 1, "one-hot choice of the rule from which our PPO starts"),
    ])  # fmt: skip


class Observer:
    """Observations of queues, with the choice of a rule: "plan" at the cost weight as its price, or another one as
    `experts.serving.rules.rule_of` takes it, without a memory of its own. Raises `ValueError` for others."""

    def __init__(
        self, rule: str, cost_weight: float, choices: Choices, service: Service, classes: Sequence[RequestClass]
    ) -> None:
        if rule.partition(":")[0] == "adaptive":
            raise ValueError(f"rule={rule!r}: it remembers batches, which an observation cannot; give another rule")
        make = rule_of(f"plan:price={float(cost_weight)!r}" if rule == "plan" else rule)
        self.rule, self._choices = make(choices, service, classes), len(choices)
        self._capacity, self._deadline = capacity(service), np.array([each.deadline for each in classes])

    def __call__(self, seen: Seen) -> np.ndarray:
        """Observations `[n, size]`."""
        deadline = self._deadline
        scale = np.array([CAPS[-1], deadline[0]])
        values = (
            np.log1p(seen.queue) / np.log1p(CAPS[-1]), seen.age / deadline, seen.slack / deadline,
            -np.log10(seen.since.clip(10**-LATEST))[:, None], seen.rate / self._capacity, seen.last / scale,
            seen.waited[:, None] / deadline[0],
        )  # fmt: skip
        high = (2, AGES, 1, LATEST, LOAD, AGES, AGES)
        each = [np.clip(value, 0, most) for value, most in zip(values, high, strict=True)]
        chosen = self.rule.decide(seen, np.zeros(len(seen.since), dtype=np.bool_))
        return np.concatenate([*each, np.arange(self._choices) == chosen[:, None]], axis=1).astype(np.float32)


def capacity(service: Service) -> float:
    """Rows a second of the largest batches at the best level."""
    return CAPS[-1] / float(service.table(CAPS[-1])[0, -1])
