"""Does a learned controller pay in the real server? Value and latency of answers under load, beside rules.

Rules are tuned, and PPO trained, in MoEServing-v0, for a range of loads, with times of this machine. Then a server runs
with each of them. All get the same arrivals, in turns of some seconds, so that a machine that becomes slower does so
for all; the load is a share of what a server answers at most just before. Sender and servers share this machine's
processors. Run it on an otherwise idle machine.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, Self, get_args

import numpy as np
import pandas as pd
from pydantic import Field, model_validator

from agents.baselines import serving as rules
from agents.evaluate import evaluate
from benchmarks.programs.sender import HOST, Sent, run_loop, send_all, send_at
from benchmarks.programs.service import Serving, counted, predictions, service
from benchmarks.programs.tuning import VARYING, http_seconds
from benchmarks.results.statistics import seeds_interval
from benchmarks.runner.kept import found_once, run_of
from benchmarks.runner.setup import Arguments
from cost.files import sha256_of
from experts.data import DataError
from experts.serving.arrivals import arrivals
from experts.serving.control import CAPS, NEVER, RequestClass, Service
from moe_envs.serving.env import SHARES, MoEServingVectorEnv

DEFAULT, PPO = "SlackFit, not tuned", "PPO"
FULL = f"fixed:cap={CAPS[-1]}"  # the largest batches at the best level
CALIBRATION = 4.0  # seconds in which it is counted how many rows a server answers at most
SEEDS = (0, 1, 2)
SETTINGS: dict[str, dict[str, Any]] = {
    f"{trace}, {classes}, load {load}": {"trace": trace, "classes": classes, "load": load}
    for trace, classes in (("poisson", "one"), ("bursts", "one"), ("bursts", "mixed")) for load in (0.5, 0.8, 1.1)
}  # fmt: skip
QUICK = {"seeds": [0], "setups": {"short": {
    "load": 0.3, "seconds": 2, "timesteps": 64, "compared": [], "tune": 1, "episode": 1, "episodes": 2,
    "costs": "reference", "classes": "mixed",
}}}  # fmt: skip
Rule = Literal["fixed", "regression (BentoML)", "adaptive (Clipper)", "SlackFit", "plan", "thresholds", "by class"]
RULES: list[Rule] = list(get_args(Rule))
SHOWN = "lost", "busy", "in time", "refused"
ABOUT = "deadline", "value", "size", "care"  # of a class of requests, as `moe-serve` takes it


class ServingSetup(Arguments):
    """Arrivals of a `trace` ("poisson", "bursts", or a file) at this `load` for `seconds` (the test part of a file), of
    one class of requests with this `deadline` or of the environment's three ("mixed", which have their own). Servers
    take turns so many times.

    Rules are the best of twice `tune` settings, and policies are trained, on episodes of `episode` seconds. The times
    of batches are those of this machine, and a row's HTTP is added, or the shipped ones (`costs`). They vary by
    `jitter` and `slowdown`, as they do in a server whose requests take the same processor."""

    model: str = "language"
    trace: Literal["poisson", "bursts"] | str = "poisson"
    load: float = 0.8
    classes: Literal["one", "mixed"] = "one"
    deadline: float = 0.25
    cost_weight: float = 0.1
    seconds: float = 30.0
    turns: int = Field(default=3, ge=1)
    compared: list[Rule] = RULES
    tune: int = rules.TRIES
    timesteps: int | None = None
    episode: float = 8.0
    episodes: int = 256
    costs: Literal["machine", "reference"] = "machine"
    jitter: float = VARYING["jitter"]
    slowdown: tuple[float, float] = VARYING["slowdown"]

    @model_validator(mode="after")
    def _without_effect(self) -> Self:
        """Reset fields that have no effect, so that equal rows compare equal."""
        if self.classes == "mixed":
            self.deadline = type(self).model_fields["deadline"].default
        return self


Setup = ServingSetup


def measure(setup: ServingSetup, seed: int, split: str, folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """What each controller is worth in the environment's test split and in the server."""
    measured, overhead = setup.costs == "machine", 0.0
    if measured:
        place = folder / f"http-{sha256_of(setup.model.encode())[:8]}.json"
        overhead = found_once(place, lambda: {"s": http_seconds(setup.model)})["s"]
    kwargs: dict[str, Any] = {
        "trace": setup.trace, "classes": setup.classes, "deadline": setup.deadline, "cost_weight": setup.cost_weight,
        "seconds": setup.episode, "model": setup.model, "costs": setup.costs, "overhead": overhead,
        "jitter": setup.jitter, "slowdown": setup.slowdown,
    }  # fmt: skip
    env = MoEServingVectorEnv(1, **kwargs)
    known = rules.families(env)
    controllers = {DEFAULT: "slackfit"}
    controllers |= {name: tuned_text(name, setup.tune, folder, kwargs) for name in setup.compared if name in known}
    controllers[PPO] = f"policy:{run_of(folder, rules.ID, kwargs, seed, setup.timesteps)}"
    simulated = {name: _simulated(text, env, setup, kwargs) for name, text in controllers.items()}
    found = _served(controllers, setup, env, np.random.default_rng(seed))
    decided = {"simulated": simulated, "controllers": {name: text for name, text in controllers.items() if name != PPO}}
    times = found | {"overhead_s": overhead}
    return ({}, times | decided) if measured else (decided, times)


def _simulated(text: str, env: MoEServingVectorEnv, setup: ServingSetup, kwargs: dict[str, Any]) -> float:
    from agents.deploy.serving import controller_of

    rule = rules.ServingRule(lambda env: controller_of(text)(env.choices, env.service, env.classes))
    given = kwargs | {"load": setup.load, "split": "test"}
    return float(evaluate(rule, rules.ID, setup.episodes, 0, **given)["return"].mean())


def _served(
    controllers: dict[str, str], setup: ServingSetup, env: MoEServingVectorEnv, generator: np.random.Generator
) -> dict[str, Any]:
    """What a server answers at most, in rows a second; then for each controller: value that is lost, share of the time
    in the model, latencies and levels."""
    rows, length = _most(setup, env), setup.seconds / setup.turns
    rate = setup.load * rows / float(np.array(SHARES[setup.classes]) @ [each.size for each in env.classes])
    times = arrivals(setup.trace, rate, setup.seconds, generator, "test")
    of_class, raw = _requests(setup, env, len(times), generator)
    sent: dict[str, list[Sent]] = {name: [] for name in controllers}
    busy = dict.fromkeys(controllers, 0.0)
    with ExitStack() as running:
        servers = {
            name: running.enter_context(service(setup.model, "--controller", text, *_options(env.classes)))
            for name, text in controllers.items()
        }
        for turn in range(setup.turns):
            now = np.flatnonzero(np.minimum(times // length, setup.turns - 1) == turn)
            asked = times[now] - turn * length, [raw[each] for each in now]
            for name in np.roll(list(servers), -turn):
                port = servers[name].port
                run_loop(send_all(raw, 1.0, HOST, port, connections=4))
                before = run_loop(counted(port))
                sent[name].append(run_loop(send_at(*asked, HOST, port)))
                busy[name] += run_loop(counted(port)) - before
                _check(name, servers[name], sent[name][-1])
    about = of_class, env.classes, env.service, setup.cost_weight
    served = {name: outcome(joined(each), *about, busy[name] / setup.seconds) for name, each in sent.items()}
    return {"served": served, "rows_per_s": {"server": rows, "profile": env.capacity}}


def _most(setup: ServingSetup, env: MoEServingVectorEnv) -> float:
    """Rows a second that a server answers which always has more requests than it can take, and whose users wait."""
    _, raw = _requests(setup, env, 1000, np.random.default_rng(0))
    patient = [replace(each, deadline=NEVER) for each in env.classes]
    with service(setup.model, "--controller", FULL, *_options(patient)) as server:
        run_loop(send_all(raw, 1.0, HOST, server.port, connections=4))
        sent = run_loop(send_all(raw, min(CALIBRATION, setup.seconds), HOST, server.port, connections=2 * CAPS[-1]))
        _check(FULL, server, sent)
    answers = [answer for answer, status in zip(sent.answers, sent.status, strict=True) if status == 200]
    return sum(len(json.loads(each)["predictions"]) for each in answers) / sent.seconds


def _check(name: str, server: Serving, sent: Sent) -> None:
    """Raise `DataError` where answers are neither predictions nor refusals, or the controller failed."""
    strange = sorted(set(sent.status.tolist()) - {200, 429, 504})
    if strange or run_loop(counted(server.port, "moe_controller_failures_total")):
        raise DataError(f"the server with {name} failed, statuses {strange}: {''.join(server.said)}")


def _requests(
    setup: ServingSetup, env: MoEServingVectorEnv, count: int, generator: np.random.Generator
) -> tuple[np.ndarray, list[bytes]]:
    """Requests and their classes, drawn as in the environment."""
    of_class = generator.choice(len(env.classes), count, p=SHARES[setup.classes])
    asked = [predictions(setup.model, each.size, each.name) for each in env.classes]
    return of_class, [asked[each][number % len(asked[each])] for number, each in enumerate(of_class)]


def _options(classes: Sequence[RequestClass]) -> list[str]:
    """Classes of requests as `moe-serve` takes them."""
    return [f"--class={each.name}:{','.join(f'{key}={getattr(each, key)}' for key in ABOUT)}" for each in classes]


def joined(parts: Sequence[Sent]) -> Sent:
    """What was sent in several turns, as one."""
    latency, status = (np.concatenate([getattr(each, name) for each in parts]) for name in ("latency", "status"))
    return Sent(latency, status, [one for each in parts for one in each.answers], sum(each.seconds for each in parts))


def outcome(
    sent: Sent, of_class: np.ndarray, classes: Sequence[RequestClass], known: Service, cost_weight: float, busy: float
) -> dict[str, Any]:
    """What answers to requests of these classes `[N]` are worth, as in MoEServing-v0, when the model ran a share `busy`
    of the time; and their P95 latencies."""
    deadline, value, care = (
        np.array([getattr(each, name) for each in classes])[of_class] for name in ("deadline", "value", "care")
    )
    answered = sent.status == 200
    fine = answered & (sent.latency <= deadline)
    level = np.array([known.levels.index(json.loads(each)["level"]) if good else 0
                      for each, good in zip(sent.answers, answered, strict=True)])  # fmt: skip
    worth = value * (1 - care * (1 - known.quality[level])).clip(0) * fine
    lost = 1 - float(worth.sum() / value.sum())
    latencies = {each.name: sent.latency[answered & (of_class == number)] for number, each in enumerate(classes)}
    counts = np.bincount(level[fine], minlength=len(known.levels))
    return {
        "return": -lost - cost_weight * busy, "lost": lost, "busy": busy, "in time": float(fine.mean()),
        "refused": float((sent.status == 429).mean()),
        "p95": {name: float(np.percentile(found, 95)) if len(found) else None for name, found in latencies.items()},
        "levels": dict(zip(known.levels, (counts / max(1, fine.sum())).tolist(), strict=True)),
    }  # fmt: skip


def tuned_text(name: str, tries: int, folder: Path, kwargs: dict[str, Any]) -> str:
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
                "95 %": list(seeds_interval(returns)) if len(returns) > 1 else None,
                **{key: float(np.mean([each[key] for each in served])) for key in SHOWN},
                "p95 ms": _said({name: f"{1e3 * each:.0f}" for name, each in _means(served, "p95").items()}),
                "levels": _said({name: f"{each:.0%}" for name, each in _means(served, "levels").items()}),
                "simulated": float(np.mean([row[name] for row in frame_rows["simulated"]])),
            })  # fmt: skip
        tables[f"{setup}: rows a second at most"] = [
            {"seed": row["seed"], **row["rows_per_s"]} for _, row in frame_rows.iterrows()
        ]
        tables[f"{setup}: controllers"] = [
            {"controller": name, "text": text}
            for name, text in frame_rows["controllers"].iloc[0].items()
            if name != PPO
        ]
    return {"tables": tables, "notes": [
        "return: minus the lost value and cost_weight times busy, of the real server. lost: share of the requests' "
        "value that late, refused and worse answers lose; busy: share of the time in the model; refused: share of the "
        "requests for which too many came before them, of which the environment knows nothing; levels: shares of the "
        "answers in time; p95: latency of what was answered, by class. simulated: mean return in the environment at "
        "this load, on its test split, where HTTP counts as time of the model. A seed has its own training of PPO and "
        "arrivals.",
    ]}  # fmt: skip


def _means(served: list[dict[str, Any]], key: str) -> dict[str, float]:
    found = pd.DataFrame([each[key] for each in served]).mean()
    return dict(zip(found.index.astype(str), found.tolist(), strict=True))


def _said(parts: dict[str, str]) -> str:
    return ", ".join(f"{name} {value}" for name, value in parts.items())


def plot(frame: pd.DataFrame, result: dict[str, Any], out: Path) -> list[str]:
    """Return of each controller in the server and simulated."""
    import matplotlib.pyplot as plt
    from matplotlib.lines import Line2D

    tables = {name: result["tables"][name] for name in frame["setup"].unique()}
    columns = min(3, len(tables))
    rows = -(-len(tables) // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(4 * columns, 4 * rows), layout="constrained", squeeze=False)
    names = list(dict.fromkeys(row["controller"] for table in tables.values() for row in table))
    for axis, (title, table) in zip(axes.flat, tables.items(), strict=False):
        for row in table:
            name = row["controller"]
            axis.plot(row["simulated"], row["return"], "o", color=f"C{names.index(name)}")
        axis.axline((table[0]["return"], table[0]["return"]), slope=1, color="0.7", linewidth=1)
        axis.set(title=title, xlabel="return, simulated", ylabel="return in the server")
        axis.grid(alpha=0.3)
    dots = [Line2D([], [], marker="o", linestyle="", color=f"C{number}") for number in range(len(names))]
    figure.legend(dots, names, loc="outside lower center", ncols=columns + 1, fontsize=8)
    figure.savefig(out / "controllers.png", dpi=110)
    plt.close(figure)
    return ["controllers.png"]
