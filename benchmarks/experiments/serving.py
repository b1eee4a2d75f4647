"""Does a learned controller pay in the real server? Value and latency of answers under load, beside rules.

Rules are tuned, and PPO trained, in MoEServing-v0, for a range of loads, with times of this machine. Then `moe-serve`
runs with each of them, in turns, and gets the same arrivals at a given load; sender and server share this machine's
processors. Run it on an otherwise idle machine.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
import pandas as pd

from agents.baselines import serving as rules
from agents.evaluate import evaluate
from benchmarks.programs.sender import HOST, run_loop, send_all, send_at
from benchmarks.programs.service import busy_seconds, predictions, service
from benchmarks.programs.tuning import http_seconds
from benchmarks.results.statistics import mean_interval
from benchmarks.runner.kept import found_once, run_of
from benchmarks.runner.setup import Arguments
from cost.files import sha256_of
from experts.serving.arrivals import arrivals
from moe_envs.serving.env import SHARES, MoEServingVectorEnv

DEFAULT, PPO = "SlackFit, not tuned", "PPO"
SEEDS = (0, 1, 2)
SETTINGS: dict[str, dict[str, Any]] = {
    f"{trace}, {classes}, load {load}": {"trace": trace, "classes": classes, "load": load}
    for trace, classes in (("poisson", "one"), ("bursts", "one"), ("bursts", "mixed")) for load in (0.5, 0.8, 1.1)
}  # fmt: skip
QUICK = {"seeds": [0], "setups": {"short": {
    "load": 0.3, "seconds": 2, "timesteps": 64, "compared": [], "tune": 2, "episode": 1, "episodes": 2,
    "costs": "reference", "classes": "mixed",
}}}  # fmt: skip
Rule = Literal["fixed", "regression (BentoML)", "adaptive (Clipper)", "SlackFit", "plan", "thresholds", "by class"]
RULES: list[Rule] = list(get_args(Rule))
ABOUT = "deadline", "value", "size", "care"  # of a class of requests, as `moe-serve` takes it


class ServingSetup(Arguments):
    """Arrivals of a `trace` ("poisson", "bursts", or a file) at this `load` for `seconds` (the test part of a file).
    Rules are the best of twice `tune` settings, and policies are trained, on episodes of `episode` seconds at `costs`,
    of this machine with HTTP included."""

    model: str = "language"
    trace: Literal["poisson", "bursts"] | str = "poisson"
    load: float = 0.8
    classes: Literal["one", "mixed"] = "one"
    deadline: float = 0.25
    cost_weight: float = 0.1
    seconds: float = 30.0
    compared: list[Rule] = RULES
    tune: int = rules.TRIES
    timesteps: int | None = None
    episode: float = 8.0
    episodes: int = 256
    costs: Literal["machine", "reference"] = "machine"


Setup = ServingSetup


def measure(setup: ServingSetup, seed: int, split: str, folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """What each controller is worth in the environment's test split and in the server."""
    overhead = 0.0
    if setup.costs == "machine":
        overhead = found_once(folder / f"http-{_name(setup.model)}.json", lambda: {"s": http_seconds(setup.model)})["s"]
    kwargs: dict[str, Any] = {
        "trace": setup.trace, "classes": setup.classes, "deadline": setup.deadline, "cost_weight": setup.cost_weight,
        "seconds": setup.episode, "model": setup.model, "costs": setup.costs, "overhead": overhead,
    }  # fmt: skip
    env = MoEServingVectorEnv(1, **kwargs)
    known = rules.families(env)
    controllers = {DEFAULT: "slackfit"}
    controllers |= {name: _tuned(name, setup.tune, folder, kwargs) for name in setup.compared if name in known}
    controllers[PPO] = f"policy:{run_of(folder, rules.ID, kwargs, seed, setup.timesteps)}"
    simulated = {name: _simulated(text, env, setup, kwargs) for name, text in controllers.items()}
    sent = _requests(setup, env, np.random.default_rng(seed))
    found = {name: _served(text, setup, sent, env) for name, text in controllers.items()}
    named = {name: text for name, text in controllers.items() if name != PPO}
    return {"simulated": simulated, "controllers": named}, {"served": found}


def _simulated(text: str, env: MoEServingVectorEnv, setup: ServingSetup, kwargs: dict[str, Any]) -> float:
    from agents.deploy.serving import controller_of

    rule = rules.ServingRule(lambda env: controller_of(text)(env.choices, env.service, env.classes))
    given = kwargs | {"load": setup.load, "split": "test"}
    return float(evaluate(rule, rules.ID, setup.episodes, 0, **given)["return"].mean())


class Requests(NamedTuple):
    """Times at which requests should be sent, their classes, and what is sent."""

    times: np.ndarray
    of_class: np.ndarray
    raw: list[bytes]


def _requests(setup: ServingSetup, env: MoEServingVectorEnv, generator: np.random.Generator) -> Requests:
    """Arrivals at the load, in rows, of requests whose classes are drawn as in the environment."""
    shares = np.array(SHARES[setup.classes])
    rate = setup.load * env.capacity / float(shares @ [each.size for each in env.classes])
    times = arrivals(setup.trace, rate, setup.seconds, generator, "test")
    of_class = generator.choice(len(shares), len(times), p=shares)
    asked = [predictions(setup.model, each.size, each.name) for each in env.classes]
    raw = [asked[each][number % len(asked[each])] for number, each in enumerate(of_class)]
    return Requests(times, of_class, raw)


def _served(text: str, setup: ServingSetup, asked: Requests, env: MoEServingVectorEnv) -> dict[str, Any]:
    """Value that is lost, share of the time in the model, latencies and levels."""
    options = [
        f"--class={each.name}:{','.join(f'{key}={getattr(each, key)}' for key in ABOUT)}" for each in env.classes
    ]
    with service(setup.model, "--controller", text, *options) as server:
        run_loop(send_all(asked.raw, 1.0, HOST, server.port, connections=4))
        before = run_loop(busy_seconds(server.port))
        sent = run_loop(send_at(asked.times, asked.raw, HOST, server.port))
        busy = (run_loop(busy_seconds(server.port)) - before) / setup.seconds
    deadlines = np.array([each.deadline for each in env.classes])[asked.of_class]
    fine = (sent.status == 200) & (sent.latency <= deadlines)
    level = np.array([env.service.levels.index(json.loads(each)["level"]) if good else 0
                      for each, good in zip(sent.answers, fine, strict=True)])  # fmt: skip
    whole = np.array([each.value for each in env.classes])[asked.of_class].sum()
    lost = 1 - float((env.value[asked.of_class, level] * fine).sum() / whole)
    return {
        "return": -lost - setup.cost_weight * busy, "lost": lost, "busy": busy, "in time": float(fine.mean()),
        "p95": [float(np.percentile(sent.latency[asked.of_class == number], 95)) for number in range(len(env.classes))],
        "levels": dict(zip(env.service.levels, _shares(level[fine], len(env.service.levels)), strict=True)),
    }  # fmt: skip


def _shares(found: np.ndarray, count: int) -> list[float]:
    return (np.bincount(found, minlength=count) / max(1, len(found))).tolist()


def _name(model: str) -> str:
    return sha256_of(model.encode())[:8]


def _tuned(name: str, tries: int, folder: Path, kwargs: dict[str, Any]) -> str:
    """The tuned rule as `moe-serve` takes it."""

    def search() -> dict[str, Any]:
        found = rules.tuned_rule(name, tries, **kwargs)
        return {"rule": rules.text_of(name, found.about, MoEServingVectorEnv(1, **kwargs))}

    said = json.dumps([name, tries, kwargs], sort_keys=True)
    return str(found_once(folder / f"rule-{sha256_of(said.encode())[:16]}.json", search)["rule"])


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
                **{key: float(np.mean([each[key] for each in served])) for key in ("lost", "busy", "in time")},
                "p95 ms": (1e3 * np.mean([each["p95"] for each in served], axis=0)).round().tolist(),
                "levels": pd.DataFrame([each["levels"] for each in served]).mean().to_dict(),
                "simulated": float(np.mean([row[name] for row in frame_rows["simulated"]])),
            })  # fmt: skip
        tables[f"{setup}: controllers"] = [
            {"controller": name, "text": text}
            for name, text in frame_rows["controllers"].iloc[0].items()
            if name != PPO
        ]
    return {"tables": tables, "notes": [
        "return: minus the lost value and cost_weight times busy, of the real server. lost: share of the requests' "
        "value that late, refused and worse answers lose; busy: share of the time in the model; levels: shares of the "
        "answers in time. simulated: mean return in the environment at this load, on its test split. A seed has its "
        "own training of PPO and arrivals.",
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
