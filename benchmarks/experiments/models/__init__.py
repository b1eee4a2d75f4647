"""How accurate are models with different routing, training and compression on clean and corrupted test images?

Models are trained on `train`. Temperatures are fitted and recommendations chosen on `validation`. All results are on
`test`, corrupted with the training seed, so that setups with the same seed see the same images.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from benchmarks.experiments.models import report
from benchmarks.experiments.models.corruptions import KINDS, LEVELS, corrupt, digest
from benchmarks.experiments.models.setups import SETTINGS as SETTINGS
from benchmarks.experiments.models.setups import ModelSetup, make
from benchmarks.results import pareto
from benchmarks.results.statistics import seeds_interval
from cost.files import locked

CLEAN = "test"
SPLITS = (CLEAN, *(f"{kind}-{level}" for kind in KINDS for level in range(1, LEVELS + 1)))
SAME_COST = 0.05  # costs within this relative difference are ties
MIDDLE = 3  # level at which the drop must stay below 20 points
MEANS = (
    "accuracy", "validation_accuracy", "top5", "loss", "entropy", "top2_gap", "ece", "ece_calibrated", "mce",
    "mce_calibrated", "experts_per_input", "parameters", "bytes",
)  # fmt: skip
QUICK = {"seeds": [17], "splits": ["test"], "settings": {"data": "digits", "timesteps": 4096}}
WORST = {"batch_ms": (50.0, 0.0), "energy_j": (0.1, 0.0)}  # reference points (cost, accuracy) of the hypervolumes
MEASURED = "batch_ms", "batch_p95_ms", "energy_j", "memory_bytes"

Setup = ModelSetup
plot, text = report.plot, report.text


def check(setups: dict[str, ModelSetup], splits: list[str]) -> None:
    """Raise `ValueError` if the setups use different data, or if clean images are missing."""
    if len(found := {setup.data for setup in setups.values()}) > 1:
        raise ValueError(f"setups of different data, {', '.join(sorted(found))}: a matrix for each")
    if CLEAN not in splits:
        raise ValueError(f"splits must have {CLEAN}, which the corrupted ones are compared with")


def measure(setup: ModelSetup, seed: int, split: str, folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Evaluate one model on one kind of images."""
    import torch

    from benchmarks.experiments.models import measures
    from experts import data

    subject, content = make(setup, seed, folder), data.load(setup.data)
    clean, labels = content["test"]
    inputs = clean
    if split != CLEAN:
        kind, _, level = split.rpartition("-")
        inputs = corrupt(clean, kind, int(level), seed)
    with torch.inference_mode():
        known, known_labels = content["validation"]
        known_logits = subject.classify(torch.from_numpy(known)).numpy()
        divisor = measures.temperature(known_logits, known_labels)
        x = torch.from_numpy(inputs)
        logits = subject.classify(x).numpy()
        before = subject.classify(torch.from_numpy(clean)).numpy()
        metrics = measures.quality(logits, labels) | measures.calibration(logits, labels, divisor)
        metrics |= {
            "stability": float((logits.argmax(1) == before.argmax(1)).mean()), "temperature": divisor,
            "validation_accuracy": float((known_logits.argmax(1) == known_labels).mean()),
            "experts_per_input": float(subject.experts_per_input(x).float().mean()),
            "parameters": subject.parameters, "bytes": subject.bytes, "inputs": len(x), "sha256": digest(inputs),
        }  # fmt: skip
        with locked(folder / "timing"):  # excludes other timings, but not concurrent trainings
            return metrics, measures.least_costs(subject.ways, x)


def score(frame: pd.DataFrame) -> dict[str, Any]:
    """Test results, robustness and rank per setup, Pareto fronts of accuracy against time and energy, and
    recommendations."""
    rows = [_of_setup(str(name), part) for name, part in frame.groupby("setup", sort=False)]
    corrupted = frame[frame["split"] != CLEAN]
    if len(corrupted):
        ranks = corrupted.groupby(["seed", "split"])["accuracy"].rank(ascending=False).groupby(corrupted["setup"])
        for row in rows:
            if row["setup"] in ranks.groups:
                row["rank"] = float(ranks.mean()[row["setup"]])
    clean = frame[frame["split"] == CLEAN].pivot(index="seed", columns="setup", values="accuracy")
    clean = clean.reindex(columns=[row["setup"] for row in rows])
    for row, points in zip(rows[1:], 100 * clean.sub(clean.iloc[:, 0], axis=0).to_numpy().T[1:], strict=True):
        if len(both := points[np.isfinite(points)]):  # paired by seed
            row |= {"points": float(both.mean()), "points_ci95": seeds_interval(both)}
    result: dict[str, Any] = {"data": str(frame["data"].iloc[0]), "rows": rows}
    result["worst"] = {cost: list(point) for cost, point in WORST.items()}
    result["tables"] = {f"{result['data']}, test": _shown(rows)}
    known = [row for row in rows if "accuracy" in row]
    for cost in ("batch_ms", "energy_j"):
        if not known:
            continue
        points = np.array([[row[cost], row["accuracy"]] for row in known])
        points[:, 0] = pareto.tied(points[:, 0], SAME_COST)
        result[f"front_{cost}"] = [row["setup"] for row, on in zip(known, pareto.front(points), strict=True) if on]
        result[f"hypervolume_{cost}"] = {
            row["setup"]: pareto.hypervolume(points[number : number + 1], WORST[cost])
            for number, row in enumerate(known)
        } | {"all": pareto.hypervolume(points, WORST[cost])}
        chosen_by = np.column_stack([points[:, 0], [row["validation_accuracy"] for row in known]])
        result[f"recommended_{cost}"] = {
            name: known[place]["setup"] for name, place in pareto.recommended(chosen_by).items()
        }
    return result


def _shown(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Tables for the terminal."""
    return [
        {
            "setup": row["setup"], "accuracy": f"{row['accuracy']:.2%}", "points, paired": row.get("points"),
            "95 %": row.get("points_ci95"), "ECE": row["ece"], "calibrated": row["ece_calibrated"],
            "corrupted": row.get("corrupted"), "batch, ms": row["batch_ms"], "kB": row["bytes"] / 1000,
        }
        for row in rows
        if "accuracy" in row
    ]  # fmt: skip


def _of_setup(name: str, part: pd.DataFrame) -> dict[str, Any]:
    clean = part[part["split"] == CLEAN]
    row: dict[str, Any] = {"setup": name, "seeds": int(part["seed"].nunique())}
    if not len(clean):
        return row
    row |= {key: float(clean[key].mean()) for key in MEANS}
    row |= {key: float(part[key].median()) for key in MEASURED}
    row |= {"accuracy_ci95": seeds_interval(clean["accuracy"].to_numpy()), "noisy": int(part["noisy"].sum()),
            "runs": len(part), "energy_source": str(clean["energy_source"].iloc[0]),
            **{key: str(part[key].mode()[0]) for key in ("fastest", "thriftiest")}}  # fmt: skip
    row["ece_down"] = 1 - row["ece_calibrated"] / row["ece"]
    for side in ("", "_calibrated"):
        bins = clean[f"reliability{side}"].tolist()
        counts, sure, right = (np.array([each[key] for each in bins]) for key in ("counts", "confidence", "right"))
        total = np.maximum(counts.sum(0), 1)
        row[f"reliability{side}"] = {
            "counts": counts.sum(0).tolist(), "confidence": ((sure * counts).sum(0) / total).tolist(),
            "right": ((right * counts).sum(0) / total).tolist(),
        }  # fmt: skip
    return row | _robustness(part[part["split"] != CLEAN], clean)


def _robustness(part: pd.DataFrame, clean: pd.DataFrame) -> dict[str, Any]:
    """Robustness of a setup, with means and intervals over seeds.

    Gives accuracy by kind and level, the drop at level 3, relative robustness (corrupted over clean accuracy),
    stability (share of inputs with unchanged class), and the variance over seeds relative to clean images.
    """
    if not len(part):
        return {}
    named = part["split"].str.rpartition("-")
    part = part.assign(kind=named[0], level=named[2].astype(int))
    before = clean.set_index("seed")["accuracy"]
    curves: dict[str, list[dict[str, Any]]] = {}
    for kind, level in dict.fromkeys(zip(part["kind"], part["level"].tolist(), strict=True)):
        found = part[(part["kind"] == kind) & (part["level"] == level)]["accuracy"].to_numpy()
        point = {"level": level, "accuracy": float(found.mean()), "ci95": seeds_interval(found)}
        curves.setdefault(kind, []).append(point)
    for points in curves.values():
        points.sort(key=lambda point: point["level"])
    by_seed = part.groupby("seed")["accuracy"].mean()
    result: dict[str, Any] = {
        "curves": curves, "relative_robustness": float((by_seed / before).mean()), "corrupted": float(by_seed.mean()),
        "corrupted_ci95": seeds_interval(by_seed.to_numpy()), "stability": float(part["stability"].mean()),
        "ece_corrupted": float(part["ece"].mean()), "ece_corrupted_calibrated": float(part["ece_calibrated"].mean()),
    }  # fmt: skip
    if len(before) > 1 and before.var() > 0:
        result["spread"] = float(part.groupby("split")["accuracy"].var().mean() / before.var())
    middle = part[part["level"] == MIDDLE]
    if len(middle):
        drops = 100 * (before.mean() - middle.groupby("kind")["accuracy"].mean())
        result |= {"drop": float(drops.mean()), "worst_drop": float(drops.max()), "worst_kind": str(drops.idxmax())}
    return result
