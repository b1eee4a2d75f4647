"""All ways to compress a reference model, one after the other: bytes of the file, accuracy on test, time.

Everything is chosen on validation images; test images are for the report. Files are those of `Plan.compress`, and what
is scored is what they decompress to. Time is that of the matrix products for 64 inputs, from the profile.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import nn

from agents.baselines import compression as baselines
from cost.files import write_bytes, write_text
from cost.machine import provenance
from experts import data, profiles, reference_models
from experts.compression import LEVELS
from experts.compression.activations import quantize_activations
from experts.compression.evaluation import accuracy, loads
from experts.compression.execution import name_of, products, ways
from experts.compression.finetune import FinetuneSettings, finetune
from experts.compression.lowrank import automatic_rank
from experts.compression.pieces import importance, pieces
from experts.compression.plan import Plan
from experts.compression.structured import smaller_experts
from experts.reference_models import Model
from moe_envs.compression.tables import BATCH, CompressionTables, halves

EXACT, INT8, HALF, INT4, LOW_RANK, QUARTER, INT2, TENTH = 0, 1, 2, 3, 4, 6, 7, 10
PRUNED = {1.0: INT8, 0.5: HALF, 0.25: QUARTER, 0.1: TENTH}  # share kept -> level
SMALL = 0.052  # of the float32 file: the budget of the searched plans, about 150 kB of the convolutional model
ENERGY_LOSSES = (0.5, 0.4, 0.3, 0.2, 0.15, 0.1, 0.05, 0.02)
Result = dict[str, Any]


class Compressed(NamedTuple):
    """A plan, its file, the model it decompresses to, whether it was trained for it, whether the plan is for the
    reference model itself (applied to it, it gives this), and whether inputs of its matrices have 8 bits."""

    plan: Plan
    file: bytes
    model: Any
    finetuned: bool = False
    applies: bool = True
    activations: bool = False


class Bench:
    """A reference model with what its compression is chosen by."""

    def __init__(self, model: Model, name: str, steps: int, evaluations: int = 0, seed: int = 0) -> None:
        self.model, self.name, self.evaluations, self.seed = model, name, evaluations, seed
        self.kind, self.recipe = reference_models.recipe_of(name)
        self.source = data.load(self.recipe.source)
        self.settings = FinetuneSettings(steps=steps, seed=seed)
        self.calibration = torch.from_numpy(reference_models.examples(name).calibration)
        self.importance = importance(model, self.calibration)

    @cached_property
    def tables(self) -> CompressionTables:
        """Sizes and sensitivities, of the model that the name loads."""
        return CompressionTables((self.name,), "train", "expert", "accuracy and loss", "reference")

    @cached_property
    def budget(self) -> int:
        """Bytes that plans are searched for."""
        least = self.tables.overhead + int(self.tables.least[0])
        return round(max(SMALL * self.tables.bytes, 1.25 * least))

    def compress(self, levels: Any, model: Model | None = None, finetuned: bool = False) -> Compressed:
        """A plan applied, without training."""
        model = model or self.model
        plan = Plan.of(model, levels)
        known = self.importance if model is self.model else importance(model, self.calibration)
        return Compressed(plan, *plan.compress(model, known), finetuned, finetuned or model is self.model)

    def train(self, levels: Any, model: Model | None = None, steps: int | None = None) -> Compressed:
        """A plan applied to weights that were trained under it, the uncompressed model as their teacher."""
        plan, first = Plan.of(self.model, levels), model or self.model
        rows = np.concatenate([self.source.splits[split] for split in ("train", "rl_train")])
        settings = replace(self.settings, steps=steps or self.settings.steps)
        tuned: Any = finetune(
            first, plan, self.source.inputs[rows], self.source.labels[rows], settings,
            self.importance, partial(reference_models.augmented, recipe=self.recipe), progress=False,
            teacher=self.model,
        )  # fmt: skip
        return self.compress(levels, tuned, finetuned=True)

    def score(self, levels: np.ndarray) -> float:
        """The quality of a plan on the first half of the validation images."""
        return float(self.tables.quality(np.zeros(1, dtype=np.int64), levels[None])[0][0])

    def searched(self, kind: str) -> np.ndarray:
        """The levels that a baseline finds for the budget."""
        sizes, gains, room = self.tables.sizes, self.tables.gains[0], self.budget - self.tables.overhead
        if kind == "uniform":
            return baselines.uniform(sizes, room)
        if kind == "greedy":
            return baselines.greedy(sizes, gains, room)
        best = baselines.exact(sizes, gains, room)
        if kind == "exact":
            return best
        return baselines.local_search(self.score, best, sizes, room, self.evaluations, self.seed).levels

    def accuracy(self, model: nn.Module) -> float:
        """On the test images."""
        return accuracy(model, *self.source["test"])

    def validation(self, model: nn.Module) -> float:
        """On the second half of the validation images, which no plan was searched by."""
        return accuracy(model, *halves(reference_models.examples(self.name), "validation"))

    @cached_property
    def tiny(self) -> dict[str, int]:
        """Int8 for the matrices below 6,000 weights, which save next to nothing and bear little."""
        return {name: INT8 for name, piece in pieces(self.model).items() if np.prod(piece.shape) < 6000}

    def seconds(self, made: Compressed) -> float:
        """Of the products of a batch, each as quick as it runs: densely, on integers, or as two thin ones."""
        found: Any = products(made.model, self.calibration[:BATCH])
        profile = profiles.of_products(self.kind, found, "reference")
        shares = loads(made.model, self.calibration)
        return sum(
            min(
                profile.cost(name_of(product, way), BATCH * shares[name]).time
                for way in ways(product, made.plan.levels[name], made.activations)
            )
            for name, product in found.items()
        )


def methods(bench: Bench) -> dict[str, Callable[[], Compressed]]:
    """What is tried, by name."""
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
        found[f"{kind}, {bench.budget:,} B"] = lambda kind=kind: bench.compress(bench.searched(kind))  # type: ignore[misc]
    for kind in ("exact", "exact and local search"):
        found[f"{kind}, trained"] = lambda kind=kind: bench.train(bench.searched(kind))  # type: ignore[misc]
    return found


def magnitude_plan(model: nn.Module, share: float) -> dict[str, int]:
    """Levels of pruning next to what one threshold over all matrices keeps of each."""
    weights = {name: np.abs(piece.read()) for name, piece in pieces(model).items()}
    threshold = np.quantile(np.concatenate([each.ravel() for each in weights.values()]), 1 - share)
    kept = {name: float((each > threshold).mean()) for name, each in weights.items()}
    return {name: PRUNED[min(PRUNED, key=lambda known: abs(known - found))] for name, found in kept.items()}


def rank_plan(model: nn.Module, loss: float) -> dict[str, int]:
    """For each matrix the level of least rank that keeps all but a share of the squared weights; int8 where none."""
    ranks = {level: form.rank for level, form in enumerate(LEVELS) if form.rank}
    found = {}
    for name, piece in pieces(model).items():
        wanted = automatic_rank(piece.read(), loss)
        found[name] = max((level for level, of in ranks.items() if of(piece.shape) >= wanted), default=INT8)
    return found


def automatic_low_rank(bench: Bench) -> dict[str, int]:
    """The least ranks, by one bound on the energy lost, that lose at most a point of validation accuracy."""
    evaluator = bench.tables.models[0].evaluator
    found = [rank_plan(bench.model, loss) for loss in ENERGY_LOSSES]
    limit = evaluator([EXACT] * len(evaluator.names)).accuracy - 0.01
    return next((plan for plan in found if evaluator(list(plan.values())).accuracy >= limit), found[-1])


def iterative(bench: Bench) -> Compressed:
    """Half, a quarter, a tenth of the weights kept, trained after each cut; small layers at int8."""
    steps, made = max(1, bench.settings.steps // 3), bench.compress(EXACT)
    for level in (HALF, QUARTER, TENTH):
        made = bench.train(dict.fromkeys(pieces(bench.model), level) | bench.tiny, made.model, steps)
    return made


def structured(bench: Bench) -> Compressed:
    """The half of each expert's neurons that matter most, really removed; int8."""
    return bench.compress(INT8, smaller_experts(bench.model, 0.5, bench.importance))


def run(
    name: str, out: Path, steps: int, evaluations: int, limit: int, seed: int,
    add_task: Callable[[str], Callable[[float], object]],
) -> Result:  # fmt: skip
    """Try all methods; writes results.json, report.md, pareto.png, heatmap.png, every plan, and the best file."""
    bench = Bench(reference_models.load(name), name, steps, evaluations, seed)
    _clear(out)
    todo, rows, fitting = methods(bench), [], list[tuple[Result, Compressed]]()
    progress = add_task(f"{len(todo)} methods")
    for number, (method, make) in enumerate(todo.items()):
        made = make()
        row = {
            "method": method, "bytes": len(made.file), "accuracy": bench.accuracy(made.model),
            "time_s": bench.seconds(made), "finetuned": made.finetuned, "fits": len(made.file) <= limit,
            "validation": bench.validation(made.model),
        }  # fmt: skip
        rows.append(row)
        if made.applies:
            made.plan.save(out / "plans" / f"{_file(method)}.json")
        if row["fits"] and made.applies:
            fitting.append((row, made))
        progress((number + 1) / len(todo))
    best = smallest(fitting)
    result: Result = {
        "model": name, "limit": limit, "steps": steps, "evaluations": evaluations, "seed": seed, "rows": rows,
        "best": best[0]["method"] if best else None, "levels": [level.name for level in LEVELS], **provenance(),
    }  # fmt: skip
    if best:
        write_bytes(out / "best.safetensors", best[1].file)
        best[1].plan.save(out / "best.plan.json")
    write_text(out / "results.json", json.dumps(result, indent=1))
    write_text(out / "report.md", report(result))
    _draw(rows, limit, out / "pareto.png")
    heatmap(bench, out / "heatmap.png", add_task("combinations of levels"))
    return result


def _clear(out: Path) -> None:
    """Delete what an earlier run left, so that nothing of it is taken for this one's."""
    for path in (
        *out.glob("plans/*.json"),
        out / "best.safetensors",
        out / "best.plan.json",
        out / "results.json",
        out / "report.md",
    ):
        path.unlink(missing_ok=True)


def smallest(rows: list[tuple[Result, Compressed]]) -> tuple[Result, Compressed] | None:
    """The smallest of those that lose at most half a point of validation accuracy against the best of them."""
    top = max((row["validation"] for row, _ in rows), default=0.0)
    near = [pair for pair in rows if pair[0]["validation"] >= top - 0.005]
    return min(near, key=lambda pair: pair[0]["bytes"], default=None)


def pareto(rows: list[Result]) -> list[Result]:
    """The rows that no other is as small and as right as, by size."""
    front: list[Result] = []
    for row in sorted(rows, key=lambda row: (row["bytes"], -row["accuracy"])):
        if not front or row["accuracy"] > front[-1]["accuracy"]:
            front.append(row)
    return front


def report(result: Result) -> str:
    """The rows as Markdown."""
    base = result["rows"][0]
    front = {row["method"] for row in pareto(result["rows"])}
    best = (
        f"of the plans that fit, **{result['best']}** is the smallest within half a point of the best on held-out "
        "validation images: `best.safetensors`, `best.plan.json`." if result["best"] else "no plan fits."
    )  # fmt: skip
    lines = [
        f"# {result['model']}: all methods", "",
        f"Test accuracy of the model as it is {base['accuracy']:.2%}, {base['bytes']:,} bytes. `*`: no other is as "
        f"small and as right. Limit {result['limit']:,} bytes; {best}", "",
        "| method | bytes | smaller | accuracy | points | time of a batch | trained | fits |",
        "|---|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    for row in result["rows"]:
        star = " *" if row["method"] in front else ""
        lines.append(
            f"| {row['method']}{star} | {row['bytes']:,} | {base['bytes'] / row['bytes']:.1f}x | {row['accuracy']:.2%} "
            f"| {100 * (row['accuracy'] - base['accuracy']):+.2f} | {1e6 * row['time_s']:.0f} us "
            f"| {'yes' if row['finetuned'] else ''} | {'yes' if row['fits'] else 'no'} |"
        )
    options = " ".join(f"--{key} {result[key]}" for key in ("model", "steps", "evaluations", "limit", "seed"))
    lines += ["", f"Made by `moe-compress run {options}` at commit {result['commit']}.", ""]
    return "\n".join(lines) + "\n![accuracy and bytes](pareto.png)\n\n![combinations of levels](heatmap.png)\n"


def heatmap(bench: Bench, path: Path, progress: Callable[[float], object]) -> None:
    """Accuracy on validation with the trunk and gate at one level and the experts at another."""
    kinds = [piece.expert >= 0 for piece in pieces(bench.model).values()]
    count, evaluator = len(LEVELS), bench.tables.models[0].evaluator
    grid = np.zeros((count, count))
    for trunk in range(count):
        for expert in range(count):
            grid[trunk, expert] = evaluator([expert if inside else trunk for inside in kinds]).accuracy
        progress((trunk + 1) / count)
    figure = Figure((8, 7), layout="constrained")
    panel = figure.subplots()
    drawn = panel.imshow(100 * grid, cmap="viridis", origin="lower")
    for trunk in range(count):
        for expert in range(count):
            light = "white" if grid[trunk, expert] < 0.6 else "black"
            panel.text(
                expert, trunk, f"{100 * grid[trunk, expert]:.0f}", ha="center", va="center", fontsize=7, color=light
            )
    names = [f"{number}: {level.name}" for number, level in enumerate(LEVELS)]
    panel.set(xlabel="level of the experts", ylabel="level of trunk and gate", xticks=range(count), yticks=range(count))
    panel.set_yticklabels(names, fontsize=7)
    figure.colorbar(drawn, label="accuracy on validation [%], nothing trained", shrink=0.7)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def _draw(rows: list[Result], limit: int, path: Path) -> None:
    """Accuracy and bytes; the five best of the front are named."""
    figure = Figure((10, 5.5), layout="constrained")
    panel = figure.subplots()
    front, times = pareto(rows), [1e6 * row["time_s"] for row in rows]
    for trained, marker in ((False, "o"), (True, "^")):
        part = [row for row in rows if row["finetuned"] is trained]
        drawn = panel.scatter(
            [row["bytes"] / 1000 for row in part], [100 * row["accuracy"] for row in part], marker=marker,
            c=[1e6 * row["time_s"] for row in part], vmin=min(times), vmax=max(times),
            cmap="plasma", label="trained under its plan" if trained else "as it is",
        )  # fmt: skip
    panel.plot([row["bytes"] / 1000 for row in front], [100 * row["accuracy"] for row in front], "k--", lw=0.8)
    for number, row in enumerate(sorted(front, key=lambda row: -row["accuracy"])[:5]):
        place, line = (row["bytes"] / 1000, 100 * row["accuracy"]), {"arrowstyle": "-", "lw": 0.4, "relpos": (0, 0.5)}
        beside = 0.3, 0.6 - 0.06 * number
        panel.annotate(row["method"], place, beside, textcoords="axes fraction", fontsize=9, arrowprops=line)
    panel.axvline(limit / 1000, color="grey", lw=0.8, ls=":")
    best = max(100 * row["accuracy"] for row in rows)
    panel.set(xscale="log", xlabel="bytes of the file [kB]", ylabel="test accuracy [%]", ylim=(best - 6, best + 0.5))
    panel.grid(alpha=0.3)
    panel.legend(loc="lower right")
    figure.colorbar(drawn, label="time of the products of 64 inputs [us]")
    figure.savefig(path, dpi=120)


def _file(method: str) -> str:
    return "".join(character if character.isalnum() else "-" for character in method)


def apply(plan: Path, checkpoint: Path, out: Path, steps: int, limit: int) -> Result:
    """Compress the reference model in a file by a plan; trained under it first where `steps` > 0."""
    if out.resolve() in (plan.resolve(), checkpoint.resolve()):
        raise ValueError(f"--out {out} would replace what is read")
    model, name = reference_models.read(checkpoint)
    loaded = Plan.load(plan)
    loaded.check(model)
    if loaded.bytes > limit:
        raise ValueError(f"{plan} takes {loaded.bytes:,} bytes, more than the limit of {limit:,}")
    bench = Bench(model, name, steps)
    before = bench.compress(EXACT)
    made = bench.train(loaded.levels) if steps else bench.compress(loaded.levels)
    assert len(made.file) == loaded.bytes
    write_bytes(out, made.file)
    rows = [
        {"method": method, "bytes": len(each.file), "accuracy": bench.accuracy(each.model),
         "time_s": bench.seconds(each), "finetuned": each.finetuned}
        for method, each in (("float32", before), (plan.stem, made))
    ]  # fmt: skip
    return {"rows": rows, "out": str(out), **provenance()}
