"""Which compression method is best for a reference model in file size, test accuracy and time?

All choices are made on validation images; test images are only used for the report. Models are saved by
`Plan.compress`, and the decompressed model is evaluated. Time is the profiled time of the matrix products for 64
inputs.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from torch import nn

from agents.baselines import compression as rules
from benchmarks.results.pareto import front
from benchmarks.results.tables import records
from benchmarks.runner.setup import Arguments
from experts import reference_models
from experts.compression import LEVELS
from experts.compression.activations import quantize_activations
from experts.compression.lowrank import automatic_rank
from experts.compression.pieces import pieces
from experts.compression.plan import Plan
from experts.compression.structured import smaller_experts
from experts.compression.workbench import Compressed, Workbench
from moe_envs.compression.tables import CompressionTables

EXACT, INT8, HALF, INT4, LOW_RANK, QUARTER, INT2, TENTH = 0, 1, 2, 3, 4, 6, 7, 10
PRUNED = {1.0: INT8, 0.5: HALF, 0.25: QUARTER, 0.1: TENTH}  # share kept -> level
SMALL = 0.052  # budget of the searched plans as share of the float32 file: about 150 kB for the convolutional model
ENERGY_LOSSES = (0.5, 0.4, 0.3, 0.2, 0.15, 0.1, 0.05, 0.02)
LIMIT = 2**20  # bytes
NAMES = (
    "float32", "int8", "int8, activations too", "int8, trained", "int4", "int2", "int2, trained",
    "gate int8, experts int4", "experts only, int2", "gate only, int2", "half pruned in each layer",
    "half pruned over all layers", "pruned to a tenth, 3 steps, trained", "half the experts' neurons",
    "low rank, automatic", "half pruned, then low rank", "low rank, then half pruned",
    "half pruned and low rank, trained", "uniform", "greedy", "exact", "exact and local search", "exact, trained",
    "exact and local search, trained",
)  # fmt: skip
GRID = "combinations of levels"
SEEDS = (0,)
SETTINGS = {name: {"method": name} for name in (*NAMES, GRID)}
QUICK = {"settings": {"model": "digits-mlp", "steps": 3, "evaluations": 3}}


class MethodSetup(Arguments):
    """`steps` per fine-tuning; `evaluations` of the local search."""

    method: str
    model: str = "fashion-mnist-conv"
    steps: int = 430
    evaluations: int = 400


Setup = MethodSetup


class MethodBench(Workbench):
    """Workbench with the tables, budget and searches of plans."""

    evaluations = 400

    @cached_property
    def tables(self) -> CompressionTables:
        """Sizes and sensitivities of the named model."""
        return CompressionTables((self.name,), "train", "expert", "accuracy and loss", "reference")

    @cached_property
    def budget(self) -> int:
        """Budget of the searched plans in bytes."""
        least = self.tables.overhead + int(self.tables.least[0])
        return round(max(SMALL * self.tables.bytes, 1.25 * least))

    def searched(self, kind: str) -> np.ndarray:
        """Levels that a baseline selects for the budget."""
        rule = {"exact": "exact on sensitivities", "exact and local search": "exact, then local search"}.get(kind, kind)
        room = self.budget - self.tables.overhead
        return rules.find_plan(rule, self.tables, 0, room, self.evaluations, self.seed)


def measure(setup: MethodSetup, seed: int, split: str, folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Apply and evaluate one method."""
    bench = MethodBench(reference_models.load(setup.model), setup.model, setup.steps, seed)
    bench.evaluations = setup.evaluations
    if setup.method == GRID:
        return {"grid": combinations(bench)}, {}
    made = methods(bench)[setup.method]()
    return {
        "bytes": len(made.file), "accuracy": bench.accuracy(made.model), "validation": bench.validation(made.model),
        "time_us": 1e6 * bench.seconds(made), "trained": made.finetuned, "applies": made.applies,
        "levels": dict(made.plan.levels),
    }, {}  # fmt: skip


def methods(bench: MethodBench) -> dict[str, Callable[[], Compressed]]:
    """All methods by name."""
    kinds = {name: piece.kind for name, piece in pieces(bench.model).items()}
    experts = [name for name, kind in kinds.items() if kind.startswith("expert")]
    gate = [name for name, kind in kinds.items() if kind == "gate"]
    found: dict[str, Callable[[], Compressed]] = {
        "float32": lambda: bench.compress(EXACT),
        "int8": lambda: bench.compress(INT8),
        "int8, activations too": lambda: bench.compress(
            INT8, quantize_activations(bench.model, bench.calibration)
        )._replace(activations=True),
        "int8, trained": lambda: bench.train(INT8),
        "int4": lambda: bench.compress(INT4),
        "int2": lambda: bench.compress(INT2),
        "int2, trained": lambda: bench.train(INT2),
        "gate int8, experts int4": lambda: bench.compress(dict.fromkeys(kinds, INT8) | dict.fromkeys(experts, INT4)),
        "experts only, int2": lambda: bench.compress(dict.fromkeys(experts, INT2)),
        "gate only, int2": lambda: bench.compress(dict.fromkeys(gate, INT2)),
        "half pruned in each layer": lambda: bench.compress(HALF),
        "half pruned over all layers": lambda: bench.compress(magnitude_plan(bench.model, 0.5)),
        "pruned to a tenth, 3 steps, trained": lambda: iterative(bench),
        "half the experts' neurons": lambda: structured(bench),
        "low rank, automatic": lambda: bench.compress(automatic_low_rank(bench)),
        "half pruned, then low rank": lambda: bench.compress(LOW_RANK, bench.compress(HALF).model),
        "low rank, then half pruned": lambda: bench.compress(HALF, bench.compress(LOW_RANK).model),
        "half pruned and low rank, trained": lambda: bench.train(
            dict.fromkeys(kinds, LOW_RANK) | dict.fromkeys(experts, HALF) | bench.tiny
        ),
    }
    for kind in ("uniform", "greedy", "exact", "exact and local search"):
        found[kind] = lambda kind=kind: bench.compress(bench.searched(kind))  # type: ignore[misc]
    for kind in ("exact", "exact and local search"):
        found[f"{kind}, trained"] = lambda kind=kind: bench.train(bench.searched(kind))  # type: ignore[misc]
    return found


def magnitude_plan(model: nn.Module, share: float) -> dict[str, int]:
    """Pruning level per matrix closest to the share kept by one global magnitude threshold."""
    weights = {name: np.abs(piece.read()) for name, piece in pieces(model).items()}
    threshold = np.quantile(np.concatenate([each.ravel() for each in weights.values()]), 1 - share)
    kept = {name: float((each > threshold).mean()) for name, each in weights.items()}
    return {name: PRUNED[min(PRUNED, key=lambda known: abs(known - found))] for name, found in kept.items()}


def rank_plan(model: nn.Module, loss: float) -> dict[str, int]:
    """Level of least rank per matrix that loses at most a share of the squared weights; int8 if there is none."""
    ranks = {level: form.rank for level, form in enumerate(LEVELS) if form.rank}
    found = {}
    for name, piece in pieces(model).items():
        wanted = automatic_rank(piece.read(), loss)
        found[name] = max((level for level, of in ranks.items() if of(piece.shape) >= wanted), default=INT8)
    return found


def automatic_low_rank(bench: MethodBench) -> dict[str, int]:
    """Lowest ranks, set by one bound on the energy lost, that lose at most one point of validation accuracy."""
    evaluator = bench.tables.models[0].evaluator
    found = [rank_plan(bench.model, loss) for loss in ENERGY_LOSSES]
    limit = evaluator([EXACT] * len(evaluator.names)).accuracy - 0.01
    return next((plan for plan in found if evaluator(list(plan.values())).accuracy >= limit), found[-1])


def iterative(bench: MethodBench) -> Compressed:
    """Prune to 1/2, 1/4 and 1/10 of the weights with training after each step; small layers at int8."""
    steps, made = max(1, bench.settings.steps // 3), bench.compress(EXACT)
    for level in (HALF, QUARTER, TENTH):
        made = bench.train(dict.fromkeys(pieces(bench.model), level) | bench.tiny, made.model, steps)
    return made


def structured(bench: MethodBench) -> Compressed:
    """Remove the less important half of each expert's neurons; int8."""
    return bench.compress(INT8, smaller_experts(bench.model, 0.5, bench.importance))


def combinations(bench: MethodBench) -> list[list[float]]:
    """Validation accuracy by level of trunk and gate (rows) and level of the experts (columns)."""
    kinds = [piece.expert >= 0 for piece in pieces(bench.model).values()]
    count, evaluator = len(LEVELS), bench.tables.models[0].evaluator
    return [
        [evaluator([expert if inside else trunk for inside in kinds]).accuracy for expert in range(count)]
        for trunk in range(count)
    ]


def score(frame: pd.DataFrame) -> dict[str, Any]:
    """All methods by size, with the Pareto front of bytes and accuracy marked; the smallest close to the best."""
    tried = frame[frame["method"] != GRID].sort_values("bytes")
    on_front = front(tried[["bytes", "accuracy"]].to_numpy(dtype=float))
    whole = tried[tried["method"] == "float32"]
    base = whole.iloc[0] if len(whole) else tried.iloc[-1]
    rows = [
        {
            "method": row["method"], "best for its size": bool(best), "bytes": int(row["bytes"]),
            "smaller": f"{base['bytes'] / row['bytes']:.1f}x", "accuracy": f"{row['accuracy']:.2%}",
            "points": 100 * (row["accuracy"] - base["accuracy"]), "a batch, µs": row["time_us"],
            "trained": bool(row["trained"]), "fits in 1 MiB": bool(row["bytes"] <= LIMIT),
        }
        for row, best in zip(records(tried), on_front, strict=True)
    ]  # fmt: skip
    fitting = tried[(tried["bytes"] <= LIMIT) & tried["applies"].astype(bool)]
    near = fitting[fitting["validation"] >= fitting["validation"].max() - 0.005]
    best_one = near.loc[near["bytes"].idxmin(), "method"] if len(near) else None
    notes = [f"Smallest plan within 1 MiB and half a point of the best on validation: {best_one}. Its levels are in "
             "`plans/`; `moe-compress apply` compresses a checkpoint by them."]  # fmt: skip
    return {"tables": {f"{tried['model'].iloc[0]}, test images": rows}, "notes": notes, "best": best_one}


def plot(frame: pd.DataFrame, result: dict[str, Any], out: Path) -> list[str]:
    """Plot pareto.png and heatmap.png, and save the plans for the reference model."""
    tried = frame[frame["method"] != GRID]
    for row in records(tried[tried["applies"].astype(bool)]):
        plan = Plan.of(reference_models.load(row["model"]), row["levels"])
        plan.save(out / "plans" / f"{''.join(c if c.isalnum() else '-' for c in row['method'])}.json")
    _draw(tried, out / "pareto.png")
    names = ["pareto.png"]
    grids = frame[frame["method"] == GRID]
    if len(grids):
        _heatmap(np.array(grids["grid"].iloc[0]), out / "heatmap.png")
        names.append("heatmap.png")
    return names


def _heatmap(grid: np.ndarray, path: Path) -> None:
    count = len(grid)
    figure = Figure((8, 7), layout="constrained")
    panel = figure.subplots()
    drawn = panel.imshow(100 * grid, cmap="viridis", origin="lower")
    for trunk, expert in np.ndindex(count, count):
        share = grid[trunk, expert]
        colour = "white" if share < 0.6 else "black"
        panel.text(expert, trunk, f"{100 * share:.0f}", ha="center", va="center", fontsize=7, color=colour)
    names = [f"{number}: {level.name}" for number, level in enumerate(LEVELS)]
    panel.set(xlabel="level of the experts", ylabel="level of trunk and gate", xticks=range(count), yticks=range(count))
    panel.set_yticklabels(names, fontsize=7)
    figure.colorbar(drawn, label="validation accuracy without fine-tuning [%]", shrink=0.7)
    figure.savefig(path, dpi=120)


def _draw(tried: pd.DataFrame, path: Path) -> None:
    """Plot accuracy against bytes with labels on the five most accurate methods of the front."""
    figure = Figure((10, 5.5), layout="constrained")
    panel = figure.subplots()
    best = tried[front(tried[["bytes", "accuracy"]].to_numpy(dtype=float))].sort_values("bytes")
    limits = {"vmin": tried["time_us"].min(), "vmax": tried["time_us"].max()}
    for trained, marker, label in ((False, "o", "not trained"), (True, "^", "trained under its plan")):
        part = tried[tried["trained"].astype(bool) == trained]
        drawn = panel.scatter(part["bytes"] / 1000, 100 * part["accuracy"], marker=marker, c=part["time_us"],
                              cmap="plasma", label=label, **limits)  # fmt: skip
    panel.plot(best["bytes"] / 1000, 100 * best["accuracy"], "k--", lw=0.8)
    for number, row in enumerate(records(best.sort_values("accuracy", ascending=False).head(5))):
        place, line = (row["bytes"] / 1000, 100 * row["accuracy"]), {"arrowstyle": "-", "lw": 0.4, "relpos": (0, 0.5)}
        beside = 0.3, 0.6 - 0.06 * number
        panel.annotate(row["method"], place, beside, textcoords="axes fraction", fontsize=9, arrowprops=line)
    panel.axvline(LIMIT / 1000, color="grey", lw=0.8, ls=":")
    top = 100 * tried["accuracy"].max()
    panel.set(xscale="log", xlabel="file size [kB]", ylabel="test accuracy [%]", ylim=(top - 6, top + 0.5))
    panel.grid(alpha=0.3)
    panel.legend(loc="lower right")
    figure.colorbar(drawn, label="time of the matrix products for 64 inputs [µs]")
    figure.savefig(path, dpi=120)
