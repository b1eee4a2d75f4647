"""Do the default settings of routing win on data that nobody tuned them on?

A mixture of experts is built for each data set by `experts.bundle.build`, with its defaults, and PPO has its own. Each
rule is tuned on the validation split of each data set and cost weight; the best one on validation counts.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from agents import training, tuned
from agents.baselines import find
from agents.evaluate import evaluate
from benchmarks.experiments.unseen.sources import SEEN, UNSEEN
from benchmarks.results.statistics import paired_difference
from benchmarks.runner.setup import Arguments
from cost.files import locked
from experts import bundle as bundles
from experts import zoo
from experts.reference_bundles import Shipped

ENV = "moe_envs:MoERouting-v0"
WEIGHTS = (0.1, 0.2, 0.4)
BY_ESTIMATES = "(estimates)"  # in the names of rules that plan by the estimates
ZERO_SHOT = "one PPO for all"  # trained on the bundles that were looked at, never on the one that it is judged on
KINDS: dict[str, dict[str, Any]] = {
    "PPO": {},
    ZERO_SHOT: {
        "settings": {
            "learning_rate": "linear 3e-4",
            "policy_kwargs": {"net_arch": [64, 64], "residual": True, "equivariant": True},
        }
    },
    "PPO on features": {"env": {"observation": "features"}, "settings": {"total_timesteps": 1_500_000}},
}
SEEDS = (0, 1, 2, 3, 4)
SETTINGS: dict[str, Any] = {
    f"{name}, {kind}": {"data": name, "kind": kind}
    for kind in ("rules", *KINDS) for name in (*SEEN, *UNSEEN) if kind != ZERO_SHOT or name in UNSEEN
}  # fmt: skip
QUICK = {
    "seeds": [0, 1],
    "setups": {f"wine, {kind}": {"data": "wine", "kind": kind} for kind in ("rules", "PPO")},
    "settings": {"timesteps": 4096, "episodes": 50, "tuning": 100, "cost_weights": [0.2]},
}


class UnseenSetup(Arguments):
    """`kind` is `rules`, whose parameters are chosen on `tuning` validation episodes, or a learner; `timesteps`
    overrides the default, `episodes` are played on test."""

    data: str
    kind: Literal["rules", "PPO", "one PPO for all", "PPO on features"]
    cost_weights: list[float] = list(WEIGHTS)
    episodes: int = 1000
    tuning: int = 1000
    timesteps: int | None = None


Setup = UnseenSetup


def check(setups: dict[str, UnseenSetup], splits: list[str]) -> None:
    """Raise `ValueError` for an unknown data set."""
    for setup in setups.values():
        if setup.data not in {**SEEN, **UNSEEN}:
            raise ValueError(f"data={setup.data!r} is not one of {', '.join((*SEEN, *UNSEEN))}")
        if setup.kind == ZERO_SHOT and setup.data in SEEN:
            raise ValueError(f"kind={ZERO_SHOT!r} is trained on {setup.data}: judge it on another one")


def once(setup: UnseenSetup) -> bool:
    """Whether the result is the same for all seeds."""
    return setup.kind == "rules"


def measure(setup: UnseenSetup, seed: int, split: str, folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Returns on test at each cost weight: those of a learner, or of the best rules on validation and the bound."""
    bundle = _bundle(setup.data, folder)
    found = {}
    for weight in setup.cost_weights:
        env_kwargs = {"bundle": str(bundle.path), "cost_weight": weight}
        if setup.kind == "rules":
            found[str(weight)] = _rules(setup, env_kwargs)
        elif setup.kind == ZERO_SHOT:
            policy = _shared(setup, seed, folder).on(ENV, env_kwargs)
            found[str(weight)] = {"returns": _played(policy, setup, env_kwargs)}
        else:
            found[str(weight)] = _learner(setup, env_kwargs, seed)
    accuracy = {name: bundle.metadata["accuracy"][f"test/{name}"] for name in ("top-2", "linear")}
    return {"at": found, "accuracy": accuracy, "rows": bundle.metadata["rows"]}, {}


def score(frame: pd.DataFrame) -> dict[str, Any]:
    """PPO's difference to the best rule for each data set and cost weight, wins, ties and losses."""
    rows, rules = [], frame[frame["kind"] == "rules"]
    for _, rule_row in rules.iterrows():
        group = frame[frame["data"] == rule_row["data"]]
        for weight, rule in rule_row["at"].items():
            row = {
                "data": rule_row["data"], "looked at": rule_row["data"] in SEEN, "cost weight": float(weight),
                "best rule": rule["all"]["name"], "its return": float(np.mean(rule["all"]["returns"])),
                "best rule without estimates": rule["plain"]["name"],
                "return without": float(np.mean(rule["plain"]["returns"])), "bound": rule["bound"],
            }  # fmt: skip
            for kind in KINDS:
                runs = [each["at"][weight] for each in group[group["kind"] == kind].to_dict("records")]
                if not runs:
                    continue
                ours = np.array([run["returns"] for run in runs])
                difference, interval = paired_difference(ours, np.array(rule["all"]["returns"]))
                row |= {kind: float(ours.mean()), f"{kind} - best": difference, f"{kind} - best, 95 %": interval}
                difference, interval = paired_difference(ours, np.array(rule["plain"]["returns"]))
                row |= {f"{kind} - plain": difference, f"{kind} - plain, 95 %": interval}
            rows.append(row)
    return {"tables": {"Returns on test": rows, "Wins, ties, losses": _tally(rows)}}


def plot(frame: pd.DataFrame, result: dict[str, Any], out: Path) -> list[str]:
    """Plot the differences with their intervals."""
    rows = [row for row in result["tables"]["Returns on test"] if "PPO - best" in row]
    if not rows:
        return []
    figure = Figure((11, 0.22 * len(rows) + 1.5), layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    labels = [f"{row['data']}, {row['cost weight']}" for row in rows]
    for axis, against, title in zip(
        axes, ("best", "plain"), ("the best rule", "the best rule without estimates"), strict=True
    ):
        for number, kind in enumerate(KINDS):
            shift, colour = 0.2 * (number - 1), f"C{number}"
            shown = [(place, row) for place, row in enumerate(rows) if f"{kind} - {against}" in row]
            if not shown:
                continue
            middle = np.array([row[f"{kind} - {against}"] for _, row in shown])
            low, high = np.array([row[f"{kind} - {against}, 95 %"] for _, row in shown]).T.reshape(2, -1)
            places = [place + shift for place, _ in shown]
            axis.errorbar(middle, places, xerr=[middle - low, high - middle], fmt="o", ms=3, color=colour, label=kind)
        axis.axvline(0, color="grey", lw=0.8)
        axis.set(xlabel=f"return less that of {title}")
    axes[0].set_yticks(range(len(rows)), labels, fontsize=7)
    axes[0].invert_yaxis()
    axes[1].legend()
    figure.savefig(out / "unseen.png", dpi=120)
    return ["unseen.png"]


def _bundle(name: str, folder: Path) -> bundles.Bundle:
    """The bundle of a data set, built once for all runs, with the shipped costs of experts of the same widths."""
    profile = Shipped(zoo.ASSETS / "fashion-mnist" / bundles.PROFILE)
    place = folder / "bundles" / name
    with locked(folder / "building" / name):
        if not place.exists():
            inputs, labels = {**SEEN, **UNSEEN}[name]()
            bundles.build(name, inputs, labels, folder=place.parent, profile=lambda *_: profile, progress=False)
    return bundles.load(place)


def _rules(setup: UnseenSetup, env_kwargs: dict[str, Any]) -> dict[str, Any]:
    module = find(ENV)
    found = module.baselines(ENV, report=lambda share: None, episodes=setup.tuning, **env_kwargs)

    def mean(policy: Any) -> float:
        return float(evaluate(policy, ENV, setup.episodes, split="validation", **env_kwargs)["return"].mean())

    judged = {name: mean(policy) for name, policy in found.items()}
    plain = {name: value for name, value in judged.items() if BY_ESTIMATES not in name}
    best = {}
    for kind, among in (("all", judged), ("plain", plain)):
        name = max(among, key=among.__getitem__)
        best[kind] = {"name": name, "returns": _played(found[name], setup, env_kwargs)}
    bound = float(np.mean(_played(module.bound(ENV, **env_kwargs), setup, env_kwargs)))
    return best | {"bound": bound, "validation": judged}


def _shared(setup: UnseenSetup, seed: int, folder: Path) -> Any:
    """One policy for all bundles and cost weights, trained once for each seed."""
    from agents.ppo import PPO

    seen = ["digits", "fashion-mnist", *(str(_bundle(name, folder).path) for name in SEEN)]
    place = folder / "shared" / f"seed{seed}-{setup.timesteps or 'default'}"
    with locked(place):
        if not place.exists():
            env_kwargs = {"bundle": seen, "cost_weight": list(WEIGHTS)}
            _trained(setup, env_kwargs, seed).agent.save(place)
    return PPO.load(place)


def _learner(setup: UnseenSetup, env_kwargs: dict[str, Any], seed: int) -> dict[str, Any]:
    env_kwargs = env_kwargs | KINDS[setup.kind].get("env", {})
    trained = _trained(setup, env_kwargs, seed)
    curve = [look.score for look in trained.curve]
    return {"returns": _played(trained.agent, setup, env_kwargs), "curve": curve}


def _trained(setup: UnseenSetup, env_kwargs: dict[str, Any], seed: int) -> training.Trained:
    settings = tuned.settings("ppo", ENV, **KINDS[setup.kind].get("settings", {}))
    settings |= {"total_timesteps": setup.timesteps} if setup.timesteps else {}
    return training.train(ENV, "ppo", seed=seed, env_kwargs=env_kwargs, settings=settings)


def _played(policy: Any, setup: UnseenSetup, env_kwargs: dict[str, Any]) -> list[float]:
    frame = evaluate(policy, ENV, setup.episodes, seed=10**6, split="test", **env_kwargs)
    return [round(value, 5) for value in frame["return"].tolist()]


def _tally(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Wins, ties and losses on data that was not looked at, and the mean difference over data sets and weights."""
    found, rows = [], [row for row in rows if not row["looked at"]]
    for kind in KINDS:
        for against, name in (("best", "the best rule"), ("plain", "the best rule without estimates")):
            key = f"{kind} - {against}"
            intervals = [row[f"{key}, 95 %"] for row in rows if key in row]
            if not intervals:
                continue
            wins, losses = sum(low > 0 for low, _ in intervals), sum(high < 0 for _, high in intervals)
            found.append({
                "learner": kind, "against": name, "wins": wins, "ties": len(intervals) - wins - losses,
                "losses": losses, "mean difference": float(np.mean([row[key] for row in rows if key in row])),
            })  # fmt: skip
    return found
