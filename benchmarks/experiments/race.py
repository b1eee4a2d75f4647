"""How long until a learner beats the best baseline of MoERouting-v0 on validation? CPU seconds, ours and SB3's PPO.

Both train with their tuned settings and are judged at the same steps, on the same validation episodes; the seconds of
judging are not counted.
"""

from __future__ import annotations

import json
import multiprocessing
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

from agents import tuned
from agents.evaluate import evaluate
from benchmarks import backends
from benchmarks.experiments.learners import ROUTING
from cost.files import write_text
from cost.machine import provenance

CHECKS, EPISODES, COST_WEIGHT = 60, 1000, 0.2
Row = dict[str, Any]


class Judge:
    """Looks at a training after each update; knows the seconds until its policy first beat the target."""

    def __init__(self, target: float, total: int) -> None:
        self.target, self.every, self.begun = target, total // CHECKS, time.process_time()
        self.seconds: float | None = None
        self.steps: int | None = None
        self.best = -float("inf")
        self._checked = 0

    def __call__(self, agent: Any) -> bool:
        """Whether the training is to go on."""
        if agent.num_timesteps < self._checked + self.every:
            return True
        self._checked, paused = agent.num_timesteps, time.process_time()
        mean = float(evaluate(agent, ROUTING, EPISODES, split="validation", cost_weight=COST_WEIGHT)["return"].mean())
        self.best = max(self.best, mean)
        if mean > self.target:
            self.seconds, self.steps = paused - self.begun, agent.num_timesteps
        self.begun += time.process_time() - paused
        return not mean > self.target


def train(backend: str, seed: int, target: float) -> Row:
    """One training, until it beats the target or ends; seconds and steps are None where it never did."""
    import torch

    torch.set_num_threads(1)
    settings = tuned.settings("ppo", ROUTING, backend)
    agent = backends.make(ROUTING, "ppo", backend, {"cost_weight": COST_WEIGHT}, seed, settings)
    judge = Judge(target, settings["total_timesteps"])
    backends.learn(agent, settings["total_timesteps"], judge)
    return {"backend": backend, "seed": seed, "seconds": judge.seconds, "steps": judge.steps, "best": judge.best}


def run(seeds: int, out: Path, jobs: int, report: Callable[[float], object]) -> Row:
    """All trainings; writes race.json."""
    from agents.baselines.routing import baselines

    targets = {
        name: float(evaluate(policy, ROUTING, EPISODES, split="validation", cost_weight=COST_WEIGHT)["return"].mean())
        for name, policy in baselines(ROUTING, cost_weight=COST_WEIGHT).items()
        if getattr(policy, "kind", "") == "baseline"
    }
    best = max(targets, key=targets.__getitem__)
    rows: list[Row] = []
    with ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn")) as pool:
        todo = [(backend, seed, targets[best]) for seed in range(seeds) for backend in ("own", "sb3")]
        for future in as_completed([pool.submit(train, *each) for each in todo]):
            rows.append(future.result())
            report(len(rows) / len(todo))
    result = {"baseline": best, "target": targets[best], "rows": rows, "settings": tuned.settings("ppo", ROUTING)}
    out.mkdir(parents=True, exist_ok=True)
    write_text(out / "race.json", json.dumps(result | provenance(), indent=1))
    return result
