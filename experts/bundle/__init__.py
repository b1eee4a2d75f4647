"""Bundles: a trained MoE with everything an environment needs, in safetensors + JSON, checked by SHA-256.

A bundle is a folder: `bundle.json` (metadata), `model.safetensors` (weights and feature projection), one safetensors
file for each of `rl_train`, `validation` and `test`, `profile.json` where its costs were measured, and `SHA256SUMS`,
which covers them all and which `sha256sum -c` understands. Loading imports neither torch nor pickle.
"""

from pathlib import Path

from experts import zoo
from experts.bundle import read
from experts.bundle.build import Measured, build
from experts.bundle.read import (
    FEATURE_BOUND,
    METADATA,
    PROFILE,
    SPLITS,
    Bundle,
    BundleError,
    Split,
    project,
)

__all__ = [
    "FEATURE_BOUND",
    "METADATA",
    "PROFILE",
    "SPLITS",
    "Bundle",
    "BundleError",
    "Measured",
    "Split",
    "build",
    "load",
    "project",
]


def load(name: str | Path) -> Bundle:
    """The bundle of that name or in that folder, every byte verified; one of `zoo.MADE` is trained when first asked
    for, which takes half a minute. Raises `BundleError` for what is damaged, `ValueError` for an unknown name."""
    if str(name) in zoo.MADE:
        from experts import reference_bundles

        return read.load(reference_bundles.made(str(name)))
    return read.load(name)
