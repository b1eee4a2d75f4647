"""Reference models to compress: a convolutional Mixture of Experts on Fashion-MNIST, a plain one on the digits.

Of each there are several, from different seeds: "fashion-mnist-conv" is seed 0, "fashion-mnist-conv-2" seed 2. Some
come with the package; others are trained when they are first asked for, and kept in the user's cache.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from filelock import FileLock
from rich.progress import Progress
from safetensors.numpy import save as numpy_bytes
from safetensors.torch import save as to_bytes

from cost.arguments import short
from cost.files import read_arrays, sealed, write_bytes
from experts import data, zoo
from experts.data import DataError
from experts.losses import load_balancing_loss
from experts.model import ConvMoEClassifier, MoEClassifier, mix
from experts.routers import top_k
from experts.threads import reproducible

FOLDER = zoo.ASSETS / "_models"
CALIBRATION = 512
log = logging.getLogger("moe_envs")
Model = ConvMoEClassifier | MoEClassifier


@dataclass(frozen=True)
class ModelRecipe:
    """Data set, the largest value of a pixel, and model; how it is trained: AdamW, one cycle of the rate up to `rate`,
    label smoothing, load balancing; images mirrored and moved by up to `shift` pixels."""

    source: str
    levels: int
    convolutional: bool
    settings: dict[str, Any]
    epochs: int
    rate: float = 2e-3
    decay: float = 0.05
    batch_size: int = 128
    smoothing: float = 0.05
    balancing: float = 0.02
    shift: int = 0
    mirror: bool = False


RECIPES = {
    "fashion-mnist-conv": ModelRecipe("fashion-mnist", 255, True, {}, epochs=14, rate=4e-3, shift=1, mirror=True),
    "digits-mlp": ModelRecipe(
        "digits", 16, False, {"widths": (64,) * 8, "trunk": 96}, epochs=150, rate=5e-3, decay=0.1, batch_size=64
    ),
}


class Examples(NamedTuple):
    """Inputs to calibrate with, from the split `train`, and the split `validation`; `[n, d]` float32, `[n]` int64."""

    calibration: np.ndarray
    inputs: np.ndarray
    labels: np.ndarray

    def half(self, split: str) -> tuple[np.ndarray, np.ndarray]:
        """Inputs and labels of the first half ("train", plans are searched by it) or of the second ("validation")."""
        middle = len(self.labels) // 2
        rows = slice(None, middle) if split == "train" else slice(middle, None)
        return self.inputs[rows], self.labels[rows]


def examples(name: str) -> Examples:
    """What a reference model is compressed by; shipped ones need no data set."""
    kind, recipe = recipe_of(name)
    path = FOLDER / f"{kind}.examples.safetensors"
    arrays = read_arrays(path, DataError, "install moe-envs anew")[1] if path.exists() else _examples(recipe)
    scale = np.float32(recipe.levels)
    return Examples(arrays["calibration"] / scale, arrays["inputs"] / scale, arrays["labels"].astype(np.int64))


def _examples(recipe: ModelRecipe) -> dict[str, np.ndarray]:
    found = data.load(recipe.source)
    inputs, labels = found["validation"]
    given = {"calibration": found["train"][0][:CALIBRATION], "inputs": inputs}
    return {key: np.rint(values * recipe.levels).astype(np.uint8) for key, values in given.items()} | {
        "labels": labels.astype(np.uint8)
    }


def ship_examples(kind: str) -> None:
    """Write a recipe's examples into the package; needs the data set."""
    arrays = _examples(RECIPES[kind])
    raw = numpy_bytes(arrays, sealed(arrays))
    write_bytes(FOLDER / f"{kind}.examples.safetensors", raw)


def recipe_of(name: str) -> tuple[str, ModelRecipe]:
    """The recipe of a reference model, and its name."""
    kind, _ = _parse(name)
    return kind, RECIPES[kind]


def full_name(name: str) -> str:
    """The name with its seed: the same for the same model."""
    kind, seed = _parse(name)
    return f"{kind}-{seed}"


def load(name: str) -> Model:
    """A reference model in evaluation mode, by name; raises `DataError` where its file is damaged."""
    recipe, seed = _parse(name)
    shipped, cached = (folder / f"{recipe}-{seed}.safetensors" for folder in (FOLDER, zoo.cache_folder() / "models"))
    path = shipped if shipped.exists() else cached
    if not path.exists():
        with _locked(path):  # one process trains, the others wait and read
            if not path.exists():
                log.warning("training %s, seed %d, into %s: minutes for images", recipe, seed, path)
                save(train(name), name, path)
    return _read(path, recipe, seed)


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """A lock beside a file; raises `DataError` before anything is made where the folder cannot be written."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(f"{path}.lock")
        lock.acquire()
    except OSError as error:
        raise DataError(
            f"{path.parent} cannot be written ({error.strerror}): set MOE_ENVS_CACHE to a folder"
        ) from error
    try:
        yield
    finally:
        lock.release()


def train(name: str, progress: bool = True) -> Model:
    """Train a reference model anew, on the splits `train` and `rl_train`; the same bits for the same machine."""
    (_, recipe), (_, seed) = recipe_of(name), _parse(name)
    with reproducible(seed):
        return _trained(_make(recipe), recipe, progress)


def upcycle(name: str, progress: bool = True) -> Model:
    """A model like a reference model whose experts were one (Komatsuzaki et al. 2023): a model with a single expert is
    trained, its expert is copied, and all are trained on for as long. Kept in the user's cache."""
    (kind, recipe), (_, seed) = recipe_of(name), _parse(name)
    path = zoo.cache_folder() / "models" / f"{kind}-upcycled-{seed}.safetensors"
    with reproducible(seed):
        model = _make(recipe)
        if path.exists():
            model.load_state_dict(_weights(path, "delete it, and it is made anew")[1])
            return model.eval()
        experts = len(model.experts)
        one = _trained(_make(recipe, widths=model.experts.widths[:1]), recipe, progress)
        copies = {
            "experts.hidden.weight": (experts, 1), "experts.hidden.bias": (experts,), "experts.out_HC": (experts, 1),
            "experts.bias_EC": (experts, 1),
        }  # fmt: skip
        weights = {key: value.repeat(copies.get(key, (1,) * value.ndim)) for key, value in one.state_dict().items()}
        weights |= {key: value for key, value in model.state_dict().items() if key.startswith("gate")}
        model.load_state_dict(weights)
        model = _trained(model.train(), recipe, progress)
    weights = {key: tensor.contiguous() for key, tensor in model.state_dict().items()}
    write_bytes(path, to_bytes(weights, sealed(weights)))
    return model


def _trained(model: Model, recipe: ModelRecipe, progress: bool) -> Model:
    found = data.load(recipe.source)
    split = np.concatenate([found.splits["train"], found.splits["rl_train"]])
    x, y = torch.from_numpy(found.inputs[split]), torch.from_numpy(found.labels[split])
    steps = len(x) // recipe.batch_size
    optimizer = torch.optim.AdamW(model.parameters(), recipe.rate, weight_decay=recipe.decay)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, recipe.rate, total_steps=recipe.epochs * steps)
    with Progress(disable=not progress) as bar:
        for _ in bar.track(range(recipe.epochs), description="training a reference model"):
            for rows in torch.randperm(len(x)).split(recipe.batch_size)[:steps]:
                h = model.trunk(augmented(x[rows], recipe))
                gate = model.gate(h)
                chosen = top_k(gate, min(2, gate.shape[1]))
                loss = F.cross_entropy(mix(gate, model.experts(h), chosen), y[rows], label_smoothing=recipe.smoothing)
                loss = loss + recipe.balancing * load_balancing_loss(gate, chosen)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
    return model.eval()


def augmented(x: torch.Tensor, recipe: ModelRecipe) -> torch.Tensor:
    """Inputs `[n, d]` mirrored and moved as the recipe says, from torch's global generator."""
    side, shift = int(x.shape[1] ** 0.5), recipe.shift
    images = x.reshape(-1, side, side)
    if recipe.mirror:
        images = torch.where(torch.rand(len(images), 1, 1) < 0.5, images.flip(2), images)
    down, right = torch.randint(0, 2 * shift + 1, (2,)).tolist()
    return F.pad(images, (shift,) * 4)[:, down : down + side, right : right + side].reshape(len(x), -1)


def save(model: Model, name: str, path: Path) -> None:
    """Write a model's weights, with its name and their SHA-256."""
    kind, seed = _parse(name)
    weights = {key: tensor.contiguous() for key, tensor in model.state_dict().items()}
    write_bytes(path, to_bytes(weights, sealed(weights, f"{kind}-{seed}")))


def read(path: Path) -> tuple[Model, str]:
    """A model of `save`, and its name; raises `DataError` where the file is damaged or foreign."""
    metadata, weights = _weights(path, "take another file")
    if set(metadata) == {"model", "seed", "sha256"}:  # of before: its name is not in its SHA-256
        name = f"{metadata['model']}-{metadata['seed']}"
    elif set(metadata) == {"settings", "sha256"}:
        name = metadata["settings"]
    else:
        raise DataError(f"{path} is not of a reference model")
    try:
        with torch.random.fork_rng(devices=[]):  # its first weights are drawn, and replaced
            model = _make(recipe_of(name)[1])
        model.load_state_dict(weights)
    except (ValueError, RuntimeError) as error:
        raise DataError(f"{path} holds other weights than those of {name}") from error
    return model.eval(), name


def _read(path: Path, kind: str, seed: int) -> Model:
    try:
        model, name = read(path)
    except DataError as error:
        raise DataError(f"{error}: delete it, and it is made anew") from error
    if name != f"{kind}-{seed}":
        raise DataError(f"{path} is of {name}: delete it, and it is made anew")
    return model


def _weights(path: Path, mend: str) -> tuple[dict[str, str], dict[str, torch.Tensor]]:
    metadata, arrays = read_arrays(path, DataError, mend)
    return metadata, {name: torch.from_numpy(each) for name, each in arrays.items()}


def _make(recipe: ModelRecipe, **others: Any) -> Model:
    side = {"fashion-mnist": 28, "digits": 8}[recipe.source]
    return (ConvMoEClassifier if recipe.convolutional else MoEClassifier)(side**2, 10, **recipe.settings | others)


def _parse(name: str) -> tuple[str, int]:
    found = re.fullmatch(r"([a-z-]+?)(?:-([0-9]{1,9}))?", name)
    if found is None or found[1] not in RECIPES:
        known = ", ".join(RECIPES)
        raise ValueError(f"model={short(name)} is not one of {known}, with -1, -2 and so on for other seeds")
    return found[1], int(found[2] or 0)
