"""Does a learned controller pay in the real server? Value and latency of answers under load, beside rules.

Rules are tuned, and PPO trained, in MoEServing-v0, for a range of loads. Then `moe-serve` runs with each of them, in
turns, and gets the same arrivals at a given load; sender and server share this machine's processors. Run it on an
otherwise idle machine.
"""

from __future__ import annotations

import json
from collections import Counter
from functools import cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd

from agents.baselines import serving as rules
from agents.evaluate import evaluate
from benchmarks.programs.sender import HOST, run_loop, send_all, send_at
from benchmarks.programs.service import busy_seconds, predictions, service
from benchmarks.results.statistics import mean_interval
from benchmarks.runner.kept import run_of
from benchmarks.runner.setup import Arguments
from experts.serving.arrivals import arrivals
from moe_envs.serving import MoEServingVectorEnv

DEFAULT, PPO = "plan, not tuned", "PPO"
SEEDS = (0, 1, 2)
SETTINGS: dict[str, dict[str, Any]] = {
    f"{trace}, load {load}": {"trace": trace, "load": load}
    for trace in ("poisson", "bursts") for load in (0.5, 0.8, 1.1)
}  # fmt: skip
QUICK = {"seeds": [0], "setups": {"short": {
    "load": 0.3, "seconds": 2, "timesteps": 64, "compared": [], "tune": 2, "episode": 1,
    "episodes": 2,
}}}  # fmt: skip
Rule = Literal["fixed", "regression (BentoML)", "adaptive (Clipper)", "SlackFit", "plan", "thresholds"]
RULES: list[Rule] = ["fixed", "regression (BentoML)", "adaptive (Clipper)", "SlackFit", "plan", "thresholds"]


class ServingSetup(Arguments):
    """Arrivals of a `trace` ("poisson", "bursts", or a file) at this `load` for `seconds` (the test part of a file).
    Rules are the best of twice `tune` settings, and policies are trained, on episodes of `episode` seconds."""

    model: str = "language"
    trace: Literal["poisson", "bursts"] | str = "poisson"
    load: float = 0.8
    deadline: float = 0.25
    cost_weight: float = 0.1
    seconds: float = 30.0
    compared: list[Rule] = RULES
    tune: int = rules.TRIES
    timesteps: int | None = None
    episode: float = 8.0
    episodes: int = 256


Setup = ServingSetup


def measure(setup: ServingSetup, seed: int, split: str, folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """What each controller is worth in the environment's test split and in the server."""
    kwargs: dict[str, Any] = {"trace": setup.trace, "deadline": setup.deadline, "cost_weight": setup.cost_weight,
                              "seconds": setup.episode, "model": setup.model}  # fmt: skip
    env = MoEServingVectorEnv(1, **kwargs)
    controllers = {DEFAULT: "plan"} | {name: _tuned(name, setup.tune, **kwargs) for name in setup.compared}
    controllers[PPO] = f"policy:{run_of(folder, rules.ID, kwargs, seed, setup.timesteps)}"
    simulated = {name: _simulated(text, env, setup, kwargs) for name, text in controllers.items()}
    times = arrivals(setup.trace, setup.load * env.capacity, setup.seconds, np.random.default_rng(seed), "test")
    found = {name: _served(text, setup, times, env) for name, text in controllers.items()}
    named = {name: text for name, text in controllers.items() if name != PPO}
    return {"simulated": simulated, "controllers": named}, {"served": found}


def _simulated(text: str, env: MoEServingVectorEnv, setup: ServingSetup, kwargs: dict[str, Any]) -> float:
    from agents.deploy.serving import controller_of

    rule = rules.ServingRule(lambda env: controller_of(text)(env.choices, env.service, env.classes))
    given = kwargs | {"load": setup.load, "split": "test"}
    return float(evaluate(rule, rules.ID, setup.episodes, 0, **given)["return"].mean())


def _served(text: str, setup: ServingSetup, times: np.ndarray, env: MoEServingVectorEnv) -> dict[str, Any]:
    """Value of the answers, share of the time in the model, latencies and levels."""
    asked, deadline = predictions(setup.model), setup.deadline
    with service(setup.model, "--deadline", str(deadline), "--controller", text) as server:
        run_loop(send_all(asked, 1.0, HOST, server.port, connections=4))
        before = run_loop(busy_seconds(server.port))
        sent = run_loop(send_at(times, asked, HOST, server.port))
        busy = (run_loop(busy_seconds(server.port)) - before) / setup.seconds
    quality = dict(zip(env.service.levels, env.service.quality.tolist(), strict=True))
    fine = (sent.status == 200) & (sent.latency <= deadline)
    levels = Counter(json.loads(each)["level"] for each, good in zip(sent.answers, fine, strict=True) if good)
    value = sum(count * quality[name] for name, count in levels.items()) / len(times)
    return {
        "return": value - setup.cost_weight * busy, "value": value, "busy": busy, "in time": float(fine.mean()),
        "p95": float(np.percentile(sent.latency, 95)),
        "levels": {name: levels[name] / max(1, int(fine.sum())) for name in quality},
    }  # fmt: skip


@cache
def _tuned(name: str, tries: int, **kwargs: Any) -> str:
    """The tuned rule as `moe-serve` takes it."""
    found = rules.tuned_rule(name, tries, **kwargs)
    return rules.text_of(name, found.about, MoEServingVectorEnv(1, **kwargs))


def score(frame: pd.DataFrame) -> dict[str, Any]:
    """A table for each setting, and what tuning found."""
    tables: dict[str, list[dict[str, Any]]] = {}
    for setup, frame_rows in frame.groupby("setup", sort=False):
        table = tables[str(setup)] = []
        for name in frame_rows["served"].iloc[0]:
            served = [row[name] for row in frame_rows["served"]]
            returns = np.array([each["return"] for each in served])
            table.append({
                "controller": name, "return": float(returns.mean()),
                "95 %": list(mean_interval(returns)) if len(returns) > 1 else None,
                **{key: float(np.mean([each[key] for each in served])) for key in ("value", "busy", "in time")},
                "p95 ms": 1e3 * float(np.mean([each["p95"] for each in served])),
                "levels": pd.DataFrame([each["levels"] for each in served]).mean().to_dict(),
                "simulated": float(np.mean([row[name] for row in frame_rows["simulated"]])),
            })  # fmt: skip
        tables[f"{setup}: controllers"] = [
            {"controller": name, "text": text}
            for name, text in frame_rows["controllers"].iloc[0].items()
            if name != PPO
        ]
    return {"tables": tables, "notes": [
        "return: value less cost_weight times busy, of the real server. value: quality of the answers in time over "
        "all requests; busy: share of the time in the model; levels: shares of the answers in time. simulated: mean "
        "return in the environment at this load, on its test split. A seed has its own training of PPO and arrivals.",
    ]}  # fmt: skip


def plot(frame: pd.DataFrame, result: dict[str, Any], out: Path) -> list[str]:
    """Return of each controller in the server and simulated."""
    import matplotlib.pyplot as plt

    tables = {name: table for name, table in result["tables"].items() if not name.endswith(": controllers")}
    figure, axes = plt.subplots(1, len(tables), figsize=(3.5 * len(tables), 4), layout="constrained", squeeze=False)
    for axis, (name, table) in zip(axes[0], tables.items(), strict=True):
        for row in table:
            axis.plot(row["simulated"], row["return"], "o", label=row["controller"])
        axis.axline((table[0]["return"], table[0]["return"]), slope=1, color="0.7", linewidth=1)
        axis.set(title=name, xlabel="return, simulated", ylabel="return in the server")
        axis.grid(alpha=0.3)
    axes[0][-1].legend(fontsize=7)
    figure.savefig(out / "controllers.png", dpi=110)
    plt.close(figure)
    return ["controllers.png"]
