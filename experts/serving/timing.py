"""How long batches of a model take at each quality level: a profile, shipped with the language model or measured."""

from __future__ import annotations

import importlib.metadata
import json
from collections.abc import Callable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from cost import profile as profiles
from cost.files import sha256_of
from cost.profile import Profile
from experts import language
from experts.profiles import shipped_or_measured
from experts.serving import served as models
from experts.serving.control import Service
from experts.serving.served import Served

SIZES = (1, 4, 16, 64)  # rows
FILE = "serving.json"  # in a language model's folder


def service_of(model: str, costs: str) -> Service:
    """Times and energies of batches of a model that is served, by name or folder, of the shipped profile
    (`costs="reference"`) or this machine's (`"machine"`, and where none is shipped)."""
    found = _loaded(model)
    folder = language.find(model)
    shipped = folder / FILE if (folder / FILE).exists() else None
    name = f"serving-{_identity(found.manifest)}-{Path(model).name}"
    profile = shipped_or_measured(name, "batches", shipped, costs, lambda: measure_service(found))
    operations = [profile.operations[f"batch {level}"] for level in found.levels]
    seconds = np.array([operation.median for operation in operations])
    joules = np.array([[each.energy.fixed + each.energy.slope * n for n in SIZES] for each in operations])
    return Service(found.levels, SIZES, np.minimum.accumulate(seconds), np.array(found.quality), joules)


def _identity(manifest: Mapping[str, Any]) -> str:
    """Of a model whose times are kept; those of an exported file are its runtime's, too."""
    if "files" not in manifest:
        return str(manifest["version"].partition("+")[2])
    said = [manifest["files"], importlib.metadata.version("onnxruntime")]
    return sha256_of(json.dumps(said).encode())[:12]


@lru_cache(maxsize=4)
def _loaded(model: str) -> Served:
    return models.load(model)


def measure_service(served: Served, progress: bool = False) -> Profile:
    """Measure batches of 1 to 64 rows at each level, in one thread."""
    works = {f"batch {name}": _work(served, level) for level, name in enumerate(served.levels)}
    return profiles.measure(works, sizes=SIZES, progress=progress)


def _work(served: Served, level: int) -> Callable[[int], Callable[[], object]]:
    def work(rows: int) -> Callable[[], object]:
        inputs = served.examples(rows)
        return lambda: served.run(inputs, level)

    return work
