"""Are our learners as good as SB3's, and how much faster? The same settings in both, final policies, several seeds.

Each training is a line of `raw.jsonl`; what the same settings and commit left there is not trained again.
"""

from __future__ import annotations

import json
import multiprocessing
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pandas as pd
from gymnasium.vector import AutoresetMode, SyncVectorEnv

from agents import tuned
from benchmarks import backends
from cost.files import write_text
from cost.machine import provenance

ROUTING = "moe_envs:MoERouting-v0"
# CartPole's are those of RL Baselines3 Zoo with a constant clip range, Acrobot's near them without its normalisation.
SETTINGS: dict[str, dict[str, Any]] = {
    "CartPole-v1": {
        "n_envs": 8, "total_timesteps": 100_000, "n_steps": 32, "batch_size": 256, "n_epochs": 20,
        "gae_lambda": 0.8, "gamma": 0.98, "learning_rate": "linear 1e-3",
    },
    "Acrobot-v1": {
        "n_envs": 16, "total_timesteps": 200_000, "n_steps": 256, "batch_size": 256, "n_epochs": 4,
        "gae_lambda": 0.94, "gamma": 0.99, "learning_rate": 1e-3,
    },
    ROUTING: tuned.TUNED["MoERouting-v0"]["ppo"],
}  # fmt: skip
EPISODES = 200  # of each final policy; 1,000 on the test split of MoERouting-v0
# (environment, rows, steps of a rollout, minibatch): a batch of 64 is SB3's default. Ours takes Gymnasium's vector
# CartPole, which SB3 cannot; with SINGLES both step the same single environments.
SINGLES = ", single environments"
CASES = [
    ("CartPole-v1", 8, 128, 64), ("CartPole-v1", 64, 128, 64), ("CartPole-v1" + SINGLES, 8, 128, 64),
    ("CartPole-v1" + SINGLES, 64, 128, 64), (ROUTING, 8, 128, 64), (ROUTING, 64, 128, 64), (ROUTING, 1024, 32, 64),
    ("CartPole-v1", 8, 128, 256), ("CartPole-v1", 64, 128, 1024), ("CartPole-v1" + SINGLES, 64, 128, 1024),
    (ROUTING, 8, 128, 256), (ROUTING, 64, 128, 1024), (ROUTING, 1024, 32, 4096),
]  # fmt: skip
ROUNDS, STEPS = 3, 32_768
Row = dict[str, Any]


def train(env_id: str, backend: str, seed: int) -> Row:
    """One training; the mean return of its final policy, acting deterministically, and its CPU seconds."""
    import torch
    from stable_baselines3.common.env_util import make_vec_env
    from stable_baselines3.common.evaluation import evaluate_policy

    from agents.evaluate import evaluate

    torch.set_num_threads(1)
    values = dict(SETTINGS[env_id])
    total = values.pop("total_timesteps")
    begun = time.process_time()
    agent = backends.make(env_id, "ppo", backend, {}, seed, values)
    agent.learn(total)
    row = {"env": env_id, "backend": backend, "seed": seed, "seconds": time.process_time() - begun}
    if env_id == ROUTING:
        return row | {"return": float(evaluate(agent, env_id, 1000, split="test")["return"].mean())}
    found, _ = evaluate_policy(agent, make_vec_env(env_id, 8, seed=10_000 + seed), EPISODES)
    return row | {"return": float(np.mean(found))}


def run(
    seeds: int, out: Path, jobs: int, environments: list[str], add_task: Callable[[str], Callable[[float], object]]
) -> Row:
    """All trainings that are not in `out` yet, and the speeds; writes raw.jsonl and results.json."""
    if unknown := set(environments) - SETTINGS.keys():
        raise ValueError(f"no settings for {', '.join(sorted(unknown))}; there are {', '.join(SETTINGS)}")
    out.mkdir(parents=True, exist_ok=True)
    raw = out / "raw.jsonl"
    origin = provenance()
    rows = [
        row
        for row in _read(raw)
        if (row.get("settings"), row.get("commit")) == (SETTINGS[row["env"]], origin["commit"])
    ]
    there = {(row["env"], row["backend"], row["seed"]) for row in rows}
    wanted = [(env, backend, seed) for env in environments for seed in range(seeds) for backend in ("own", "sb3")]
    missing = [each for each in wanted if each not in there]
    report = add_task(f"{len(missing)} trainings")
    with ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn")) as pool, raw.open("a") as file:
        futures = [pool.submit(train, *each) for each in missing]
        for number, future in enumerate(as_completed(futures)):
            rows.append(future.result() | {"settings": SETTINGS[future.result()["env"]], **origin})
            file.write(json.dumps(rows[-1]) + "\n")
            file.flush()
            report((number + 1) / len(missing))
    frame = pd.DataFrame(row for row in rows if (row["env"], row["backend"], row["seed"]) in set(wanted))
    result = {"learning": compare(frame), "speed": speed(add_task("speed")), **origin}
    write_text(out / "results.json", json.dumps(result, indent=1))
    return result


def _read(raw: Path) -> list[Row]:
    """The rows of `raw.jsonl`; a last line that was cut is taken off the file."""
    text = raw.read_text() if raw.exists() else ""
    whole = text[: text.rfind("\n") + 1]
    if whole != text:
        write_text(raw, whole)
    return [json.loads(line) for line in whole.splitlines()]


def compare(frame: pd.DataFrame) -> list[Row]:
    """For each environment: mean returns, their difference with its 95 % interval (Welch), CPU seconds."""
    from scipy.stats import ttest_ind

    rows: list[Row] = []
    if frame.empty:
        return rows
    for env, group in frame.groupby("env", sort=False):
        own, sb3 = (group[group["backend"] == backend] for backend in ("own", "sb3"))
        means = float(own["return"].mean()), float(sb3["return"].mean())
        low = high = means[0] - means[1]
        if own["return"].nunique() > 1 or sb3["return"].nunique() > 1:  # else there is nothing to estimate
            interval = ttest_ind(own["return"], sb3["return"], equal_var=False).confidence_interval()
            low, high = float(interval.low), float(interval.high)
        row: Row = {"env": env, "seeds": len(own), "own": means[0], "sb3": means[1], "difference": means[0] - means[1]}
        row |= {"ci95": [low, high]}
        rows.append(row | {"own_seconds": own["seconds"].median(), "sb3_seconds": sb3["seconds"].median()})
    return rows


def speed(report: Callable[[float], object]) -> list[Row]:
    """Steps per second of CPU time, one thread, of both in turn: medians, for the same network, batch and 4 epochs."""
    import torch
    from threadpoolctl import threadpool_limits

    torch.set_num_threads(1)
    rows = []
    with threadpool_limits(1, "blas"):
        for number, (env_id, count, steps, batch) in enumerate(CASES):
            values = {"n_envs": count, "n_steps": steps, "batch_size": batch, "n_epochs": 4}
            agents = _both(env_id, values)
            for agent in agents:
                agent.learn(count * steps)
            rates = [[backends.rate(agent, STEPS) for agent in agents] for _ in range(ROUNDS)]
            own, sb3 = (statistics.median(rate) for rate in zip(*rates, strict=True))
            ratio = statistics.median(ours / theirs for ours, theirs in rates)
            rows.append({"env": env_id, "rows": count, "batch_size": batch, "own": own, "sb3": sb3, "ratio": ratio})
            report((number + 1) / len(CASES))
    return rows


def _both(name: str, values: dict[str, Any]) -> list[Any]:
    from agents import PPO

    env_id = name.removesuffix(SINGLES)
    agents = [backends.make(env_id, "ppo", backend, {}, 0, values) for backend in ("own", "sb3")]
    if env_id != name:
        makers = [lambda: gymnasium.make(env_id)] * values["n_envs"]
        agents[0] = PPO("MlpPolicy", SyncVectorEnv(makers, autoreset_mode=AutoresetMode.SAME_STEP), **values)
    return agents
