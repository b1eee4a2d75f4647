"""Bundles: a trained MoE with everything an environment needs, in safetensors + JSON, checked by SHA-256.

A bundle is a folder: `bundle.json` (metadata), `model.safetensors` (weights and feature projection), one safetensors
file for each of `rl_train`, `validation` and `test`, `profile.json` where its costs were measured, and `SHA256SUMS`,
which covers them all and which `sha256sum -c` understands. Loading imports neither torch nor pickle.
"""

from experts.bundle.build import Measured, build
from experts.bundle.read import (
    FEATURE_BOUND,
    METADATA,
    PROFILE,
    SPLITS,
    Bundle,
    BundleError,
    Split,
    load,
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
