"""Is a gate trained by policy gradient better than one trained by cross-entropy, or than a single expert?

All trainings start from the same experts and use the same epochs and batch size; only the policy gradient uses costs.
Its quality is either correctness, or the probability of the true class after temperature scaling fitted on the
validation outputs of the first gate. The single expert is trained alone, one per width, and selected by return on
validation. Return, accuracy and cost are computed on test batches of MoERouting-v0 with the gate's top-1 choice, and
costs come from the profile of the bundle with the same experts.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure

from benchmarks.results.statistics import seeds_interval
from benchmarks.runner.setup import Arguments
from cost.model import Cost
from cost.profile import parse
from experts import bundle as bundles
from experts import data
from experts.bundle.streams import deal
from experts.confidence import fit_temperature
from experts.hybrid import HybridSettings, train_hybrid
from experts.model import MoEClassifier
from experts.reference_bundles import SETTINGS as REFERENCE
from experts.training import TrainingSettings, train
from moe_envs.routing.tables import RoutingTables

BATCHES = 1000
SEEDS = (0, 1, 2)
GATES = "cross-entropy", "one expert", "policy gradient", "policy gradient, confidence"
SETTINGS = {gate: {"gate": gate} for gate in GATES}
QUICK = {"seeds": [0, 1], "settings": {"data": "digits", "epochs": 2}}


class HybridSetup(Arguments):
    """`alpha` weights the policy gradient; `straight_through` also passes the cross-entropy gradient to the gate."""

    gate: Literal["cross-entropy", "one expert", "policy gradient", "policy gradient, confidence"]
    data: Literal["fashion-mnist", "digits"] = "fashion-mnist"
    epochs: int = 8
    alpha: float = 1.0
    cost_weight: float = 0.2
    straight_through: bool = False


Setup = HybridSetup


def measure(setup: HybridSetup, seed: int, split: str, folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Train once and evaluate on test."""
    source, loaded = data.load(setup.data), bundles.load(setup.data)
    profile = parse(loaded.profile, setup.data)
    tables = RoutingTables(loaded, "test", profile, Cost(1 / 3, 1 / 3, 1 / 3), observation="features")
    settings = HybridSettings(
        alpha=setup.alpha, cost_weight=setup.cost_weight, straight_through=setup.straight_through, epochs=setup.epochs,
        seed=seed,
    )  # fmt: skip
    same = replace(REFERENCE[setup.data], seed=seed, epochs=setup.epochs, batch_size=settings.batch_size)
    if setup.gate == "one expert":
        return _alone(source, same, tables, setup.cost_weight), {}
    plain = None
    if setup.gate != "policy gradient":
        plain = train(*source["train"], same, progress=False)
    if setup.gate == "cross-entropy":
        assert plain is not None
        return judge(plain, source, tables, setup.cost_weight), {}
    temperature = None if plain is None else _temperature(plain, source)
    inputs, labels = source["train"]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = MoEClassifier(inputs.shape[1], int(labels.max()) + 1, widths=REFERENCE[setup.data].widths)
    log = train_hybrid(model, inputs, labels, _cost_of(tables), replace(settings, reward_temperature=temperature))
    return judge(model, source, tables, setup.cost_weight) | {"log": log}, {}


def _cost_of(tables: RoutingTables) -> Any:
    """Cost per input: its variable cost plus its share of its experts' fixed cost, so the mean is the batch cost."""
    codes = 1 << np.arange(tables.num_experts)
    fixed, slope = (torch.from_numpy(part[codes, 0]) for part in (tables.fixed, tables.slope))

    def cost_of(members_BE: torch.Tensor) -> torch.Tensor:
        load_E = members_BE.sum(0).clamp_min(1)
        return (members_BE * (slope + fixed / load_E)).sum(1) * tables.batch_size

    return cost_of


def score(frame: pd.DataFrame) -> dict[str, Any]:
    """Means over seeds, return with 95 % interval, and the course of reward and cost."""
    rows = []
    for gate, group in frame.groupby("gate", sort=False):
        row: dict[str, Any] = {"gate": gate, "return": float(group["return"].mean())}
        row["95 %"] = seeds_interval(group["return"].to_numpy())
        rows.append(row | {name: float(group[name].mean()) for name in ("accuracy", "cost", "experts a batch")})
    trends = []
    learned = frame[frame["gate"] == "policy gradient"]
    for seed, log in zip(learned["seed"].tolist(), learned.get("log", []), strict=True):
        part = pd.DataFrame(log)
        slopes = {name: float(np.polyfit(part["epoch"], part[name], 1)[0]) for name in ("reward", "cost")}
        trends.append({"seed": seed} | {f"{name} an epoch": value for name, value in slopes.items()})
    return {"tables": {"On test": rows, "Policy gradient": trends}}


def plot(frame: pd.DataFrame, result: dict[str, Any], out: Path) -> list[str]:
    """Plot reward and cost over epochs."""
    learned = frame[frame["gate"] == "policy gradient"]
    if not len(learned):
        return []
    logs = [{"seed": seed, **row} for seed, log in zip(learned["seed"], learned["log"], strict=True) for row in log]
    _draw(pd.DataFrame(logs), out / "hybrid.png")
    return ["hybrid.png"]


def _alone(
    source: data.Dataset, settings: TrainingSettings, tables: RoutingTables, cost_weight: float
) -> dict[str, float]:
    """Train one expert per width alone; returns the best on validation."""
    judged = []
    for width in dict.fromkeys(settings.widths):
        model = train(*source["train"], replace(settings, widths=(width,)), progress=False)
        place = list(settings.widths).index(width)
        judged.append([judge(model, source, tables, cost_weight, split, place) for split in ("validation", "test")])
    return max(judged, key=lambda pair: pair[0]["return"])[1]


@torch.inference_mode()
def _temperature(model: MoEClassifier, source: data.Dataset) -> float:
    """Temperature of the class logits of the gate's top-1 choice, fitted on validation."""
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
    """Return, accuracy and cost of the gate's top-1 choice on the batches of a split; `place` is the index of the
    model's first expert in the profile."""
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
        "experts a batch": float((loads > 0).sum(1).mean()),
    }


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
