"""Small classification tasks whose full training takes well under a second.

Shipped inside the package as bytes of pixels under SHA-256; `moe-bundle tasks` makes them from the data sets. Larger
ones are made when they are asked for. `build` makes a task of your own arrays, small enough to train a policy on.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import numpy as np

from cost.files import digest, read_arrays, read_verified, sealed, sums_of, write_bytes
from experts import data
from experts.data import DataError
from experts.zoo import ASSETS, NAME, cache_folder

SOFTENING = 0.05  # added to deviations, for pixels that hardly ever change
THUMBNAIL, PROJECTED = 7, 64  # pixels a side, and numbers, that `build` reduces inputs to
OWN_INPUTS, LEAST = (12_000, 1_000), 100  # the most to train and to validate on; the least to build from
FOLDER, SUMS = ASSETS / "_tasks", "SHA256SUMS"
LARGEST = 1e6  # of standardised inputs

ARRAYS = "inputs", "labels", "validation_inputs", "validation_labels"


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
    target: float | None  # validation accuracy; None where nobody has said
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
        return int(max(self.labels.max(), self.validation_labels.max())) + 1

    @cached_property
    def sha256(self) -> str:
        """Of all inputs and labels."""
        return digest({key: getattr(self, key) for key in ARRAYS})


def names() -> list[str]:
    """Names of all tasks, the user's own last."""
    return [*RECIPES, *sorted(path.stem for path in _own_folder().glob("*.safetensors"))]


def load(name: str) -> Task:
    """A task by name; raises `DataError` where its file is damaged, or its data set is absent."""
    if name in RECIPES:
        return _load(name)
    if name not in names():
        raise ValueError(f"task={name!r} is not one of {', '.join(names())}; tasks.build makes one of your own")
    return _load_own(name)


def build(name: str, inputs: Any, labels: Any, seed: int = 0) -> Task:
    """Make a small task of your own data, keep it in the user's cache, and return it.

    `inputs [n, ...]` are numbers of any shape, or images `[n, h, w]` or `[n, c, h, w]`; `labels [n]` are integers from
    0. At most 12,000 inputs are drawn to train on and 1,000 to validate on. Images become thumbnails of at most 7 x 7
    pixels, other inputs of more than 64 numbers their 64 principal components. Raises `ValueError` for other data.
    """
    inputs, labels = np.asarray(inputs, dtype=np.float32), np.asarray(labels)
    _check_own(name, inputs, labels)
    rows = np.random.default_rng(seed).permutation(len(labels))
    held_out = min(OWN_INPUTS[1], len(rows) // 4)
    train, validation = rows[held_out:][: OWN_INPUTS[0]], rows[:held_out]
    reduced = _reduced(inputs[np.concatenate([train, validation])], len(train))
    classes, places = np.unique(labels, return_inverse=True)
    arrays = {
        "inputs": reduced[: len(train)], "labels": places[train].astype(np.int64),
        "validation_inputs": reduced[len(train) :], "validation_labels": places[validation].astype(np.int64),
    }  # fmt: skip
    if len(classes) < 2:
        raise ValueError(f"labels: all are {classes[0]}; a task needs at least 2 classes")
    from safetensors.numpy import save

    write_bytes(_own_folder() / f"{name}.safetensors", save(arrays, sealed(arrays)))
    return _load_own(name)


def _check_own(name: str, inputs: np.ndarray, labels: np.ndarray) -> None:
    if name in RECIPES or not NAME.fullmatch(name) or len(name) > 100:
        raise ValueError(f"name={name!r}: must be letters, digits, '.', '_' or '-', and none of {', '.join(RECIPES)}")
    if inputs.ndim < 2 or labels.shape != (len(inputs),) or labels.dtype.kind not in "iu" or len(labels) < LEAST:
        raise ValueError(
            f"inputs must be [n, ...] and labels [n] integers, n >= {LEAST}; got {inputs.shape} and {labels.shape} "
            f"{labels.dtype}"
        )
    if not np.isfinite(inputs).all():
        raise ValueError("inputs: not all are finite")


def _reduced(inputs: np.ndarray, fitted: int) -> np.ndarray:
    """Inputs `[n, D]` of few numbers, standardised by the first `fitted` of them."""
    if inputs.ndim in (3, 4) and max(inputs.shape[-2:]) > THUMBNAIL:
        import torch

        images = torch.from_numpy(inputs if inputs.ndim == 4 else inputs[:, None])
        size = (min(THUMBNAIL, images.shape[2]), min(THUMBNAIL, images.shape[3]))
        inputs = torch.nn.functional.adaptive_avg_pool2d(images, size).numpy()
    flat = inputs.reshape(len(inputs), -1)
    if flat.shape[1] > PROJECTED and inputs.ndim not in (3, 4):
        mean = flat[:fitted].mean(0)
        flat = (flat - mean) @ np.linalg.svd(flat[: min(fitted, 4_000)] - mean, full_matrices=False)[2][:PROJECTED].T
    mean, deviation = flat[:fitted].mean(0), flat[:fitted].std(0)
    found: np.ndarray = (flat - mean) / (deviation + SOFTENING * max(float(deviation.max()), 1e-12))
    return np.ascontiguousarray(found, dtype=np.float32)


def _own_folder() -> Path:
    return cache_folder() / "tasks"


def _load_own(name: str) -> Task:
    _, arrays = read_arrays(_own_folder() / f"{name}.safetensors", DataError, "build the task again")
    if not _whole(arrays):
        raise DataError(f"{_own_folder() / name}.safetensors is not of tasks.build: build the task again")
    for values in arrays.values():
        values.flags.writeable = False
    count, held_out = len(arrays["labels"]), len(arrays["validation_labels"])
    recipe = TaskRecipe("own", 1, 1, count, held_out, subset=min(count, 4_000), target=None, steps=10)
    return Task(name, recipe, *(arrays[key] for key in ARRAYS))


def _whole(arrays: dict[str, np.ndarray]) -> bool:
    """Whether these are the arrays of `build`: inputs that are standardised, and as many labels, from 0."""
    if {(key, each.ndim, str(each.dtype)) for key, each in arrays.items()} != {
        (key, 1 if "labels" in key else 2, "int64" if "labels" in key else "float32") for key in ARRAYS
    }:
        return False
    inputs, labels, others, more = (arrays[key] for key in ARRAYS)
    return (
        min(inputs.size, others.size) > 0
        and inputs.shape[1] == others.shape[1]
        and (len(labels), len(more)) == (len(inputs), len(others))
        and bool((np.abs(inputs) < LARGEST).all() and (np.abs(others) < LARGEST).all())
        and 0 <= min(labels.min(), more.min()) <= max(labels.max(), more.max()) < len(inputs) + len(others)
    )


@cache
def _load(name: str) -> Task:
    from safetensors.numpy import load as parse

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
    return read_verified(path, lines.get(path.name, ""), DataError, mend)
