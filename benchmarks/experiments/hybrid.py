"""Is a gate that learns by policy gradient on quality less cost better than one that learns by cross-entropy, and than
none: one expert alone?

The policy gradient's quality is whether an answer is right, or how probable the right class was, corrected by a
temperature that is fitted on the first gate's validation answers.

All start anew with the same experts, epochs and batch size; only the second gate knows of costs. The expert alone is
trained by itself; of each width one, and the one of the best return on validation is taken. Return, accuracy and cost
are those of MoERouting-v0's batches, of the gate's first choice, on test inputs. The costs are the profile of the
bundle with the same experts.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure
from scipy import stats

from cost.files import write_text
from cost.machine import provenance
from cost.model import Cost
from cost.profile import parse
from experts import bundle as bundles
from experts import data
from experts.confidence import fit_temperature
from experts.hybrid import HybridSettings, train_hybrid
from experts.model import MoEClassifier
from experts.reference_bundles import SETTINGS
from experts.training import TrainingSettings, train
from moe_envs.routing.tables import RoutingTables, deal

BATCHES = 1000
Result = dict[str, Any]


def run(name: str, seeds: int, settings: HybridSettings, out: Path, report: Callable[[float], object]) -> Result:
    """Train both gates for each seed; writes hybrid.json and hybrid.png."""
    source, loaded = data.load(name), bundles.load(name)
    profile, equal = parse(loaded.profile, name), Cost(1 / 3, 1 / 3, 1 / 3)
    tables = RoutingTables(loaded, "test", profile, equal)
    codes = 1 << np.arange(tables.num_experts)
    fixed, slope = (torch.from_numpy(part[codes, 0]) for part in (tables.fixed, tables.slope))
    per_batch = tables.batch_size

    def cost_of(members_BE: torch.Tensor) -> torch.Tensor:
        """An input's own part, and its share of its experts' fixed part, so that a batch's mean is the batch's cost."""
        load_E = members_BE.sum(0).clamp_min(1)
        return (members_BE * (slope + fixed / load_E)).sum(1) * per_batch

    rows, logs = [], []
    for seed in range(seeds):
        values = replace(settings, seed=seed)
        same = replace(SETTINGS[name], seed=seed, epochs=settings.epochs, batch_size=settings.batch_size)
        plain = train(*source["train"], same, progress=False)
        rows.append({"gate": "cross-entropy", "seed": seed, **judge(plain, source, tables, settings.cost_weight)})
        rows.append({"gate": "none, one expert", "seed": seed, **_alone(source, same, tables, settings.cost_weight)})
        inputs, labels = source["train"]
        for gate, temperature in (
            ("policy gradient", None),
            ("policy gradient, confidence", _temperature(plain, source)),
        ):
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)
                model = MoEClassifier(inputs.shape[1], int(labels.max()) + 1, widths=SETTINGS[name].widths)
            log = train_hybrid(model, inputs, labels, cost_of, replace(values, reward_temperature=temperature))
            rows.append({"gate": gate, "seed": seed, **judge(model, source, tables, settings.cost_weight)})
            logs += [{"seed": seed, **row} for row in log if temperature is None]
        report((seed + 1) / seeds)
    trends = [_trend(pd.DataFrame(logs), seed) for seed in range(seeds)]
    result = {"data": name, "settings": vars(settings), "rows": rows, "logs": logs, "trends": trends}
    out.mkdir(parents=True, exist_ok=True)
    write_text(out / "hybrid.json", json.dumps(result | provenance(), indent=1))
    _draw(pd.DataFrame(logs), out / "hybrid.png")
    return result


def _alone(
    source: data.Dataset, settings: TrainingSettings, tables: RoutingTables, cost_weight: float
) -> dict[str, float]:
    """The best expert by itself, of one of each width, chosen on validation."""
    judged = []
    for width in dict.fromkeys(settings.widths):
        model = train(*source["train"], replace(settings, widths=(width,)), progress=False)
        place = list(settings.widths).index(width)
        judged.append([judge(model, source, tables, cost_weight, split, place) for split in ("validation", "test")])
    return max(judged, key=lambda pair: pair[0]["return"])[1]


@torch.inference_mode()
def _temperature(model: MoEClassifier, source: data.Dataset) -> float:
    """Of the class logits of the gate's first choice, on validation."""
    x, y = source["validation"]
    logits = model(torch.from_numpy(x), k=1).numpy()
    return fit_temperature(logits, np.eye(logits.shape[1], dtype=np.bool_)[y])


def judge(
    model: MoEClassifier,
    source: data.Dataset,
    tables: RoutingTables,
    cost_weight: float,
    split: str = "test",
    place: int = 0,
) -> dict[str, float]:
    """Return, accuracy and cost of the gate's first choice on a split's batches; `place` is that of the model's first
    expert among those that are profiled."""
    x, y = source[split]
    with torch.inference_mode():
        h = model.trunk(torch.from_numpy(x))
        chosen = model.gate(h).argmax(1)
        logits = model.experts(h)[torch.arange(len(x)), chosen]
    correct = (logits.argmax(1).numpy() == y).astype(float)
    batches = deal(y, tables.batch_size, "topical", count=BATCHES, seed=7)
    loads = np.eye(tables.num_experts)[chosen.numpy() + place][batches].sum(1)
    codes = 1 << np.arange(tables.num_experts)
    costs = (loads > 0) @ tables.fixed[codes, 0] + loads @ tables.slope[codes, 0]
    accuracy = correct[batches].mean(1)
    return {
        "return": float((accuracy - cost_weight * costs).mean()),
        "accuracy": float(accuracy.mean()),
        "cost": float(costs.mean()),
        "experts": float((loads > 0).sum(1).mean()),
    }


def summary(result: Result) -> pd.DataFrame:
    """Means over seeds; the return with its 95 % interval."""
    rows = []
    for gate, group in pd.DataFrame(result["rows"]).groupby("gate"):
        half = group["return"].sem() * stats.t.ppf(0.975, len(group) - 1)
        row: Result = {"gate": gate, "seeds": len(group)}
        row |= {name: float(group[name].mean()) for name in ("return", "accuracy", "cost", "experts")}
        rows.append(row | {"low": row["return"] - half, "high": row["return"] + half})
    return pd.DataFrame(rows)


def _trend(logs: pd.DataFrame, seed: int) -> dict[str, float]:
    part = logs[logs["seed"] == seed]
    slopes = {name: float(np.polyfit(part["epoch"], part[name], 1)[0]) for name in ("reward", "cost")}
    return {"seed": seed, **slopes}


def _draw(logs: pd.DataFrame, path: Path) -> None:
    figure = Figure((14, 7), layout="constrained")
    names = ("cross_entropy", "policy_gradient", "entropy", "reward", "accuracy", "cost")
    for panel, name in zip(figure.subplots(2, 3).ravel(), names, strict=True):
        for seed, part in logs.groupby("seed"):
            panel.plot(part["epoch"], part[name], "o-", label=f"seed {seed}")
        panel.set(xlabel="epoch", ylabel=name.replace("_", " "))
        panel.grid(alpha=0.3)
    figure.axes[0].legend()
    figure.savefig(path, dpi=120)
