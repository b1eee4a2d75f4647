"""Models as files: a safetensors file of the weights, with the arguments that make the model and a SHA-256 of both."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_bytes
from torch import nn

from cost.files import digest, write_bytes
from experts.data import DataError

Model = TypeVar("Model", bound=nn.Module)


def save_model(model: Any, path: Path) -> None:
    """Write a model's weights, float32, and its `settings`: a `MoENetwork`, a `MoEClassifier` or a `ConvMoEClassifier`;
    raises `ValueError` for a router without a name."""
    if callable(model.settings.get("router")):
        raise ValueError("a router of your own is not written: save the state_dict, and make the network yourself")
    settings = json.dumps({"class": type(model).__name__, **model.settings})
    weights = {name: each.float().cpu().contiguous() for name, each in model.state_dict().items()}
    write_bytes(path, to_bytes(weights, {"settings": settings, "sha256": _digest(settings, weights)}))


def load_model(path: Path, kind: type[Model]) -> Model:
    """A model of `save_model`, of this class; raises `DataError` where the file is damaged or foreign."""
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            weights = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise DataError(f"{path} is not a model's file ({error})") from error
    text = metadata.get("settings", "")
    known = all(each.dtype == torch.float32 for each in weights.values())
    if not known or metadata.get("sha256") != _digest(text, weights):
        raise DataError(f"{path} is damaged or not of save_model")
    settings = json.loads(text)
    if (name := settings.pop("class", "model of another format")) != kind.__name__:
        raise DataError(f"{path} holds a {name}, not a {kind.__name__}")
    with torch.random.fork_rng(devices=[]):  # first weights are drawn, and replaced
        model = kind(**settings)
    model.load_state_dict(weights)
    return model.eval()


def _digest(settings: str, weights: Mapping[str, torch.Tensor]) -> str:
    return hashlib.sha256(f"{settings}{digest(weights)}".encode()).hexdigest()
