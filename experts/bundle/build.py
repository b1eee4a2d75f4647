"""Building a bundle from arrays, or from a model of one's own."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from cost.files import replacing, sha256_of, sums_of, write_bytes
from cost.machine import source_commit
from experts import zoo
from experts.bundle import subsets
from experts.bundle.read import (
    FORMAT,
    METADATA,
    MODEL,
    PROFILE,
    SPLITS,
    SUMS,
    Bundle,
    Split,
    load,
    project,
)
from experts.bundle.tabulate import estimated, principal_components, tabulated

if TYPE_CHECKING:
    from experts.model import MoEModel
    from experts.training import TrainingSettings

FEWEST = 8  # inputs of rl_train, for the folds of the estimates


class Measured(Protocol):
    """A profile, as `cost.profile.Profile` is."""

    def model_dump(self, *, mode: str) -> dict[str, Any]: ...


def build(
    name: str,
    inputs: np.ndarray,
    labels: np.ndarray,
    model: MoEModel | None = None,
    *,
    splits: dict[str, np.ndarray] | None = None,
    settings: TrainingSettings | None = None,
    num_features: int = 32,
    profile: Callable[[MoEModel, np.ndarray], Measured] | None = None,
    data: dict[str, Any] | None = None,
    folder: Path | None = None,
    overwrite: bool = False,
    progress: bool = True,
) -> Bundle:
    """Train an MoE on your arrays (or take your trained `model`), tabulate it, save it as a bundle and return it.

    Outcomes are tabulated for all subsets of up to 10 experts, and for single experts and pairs of 11 to 32.

    By default, the training ends when the loss on held-out inputs stops falling; a warning says if a linear model is
    better.

    `inputs` is `[n, ...]` of numbers (rows are flattened, a torch model of your own gets them flat), `labels` `[n]` of
    classes 0..C-1. `splits` gives the row indices of train, rl_train, validation and test (default: a random 40, 40, 8
    and 12 %). `profile`, as `cost.profile.measure_experts`, measures the reference costs; without it they are measured
    at first use, which a model of your own rules out: its code is not in the bundle.
    `data` is put into the metadata. The bundle goes to `folder` / name, by default into the user's cache.
    """
    import torch

    from experts import model as models
    from experts import training
    from experts.bundle.answers import answers
    from experts.routers import top_k

    if model is not None and profile is None:
        raise ValueError("a model of your own needs profile=cost.profile.measure_experts")
    x, y = _checked_arrays(inputs, labels)
    target = (folder or zoo.user_folder()) / name
    _check_target(name, target, shipped=folder is None, overwrite=overwrite)
    rows = splits or _default_splits(len(x))
    settings = settings or training.TrainingSettings()
    _check_splits(rows, len(x))
    trained = training.train(x[rows["train"]], y[rows["train"]], settings, progress) if model is None else model
    trained.eval()
    mean, projection = principal_components(x[rows["train"]], num_features)
    tables, accuracy = {}, {}
    linear = training.linear_model(x[rows["train"]], y[rows["train"]])
    for split in SPLITS:
        gate, outputs, answer, summed = answers(trained, torch.from_numpy(x[rows[split]]))
        if gate.shape[1] > subsets.MAX_EXPERTS:
            raise ValueError(f"{gate.shape[1]} experts: a bundle has at most {subsets.MAX_EXPERTS}")
        label = y[rows[split]]
        features = project(x[rows[split]], mean, projection)
        tables[split] = tabulated(features, gate.numpy(), outputs.numpy(), label, None if summed else answer)
        for k in (1, 2):
            members = top_k(gate, min(k, gate.shape[1]))
            with torch.inference_mode():
                chosen = answer(slice(0, len(label)), members[None])[0].argmax(-1).numpy()
            accuracy[f"{split}/top-{k}"] = float((chosen == label).mean())
        accuracy[f"{split}/linear"] = float((linear(x[rows[split]]) == label).mean())
    _warn_of_linear(accuracy, len(tables["rl_train"].labels))
    estimator, tables = estimated(tables)
    metadata = {
        "format": FORMAT,
        "name": name,
        "num_experts": int(gate.shape[1]),
        "num_classes": int(outputs.shape[2]),
        "architecture": trained.settings if isinstance(trained, models.MoEClassifier) else None,
        "training": asdict(settings) if model is None else None,
        "rows": {split: len(indices) for split, indices in rows.items()},
        "accuracy": accuracy,
        "data": data or {"sha256": sha256_of(x.tobytes() + y.tobytes())},
        "commit": source_commit(),
    }
    constants = {
        "features.mean": mean,
        "features.projection": np.ascontiguousarray(projection),
        "examples": np.resize(x[rows["train"]], (64, x.shape[1])),
        **{f"estimator.{name}": value.numpy() for name, value in estimator.state_dict().items()},
    }
    measured = profile(trained, constants["examples"]).model_dump(mode="json") if profile else None
    _write(target, metadata, trained, constants, tables, measured)
    return load(target)


def _warn_of_linear(accuracy: dict[str, float], count: int) -> None:
    """Warn if a logistic regression is better than the model by more than two standard errors."""
    linear, model = accuracy["rl_train/linear"], accuracy["rl_train/top-2"]
    if linear - model > 2 * (linear * (1 - linear) / count) ** 0.5 + 0.005:
        warnings.warn(
            f"a linear model is better than this mixture of experts: {linear:.3f} against {model:.3f} of rl_train are "
            "right; train it longer, or give it wider experts",
            stacklevel=3,
        )


def _checked_arrays(inputs: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    x = np.ascontiguousarray(np.asarray(inputs).reshape(len(inputs), -1), dtype=np.float32)
    y = np.asarray(labels)
    if y.shape != (len(x),) or not np.issubdtype(y.dtype, np.integer) or y.min() < 0 or y.max() >= 2**15:
        raise ValueError(
            f"labels must be {len(x)} integers 0..32767, one for each input; got {y.dtype} of shape {y.shape}"
        )
    if not np.isfinite(x).all():
        raise ValueError("inputs contain NaN or infinity")
    return x, y.astype(np.int64)


def _check_target(name: str, target: Path, *, shipped: bool, overwrite: bool) -> None:
    if not zoo.NAME.fullmatch(name):
        raise ValueError(f"bundle name {name!r}: letters, digits, '.', '_' and '-' only")
    if shipped and name in (*zoo.shipped(), *zoo.MADE):
        raise ValueError(f"{name!r} is a reference bundle; choose another name")
    if target.exists() and not overwrite:
        raise ValueError(f"{target} exists; pass overwrite=True to replace it")


def _default_splits(count: int) -> dict[str, np.ndarray]:
    from experts.data import split_indices

    train, rl_train, validation = int(count * 0.4), int(count * 0.4), int(count * 0.08)
    return split_indices(count, (train, rl_train, validation, count - train - rl_train - validation))


def _check_splits(splits: dict[str, np.ndarray], count: int) -> None:
    if set(splits) != {"train", *SPLITS} or min(map(len, splits.values())) < 1:
        raise ValueError(f"splits must give rows of train, {', '.join(SPLITS)}; got {sorted(splits)}")
    if len(splits["rl_train"]) < FEWEST:
        raise ValueError(f"splits must give at least {FEWEST} rows of rl_train, got {len(splits['rl_train'])}")
    rows = np.concatenate(list(splits.values()))
    if len(set(rows.tolist())) != len(rows) or rows.min() < 0 or rows.max() >= count:
        raise ValueError(f"splits must be disjoint and of rows 0..{count - 1}")


def _write(
    target: Path,
    metadata: dict[str, Any],
    model: MoEModel,
    constants: dict[str, np.ndarray],
    tables: dict[str, Split],
    profile: dict[str, Any] | None,
) -> None:
    from safetensors.numpy import save

    weights = {f"model.{k}": v.numpy().copy() for k, v in model.state_dict().items()}
    members = {
        METADATA: json.dumps(metadata, indent=1).encode(),
        MODEL: save(weights | constants),
        **{f"{name}.safetensors": save(vars(split)) for name, split in tables.items()},
    }
    if profile is not None:
        members[PROFILE] = json.dumps(profile, indent=1).encode()
    with replacing(target) as new:
        for file, raw in (members | {SUMS: sums_of(members)}).items():
            write_bytes(new / file, raw)
        load(new)  # before it replaces a bundle that can be loaded
