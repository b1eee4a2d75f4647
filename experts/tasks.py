"""Small classification tasks whose full training takes well under a second.

Shipped inside the package as bytes of pixels under SHA-256; `moe-bundle tasks` makes them from the data sets. Larger
ones are made when they are asked for.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np

from cost.files import read_verified, sums_of, write_bytes
from experts import data
from experts.data import DataError
from experts.zoo import ASSETS

SOFTENING = 0.05  # added to deviations, for pixels that hardly ever change
FOLDER, SUMS = ASSETS / "_tasks", "SHA256SUMS"


@dataclass(frozen=True)
class TaskRecipe:
    """From which data set, images pooled over squares of `pool` pixels; how many inputs there are to train and validate
    on."""

    source: str
    pool: int
    levels: int  # the byte that stands for 1.0
    train: int
    validation: int
    subset: int  # inputs that one training has
    target: float  # validation accuracy
    steps: int  # of the optimiser, between two decisions


RECIPES = {
    "digits": TaskRecipe("digits", 1, 16, train=1_037, validation=400, subset=1_000, target=0.97, steps=5),
    "fashion-mnist": TaskRecipe(
        "fashion-mnist", 4, 255, train=12_000, validation=1_000, subset=4_000, target=0.79, steps=10
    ),
    "fashion-mnist-14": TaskRecipe(
        "fashion-mnist", 2, 255, train=12_000, validation=1_000, subset=4_000, target=0.81, steps=10
    ),
    "breast-cancer": TaskRecipe("breast-cancer", 1, 255, train=300, validation=150, subset=250, target=0.97, steps=2),
}
SHIPPED = ("digits", "fashion-mnist")


@dataclass(frozen=True)
class Task:
    """Inputs `[n, D]` float32 and labels `[n]` to train on, and the same to validate on. Over those to train on each
    pixel has mean 0 and a deviation of at most 1."""

    name: str
    recipe: TaskRecipe
    inputs: np.ndarray
    labels: np.ndarray
    validation_inputs: np.ndarray
    validation_labels: np.ndarray

    @property
    def num_classes(self) -> int:
        return int(self.labels.max()) + 1


@cache
def load(name: str) -> Task:
    """A task by name; raises `DataError` where its file is damaged, or its data set is absent."""
    from safetensors.numpy import load as parse

    if name not in RECIPES:
        raise ValueError(f"task={name!r} is not one of {', '.join(RECIPES)}")
    arrays = parse(_verified(name)) if name in SHIPPED else make(name)
    recipe = RECIPES[name]
    shares = {key: values / np.float32(recipe.levels) for key, values in arrays.items() if key.endswith("inputs")}
    mean, deviation = shares["inputs"].mean(0), shares["inputs"].std(0) + SOFTENING
    scaled = {key: (values - mean) / deviation for key, values in shares.items()}
    labels = {key: values.astype(np.int64) for key, values in arrays.items() if key.endswith("labels")}
    for values in (*scaled.values(), *labels.values()):
        values.flags.writeable = False
    return Task(
        name, recipe, scaled["inputs"], labels["labels"], scaled["validation_inputs"], labels["validation_labels"]
    )


def make(name: str) -> dict[str, np.ndarray]:
    """Create the bytes of a task from its data set, without the test split."""
    recipe = RECIPES[name]
    source = data.load(recipe.source)
    rows = np.concatenate([source.splits[split] for split in ("train", "rl_train", "validation")])
    rows = np.random.default_rng(0).permutation(rows)[: recipe.train + recipe.validation]
    inputs = source.inputs[rows]
    if recipe.pool > 1:
        places = int(inputs.shape[1] ** 0.5) // recipe.pool
        inputs = inputs.reshape(len(rows), places, recipe.pool, places, recipe.pool).mean((2, 4))
    pixels = np.round(inputs.reshape(len(rows), -1) * recipe.levels).astype(np.uint8)
    labels = source.labels[rows].astype(np.uint8)
    split = recipe.train
    return {
        "inputs": pixels[:split], "labels": labels[:split],
        "validation_inputs": pixels[split:], "validation_labels": labels[split:],
    }  # fmt: skip


def ship(folder: Path = FOLDER) -> list[Path]:
    """Write the shipped tasks and their SHA-256 into a folder; needs the data sets."""
    from safetensors.numpy import save

    raw = {f"{name}.safetensors": save(make(name)) for name in SHIPPED}
    raw[SUMS] = sums_of(raw)
    for name, each in raw.items():
        write_bytes(folder / name, each)
    return [folder / name for name in raw]


def _verified(name: str) -> bytes:
    path, mend = FOLDER / f"{name}.safetensors", f"its SHA-256 is not the one in {SUMS}; install moe-envs anew"
    try:
        lines = {name: sha256 for sha256, name in map(str.split, (FOLDER / SUMS).read_text().splitlines())}
    except (OSError, ValueError) as error:
        raise DataError(f"{FOLDER / SUMS} cannot be read ({error}): install moe-envs anew") from error
    return read_verified(path, lines.get(path.name), DataError, mend)
