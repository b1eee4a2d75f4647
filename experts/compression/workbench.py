"""Compress, fine-tune, evaluate and time a reference model; apply a plan to a checkpoint."""

from __future__ import annotations

from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

from cost.files import write_bytes
from cost.machine import provenance
from experts import data, profiles, reference_models
from experts.compression.evaluation import accuracy, loads
from experts.compression.execution import name_of, products, ways
from experts.compression.finetune import FinetuneSettings, finetune
from experts.compression.pieces import importance, pieces
from experts.compression.plan import Plan
from experts.reference_models import Model

EXACT, INT8 = 0, 1  # levels
BATCH = 64  # inputs whose time is given


class Compressed(NamedTuple):
    """A plan, its file, the model it decompresses to, whether it was trained for it, whether the plan is for the
    reference model itself (applied to it, it gives this), and whether inputs of its matrices have 8 bits."""

    plan: Plan
    file: bytes
    model: Any
    finetuned: bool = False
    applies: bool = True
    activations: bool = False


class Workbench:
    """Reference model with the data for selecting its compression."""

    def __init__(self, model: Model, name: str, steps: int = 430, seed: int = 0) -> None:
        self.model, self.name, self.seed = model, name, seed
        self.kind, self.recipe = reference_models.recipe_of(name)
        self.source = data.load(self.recipe.source)
        self.settings = FinetuneSettings(steps=steps, seed=seed)
        self.calibration = torch.from_numpy(reference_models.examples(name).calibration)
        self.importance = importance(model, self.calibration)

    def compress(self, levels: Any, model: Model | None = None, finetuned: bool = False) -> Compressed:
        """Apply a plan without fine-tuning."""
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

    def accuracy(self, model: nn.Module) -> float:
        """Accuracy on the test images."""
        return accuracy(model, *self.source["test"])

    def validation(self, model: nn.Module) -> float:
        """Accuracy on the second half of the validation images, which is not used to search plans."""
        return accuracy(model, *reference_models.examples(self.name).half("validation"))

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


def apply(plan: Path, checkpoint: Path, out: Path, steps: int, limit: int) -> dict[str, Any]:
    """Compress the reference model in a file by a plan; trained under it first where `steps` > 0."""
    if out.resolve() in (plan.resolve(), checkpoint.resolve()):
        raise ValueError(f"--out {out} would replace what is read")
    model, name = reference_models.read(checkpoint)
    loaded = Plan.load(plan)
    loaded.check(model)
    if loaded.bytes > limit:
        raise ValueError(f"{plan} takes {loaded.bytes:,} bytes, more than the limit of {limit:,}")
    bench = Workbench(model, name, steps)
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
