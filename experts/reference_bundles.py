"""Reference bundles and their training. Some are shipped; others are built on first use."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from filelock import FileLock

from experts import data, zoo
from experts.bundle.build import Measured
from experts.bundle.build import build as build_bundle
from experts.bundle.read import METADATA, PROFILE, Bundle
from experts.training import TrainingSettings

if TYPE_CHECKING:
    from experts.model import MoEModel

WIDTHS = (4, 4, 8, 8, 16, 16, 32, 64)
SETTINGS = {
    "digits": TrainingSettings(widths=(2, 2, 4, 4, 8, 8, 16, 16), epochs=60, batch_size=32, standardize=False),
    "fashion-mnist": TrainingSettings(widths=WIDTHS, epochs=5, standardize=False),
    "fashion-mnist-graph": TrainingSettings(widths=WIDTHS, epochs=5, standardize=False, graph={"mode": "weighted"}),
}
log = logging.getLogger("moe_envs")


class Shipped:
    """A profile that is shipped, as JSON; it stands in for one that is measured."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def model_dump(self, *, mode: str) -> dict[str, Any]:
        """Its content."""
        content: dict[str, Any] = json.loads(self.path.read_text())
        return content


def profile_path(name: str) -> Path:
    """Path of the reference profile of a bundle of `MADE`."""
    return zoo.ASSETS / "_bundles" / f"{name}.profile.json"


def build(
    name: str, folder: Path, profile: Callable[[MoEModel, np.ndarray], Measured], progress: bool = True
) -> Bundle:
    """Train and tabulate a reference bundle into `folder` / name, replacing what is there; raises `ValueError` for
    another name."""
    if name not in SETTINGS:
        raise ValueError(f"{name!r} is not a reference bundle; there are {', '.join(SETTINGS)}")
    source = data.load(name.removesuffix("-graph"))
    return build_bundle(
        name, source.inputs, source.labels, splits=source.splits, settings=SETTINGS[name], profile=profile,
        data={"name": source.name, "sha256": source.sha256}, folder=folder, overwrite=True, progress=progress,
    )  # fmt: skip


def _is_current(path: Path, name: str) -> bool:
    try:
        trained = json.loads((path / METADATA).read_text())["training"]
        profile = json.loads((path / PROFILE).read_text())
    except (OSError, ValueError, KeyError, TypeError):
        return False
    wanted = json.loads(json.dumps(asdict(SETTINGS[name])))
    return bool(trained == wanted and profile == Shipped(profile_path(name)).model_dump(mode="json"))


def made(name: str) -> Path:
    """The folder of a bundle of `zoo.MADE` in the user's cache, trained if it is not there, or if other settings or
    another profile made what is there."""
    path = zoo.user_folder() / name
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{path}.lock"):  # one process trains, the others wait
        if not _is_current(path, name):
            log.warning("training the bundle %r into %s, once; half a minute", name, path)
            build(name, path.parent, lambda model, inputs: Shipped(profile_path(name)), progress=False)
    return path
