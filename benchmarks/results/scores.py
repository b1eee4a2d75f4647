"""Leaderboard scores, normalised between the best baseline and the bound, with intervals over seeds.

Tasks of one unit are scored by their mean and share one best baseline, the one with the best mean on validation.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from benchmarks.results import pareto
from benchmarks.results.statistics import (
    bootstrap_interval,
    iqm,
    normalized_score,
    probability_of_improvement,
    seeds_interval,
)

BASELINES, BOUND = "baselines", "bound"
Row = dict[str, Any]


class Verdict(NamedTuple):
    """Result of a policy in a task: scores on validation and test (higher is better), and cost and quality on test.

    `beside_bound` is the score on the test episodes of the bound, if the bound does not cover all test episodes.
    """

    validation: float | None
    test: float
    quality: float
    cost: float
    beside_bound: float | None = None

    @property
    def scored(self) -> float:
        """Score that is compared with the bound."""
        return self.test if self.beside_bound is None else self.beside_bound


def score(
    frame: pd.DataFrame, env: str, reference: tuple[float, float], unit: Callable[[str], str],
    group: Callable[[str], str],
) -> Row:  # fmt: skip
    """Verdicts per task; per learner the normalised score over all tasks, the probability of improvement over the best
    baseline and the other learners, and the training needed to beat that baseline on validation.

    `unit` names the unit of a task, `group` its cost-quality plane.
    """
    frame = _told_apart(frame)
    tables = _tables(frame)
    units: dict[str, list[str]] = {}
    for task in tables.tasks:
        units.setdefault(unit(task), []).append(task)
    best = {task: _best(tables, several) for several in units.values() for task in several}
    bounds = {task: found[0].scored for task, (_, found) in tables.of(BOUND).items()}
    tasks = [
        {
            "task": task, "best_baseline": best[task], "bound": bounds.get(task),
            "policies": [_line(name, found[task][1], tables.kinds[name], _test_of(tables, best[task], task))
                         for name, found in tables.verdicts.items() if task in found],
        }
        for task in tables.tasks
    ]  # fmt: skip
    learned = [name for name in tables.verdicts if tables.kinds[name] == "learned"]
    rows: list[Row] = []
    for name in learned:
        mine = [unit for unit, several in units.items() if _means(tables, name, several)]
        scored, names = _normalized(tables, name, units, best)
        trained = {seed for seeds, _ in tables.of(name).values() for seed in seeds}
        row: Row = {"policy": name, "seeds": len(scored) or len(trained), "scored": names, "of": len(mine)}
        if scored.size:
            trainings = [tables.tasks[units[unit][0]] for unit in names]
            row |= {"normalized": scored.mean(0).tolist(), "iqm": iqm(scored)}
            row["iqm_ci95"] = bootstrap_interval(scored, trainings=trainings)
        row["over_baseline"] = _improvement(tables, name, units, best)
        others: dict[str, dict[str, str | None]] = {
            other: dict.fromkeys(tables.tasks, other) for other in learned if other != name
        }
        row["over"] = {other: _improvement(tables, name, units, of_task) for other, of_task in others.items()}
        rows.append(row | {"beats": _beats(frame, name, tables, best)})
    usual = {"timesteps", "episodes"} & set(frame)
    settings: Row = {key: sorted(set(frame[key].dropna().astype(int).tolist())) for key in sorted(usual)}
    if "env" in frame:
        settings["env"] = [f"{key}={value}" for key, value in frame["env"].iloc[0].items()]
    return {"env": env, "settings": settings, "rows": rows, "tasks": tasks,
            "reference_point": list(reference), "hypervolume": _volumes(tables, reference, group)}  # fmt: skip


def _volumes(tables: _Tables, reference: tuple[float, float], group: Callable[[str], str]) -> Row:
    """Hypervolumes of (cost, quality) per group, for policies with results in all of its tasks."""
    groups: dict[str, list[str]] = {}
    for task in tables.tasks:
        groups.setdefault(group(task), []).append(task)
    return {
        group: {
            name: pareto.hypervolume(_points([found[task][1] for task in tasks]), reference)
            for name, found in tables.verdicts.items()
            if all(task in found for task in tasks)
        }
        for group, tasks in groups.items()
    }


def _beats(frame: pd.DataFrame, name: str, tables: _Tables, best: dict[str, str | None]) -> list[Row]:
    """Training steps and CPU seconds per split until the mean validation score exceeds that of the best baselines:
    medians over the seeds that succeed, and their number."""
    rows: list[Row] = []
    if "curve" not in frame:
        return rows
    for split, part in frame[(frame["setup"] == name) & frame["curve"].notna()].groupby("split", sort=False):
        (mine,) = part["policies"].iloc[0].values()
        baselines = [(best[task], task) for task in mine]
        if any(each is None for each, _ in baselines):
            continue
        target = float(np.mean([tables.of(str(each))[task][1][0].validation for each, task in baselines]))
        found = []
        for curve, cpu, wall in zip(part["curve"], part["train_s"], part["train_wall_s"], strict=True):
            above = [place for place, point in enumerate(curve) if point["validation"] > target]
            found += [(curve[above[0]]["steps"], cpu[above[0]], wall[above[0]])] if above else []
        steps, seconds, wall_s = np.median(found, axis=0).tolist() if found else (None, None, None)
        whole = float(np.median([each[-1] for each in part["train_s"]]))
        rows.append({"split": str(split), "target": target, "steps": steps, "cpu_s": seconds, "wall_s": wall_s,
                     "seeds": len(found), "of": len(part), "whole_cpu_s": whole})  # fmt: skip
    return rows


class _Tables(NamedTuple):
    """Verdicts by policy, task and seed; kinds of the policies; ordered tasks and their splits."""

    verdicts: dict[str, dict[str, tuple[list[int], list[Verdict]]]]
    kinds: dict[str, str]
    tasks: dict[str, str]

    def of(self, name: str) -> dict[str, tuple[list[int], list[Verdict]]]:
        """Verdicts of a policy by task."""
        return self.verdicts.get(name, {})


def _tables(frame: pd.DataFrame) -> _Tables:
    verdicts: dict[str, dict[str, tuple[list[int], list[Verdict]]]] = {}
    kinds: dict[str, str] = {}
    splits: dict[str, str] = {}
    for _, row in frame.iterrows():
        kind = {BASELINES: "baseline", BOUND: "bound"}.get(str(row["policy"]), "learned")
        for name, tasks in row["policies"].items():
            key = str(row["setup"]) if kind == "learned" else name
            kinds[key] = kind
            for task, found in tasks.items():
                splits.setdefault(task, str(row["split"]))
                seeds, several = verdicts.setdefault(key, {}).setdefault(task, ([], []))
                seeds.append(int(row["seed"]))
                several.append(Verdict(**found))
    return _Tables(verdicts, kinds, splits)


def _told_apart(frame: pd.DataFrame) -> pd.DataFrame:
    """Rename learners that have the name of a baseline."""
    of_rules = frame["policy"].isin([BASELINES, BOUND])
    rules = {name for policies in frame[of_rules]["policies"] for name in policies}
    return frame.assign(setup=frame["setup"].mask(~of_rules & frame["setup"].isin(rules), frame["setup"] + ", learned"))


def _means(
    tables: _Tables, name: str, tasks: list[str], value: Callable[[Verdict], float] = lambda verdict: verdict.scored
) -> dict[int, float]:
    """Mean of `value` over the tasks of a policy by seed, for seeds with results in all tasks."""
    values = [
        dict(zip(seeds, map(value, verdicts), strict=True))
        for seeds, verdicts in (tables.of(name).get(task, ([], [])) for task in tasks)
    ]
    common = [seed for seed in values[0] if all(seed in of_task for of_task in values)]
    return {seed: float(np.mean([of_task[seed] for of_task in values])) for seed in common}


def _best(tables: _Tables, tasks: list[str]) -> str | None:
    """Baseline with the best mean validation score over tasks; ties go to the last one, since boards list stronger
    rules later."""
    known = {
        name: (*means.values(), place)
        for place, name in enumerate(tables.verdicts)
        if tables.kinds[name] == "baseline"
        and (means := _means(tables, name, tasks, lambda verdict: _known(verdict.validation)))
    }
    return max(known, key=known.__getitem__) if known else None


def _known(validation: float | None) -> float:
    assert validation is not None, "a baseline is chosen by its score on validation"
    return validation


def _test_of(tables: _Tables, name: str | None, task: str) -> float | None:
    return None if name is None else tables.of(name)[task][1][0].test


def _line(name: str, verdicts: list[Verdict], kind: str, base: float | None) -> Row:
    tests = np.array([each.test for each in verdicts])
    means = {key: float(np.mean([getattr(each, key) for each in verdicts])) for key in ("test", "quality", "cost")}
    known = [each.validation for each in verdicts if each.validation is not None]
    row: Row = {"policy": name, "kind": kind, "seeds": len(tests), **means, "test_ci95": seeds_interval(tests),
                "validation": float(np.mean(known)) if known else None}  # fmt: skip
    if base is not None and kind == "learned":
        row |= {"over": float(tests.mean() - base), "over_ci95": seeds_interval(tests - base)}
    return row


def _normalized(
    tables: _Tables, name: str, units: dict[str, list[str]], best: dict[str, str | None]
) -> tuple[np.ndarray, list[str]]:
    """Normalised scores `[seeds, units]` and the units, restricted to units whose bound exceeds the baseline and to
    seeds common to all of them."""
    found: dict[str, dict[int, float]] = {}
    for unit, tasks in units.items():
        baseline = best[tasks[0]]
        mine, bound = _means(tables, name, tasks), _means(tables, BOUND, tasks)
        if mine and bound and baseline is not None:
            (base,), (top,) = _means(tables, baseline, tasks).values(), bound.values()
            scored = normalized_score(np.array([*mine.values()]), base, top)
            if np.isfinite(scored).all():
                found[unit] = dict(zip(mine, scored.tolist(), strict=True))
    common = sorted(set.intersection(*map(set, found.values()))) if found else []
    return np.array([[of_unit[seed] for of_unit in found.values()] for seed in common]), list(found)


def _improvement(
    tables: _Tables, name: str, units: dict[str, list[str]], others: dict[str, str | None]
) -> float | None:
    """Probability that a training scores higher on test than the other policy of each task; None without units."""
    shares = []
    for tasks in units.values():
        other = others[tasks[0]]
        both = [_means(tables, each, tasks, lambda verdict: verdict.test) for each in (name, other) if each is not None]
        if len(both) == 2 and all(both):
            shares.append(
                probability_of_improvement(*(np.array([[value] for value in each.values()]) for each in both))
            )
    return float(np.mean(shares)) if shares else None


def _points(tasks: list[list[Verdict]]) -> np.ndarray:
    """Cost and quality per task, averaged over seeds."""
    return np.array([[np.mean([each.cost for each in of]), np.mean([each.quality for each in of])] for of in tasks])
