"""Models as files: a safetensors file of the weights, with the arguments that make the model and a SHA-256 of both."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors.torch import save as to_bytes
from torch import nn

from cost.arguments import one_line
from cost.files import read_arrays, sealed, write_bytes
from experts.data import DataError

Model = TypeVar("Model", bound=nn.Module)
MOST = 2**20  # of inputs, units or experts


def save_model(model: Any, path: Path) -> None:
    """Write a model's weights, float32, and its `settings`: a `MoENetwork`, a `MoEClassifier` or a `ConvMoEClassifier`;
    raises `ValueError` for a router without a name."""
    if callable(model.settings.get("router")):
        raise ValueError("a router of your own is not written: save the state_dict, and make the network yourself")
    settings = json.dumps({"class": type(model).__name__, **model.settings})
    weights = {name: each.float().cpu().contiguous() for name, each in model.state_dict().items()}
    write_bytes(path, to_bytes(weights, sealed(weights, settings)))


def load_model(path: Path, kind: type[Model]) -> Model:
    """A model of `save_model`, of this class; raises `DataError` where the file is damaged or foreign."""
    metadata, arrays = read_arrays(path, DataError, "save the model again")
    weights = {name: torch.from_numpy(each) for name, each in arrays.items()}
    text = metadata.get("settings", "")
    if not text or any(each.dtype != torch.float32 for each in weights.values()):
        raise DataError(f"{path} is not of save_model")
    try:
        settings = json.loads(text)
        if (name := settings.pop("class", "model of another format")) != kind.__name__:
            raise DataError(f"{path} holds a {name}, not a {kind.__name__}")
        if not all(bool(each.isfinite().all()) for each in weights.values()):
            raise ValueError("weights are not finite")
        _require_bounded(settings)
        with torch.random.fork_rng(devices=[]):  # first weights are drawn, and replaced
            model = kind(**settings)
        model.load_state_dict(weights)
    except (ValueError, TypeError, KeyError, AttributeError, RuntimeError, IndexError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{path} holds no {kind.__name__}: {one_line(error)}") from error
    return model.eval()


def _require_bounded(value: Any) -> None:
    """Raise `ValueError` for settings with sizes that no model of ours has, before memory is taken for them."""
    if isinstance(value, dict | list):
        for each in value.values() if isinstance(value, dict) else value:
            _require_bounded(each)
    elif isinstance(value, int | float) and not abs(value) <= MOST:
        raise ValueError(f"a size of {value}")
