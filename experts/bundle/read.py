"""Bundle format and loading, without importing torch or pickle."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field, fields
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
from annotated_types import Ge, Le
from pydantic import BaseModel, ConfigDict, ValidationError

from cost.arguments import one_line, short
from cost.files import healed, read_verified, sha256_of, sums_of
from experts import zoo
from experts.bundle import context, subsets

if TYPE_CHECKING:
    from torch import nn

    from experts.bundle.estimates import Estimator
    from experts.model import MoEModel

FORMAT = 2  # 1 had no estimates
SPLITS = ("rl_train", "validation", "test")
SUMS, METADATA, MODEL, PROFILE = "SHA256SUMS", "bundle.json", "model.safetensors", "profile.json"
FEATURE_BOUND = 5.0
Size = Annotated[int, Ge(1), Le(2**20)]


class Architecture(BaseModel):
    """Arguments of an `experts.model.MoEClassifier`."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    num_inputs: Size
    num_classes: Size
    widths: list[Size]
    trunk: Annotated[int, Ge(0), Le(2**20)] = 0
    graph: dict[str, str | int | float | bool | None] | None = None
    standardize: bool = False

    @property
    def parameters(self) -> int:
        """A lower bound of the number of parameters."""
        hidden = self.trunk or self.num_inputs
        return self.num_inputs * self.trunk + sum(self.widths) * (hidden + self.num_classes)


class Metadata(BaseModel):
    """What `bundle.json` must hold; `training` and `data` are for the reader only."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    format: Literal[2]
    name: str
    num_experts: Annotated[int, Ge(1), Le(subsets.MAX_EXPERTS)]
    num_classes: Annotated[int, Ge(2), Le(2**15)]
    architecture: Architecture | None
    training: dict[str, Any] | None
    rows: dict[str, Annotated[int, Ge(1)]]
    accuracy: dict[str, Annotated[float, Ge(0), Le(1)]]
    data: dict[str, Any]
    commit: str | None


class BundleError(RuntimeError):
    """A bundle is absent, damaged or foreign; the message names the file and the cause."""


@dataclass(frozen=True)
class Split:
    """Tables of n inputs: features `[n, F]` float16, gate logits `[n, E]` float32, labels `[n]` int16, estimates of
    each expert's P(correct) `[n, E]` float16 (cross-fitted on `rl_train`), the experts' class logits `[n, E, C]` int8
    in units of `output_scale`, and outcomes `[n, ceil(S / 8)]` uint8: bit s of row i says whether the experts of the
    s-th of `experts.bundle.subsets.tabulated`, mixed by the gate, classify input i correctly. Outcomes are of the exact
    logits."""

    features: np.ndarray
    gate_logits: np.ndarray
    labels: np.ndarray
    estimates: np.ndarray
    outputs: np.ndarray
    output_scale: np.ndarray
    outcomes: np.ndarray

    @property
    def singles(self) -> np.ndarray:
        """Whether each expert alone is correct, `[n, E]` uint8."""
        experts = self.gate_logits.shape[1]
        codes = subsets.tabulated(experts)
        outcomes = np.unpackbits(self.outcomes, axis=1, count=len(codes), bitorder="little")
        return outcomes[:, np.searchsorted(codes, subsets.singles(experts))]

    @property
    def logits(self) -> np.ndarray:
        """The experts' class logits `[n, E, C]` float32, to within half of `output_scale`."""
        return self.outputs * self.output_scale


@dataclass(frozen=True)
class Bundle:
    """Verified bundle on disk; tables and model are loaded on demand."""

    path: Path
    metadata: dict[str, Any] = field(repr=False)
    members: dict[str, bytes] = field(repr=False)

    @property
    def num_experts(self) -> int:
        return int(self.metadata["num_experts"])

    @cached_property
    def sha256(self) -> str:
        """One hash for the model and its tables, the same wherever the bundle lies and whatever its profile."""
        return sha256_of(sums_of({name: raw for name, raw in self.members.items() if name != PROFILE}))

    @property
    def profile(self) -> dict[str, Any] | None:
        """The reference profile as JSON, or None where the bundle was built without one."""
        return json.loads(self.members[PROFILE]) if PROFILE in self.members else None

    def split(self, name: str) -> Split:
        """The tables of `rl_train`, `validation` or `test`."""
        if name not in SPLITS:
            raise ValueError(f"unknown split {name!r}; there are {', '.join(SPLITS)}")
        tensors = self._tensors(f"{name}.safetensors")
        if set(tensors) != {each.name for each in fields(Split)}:
            raise BundleError(f"{self.path}/{name}.safetensors holds {sorted(tensors)}: not the tables of a bundle")
        return Split(**tensors)

    def model(self, module: nn.Module | None = None) -> MoEModel:
        """The trained torch model; for a bundle of your own module pass a fresh one to fill with the weights."""
        import torch

        if module is None:
            if self.metadata["architecture"] is None:
                raise ValueError(f"{self.path.name} holds a module of your own: bundle.model(YourModule())")
            module = self._classifier()
        weights = {k[6:]: torch.from_numpy(v) for k, v in self._tensors(MODEL).items() if k.startswith("model.")}
        try:
            module.load_state_dict(weights)
        except RuntimeError as error:
            raise BundleError(
                f"{self.path / MODEL} holds other weights than this model's: {one_line(error)}"
            ) from error
        return module.eval()  # type: ignore[return-value]

    def estimator(self) -> Estimator:
        """The module that made the `estimates`, for new inputs."""
        import torch

        from experts.bundle.estimates import Estimator

        split = self.split("rl_train")
        weights = {k[10:]: torch.from_numpy(v) for k, v in self._tensors(MODEL).items() if k.startswith("estimator.")}
        try:
            return Estimator.load(split.features, split.singles, weights)
        except RuntimeError as error:
            raise BundleError(f"{self.path / MODEL} holds no estimator of these tables: {one_line(error)}") from error

    def in_batches(self, name: str, deck: np.ndarray) -> np.ndarray:
        """P(correct) of each expert `[b, B, E]` float32 for the inputs of a split in mini-batches `deck [b, B]`."""
        tensors, split = self._tensors(MODEL), self.split(name)
        weights = {each: tensors[f"estimator.context.{each}"] for each in context.NAMES}
        folds = tensors["estimator.fold_N"] if name == "rl_train" else None
        _, gate = context.gate_parts(split.gate_logits)
        return context.in_batches(weights, split.estimates, gate, split.features, deck, folds)

    def _classifier(self) -> nn.Module:
        """The untrained model."""
        import torch

        from experts.model import MoEClassifier

        with torch.random.fork_rng(devices=[]):  # first weights are drawn, and replaced
            return MoEClassifier(**self.metadata["architecture"])

    def features(self, inputs: np.ndarray) -> np.ndarray:
        """The features `[n, F]` of new inputs `[n, d]`, as a policy trained on this bundle sees them."""
        return project(inputs, *self.projection)

    @property
    def projection(self) -> tuple[np.ndarray, np.ndarray]:
        """Mean `[d]` and projection `[d, F]` of `features`."""
        tensors = self._tensors(MODEL)
        return tensors["features.mean"], tensors["features.projection"]

    @cached_property
    def edges(self) -> np.ndarray | None:
        """The edges `[E, E]` of the model's expert graph, rows sum to 1; None where it has none."""
        logits = self._tensors(MODEL).get("model.graph.edges")
        if logits is None:
            return None
        odds = np.exp(logits - logits.max(1, keepdims=True))
        return np.asarray(odds / odds.sum(1, keepdims=True))

    @property
    def examples(self) -> np.ndarray:
        """64 training inputs `[64, d]` float32, for measuring what the model costs."""
        return self._tensors(MODEL)["examples"]

    def _tensors(self, member: str) -> dict[str, np.ndarray]:
        from safetensors import SafetensorError
        from safetensors.numpy import load

        try:
            return load(self.members[member])
        except SafetensorError as error:
            raise BundleError(f"{self.path / member} is not a safetensors file: {error}") from error


def load(name_or_path: str | Path) -> Bundle:
    """The bundle of that name (shipped, or built into the cache) or in that folder, every byte of it verified.

    Raises `BundleError` naming the file and the cause where something is absent, altered, cut short or foreign.
    """
    path = zoo.find(name_or_path)
    if path is None:
        mend = f": moe-bundle rebuild {name_or_path} makes it" if name_or_path in zoo.MADE else ""
        raise BundleError(f"no bundle {short(str(name_or_path))}; there are {', '.join(zoo.names())}{mend}")
    members = _members(path)
    try:
        metadata = json.loads(members[METADATA])
        written_by = metadata["format"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise BundleError(f"{path / METADATA} is not the metadata of a bundle: {error!r}") from error
    if written_by != FORMAT:
        raise BundleError(f"{path / METADATA} is of format {written_by}; this moe-envs reads format {FORMAT}")
    bundle = Bundle(path, metadata, members)
    _check_structure(bundle)
    return bundle


def _members(path: Path) -> dict[str, bytes]:
    """The verified files of a bundle, of one moment: read again if it was replaced meanwhile."""
    while True:
        try:
            before = healed(path).stat().st_ino
            sums = _read_sums(path / SUMS)
            mend = f"its SHA-256 is not the one in {SUMS}"
            return {name: read_verified(path / name, sha256, BundleError, mend) for name, sha256 in sums.items()}
        except FileNotFoundError:  # between the two renames of a replacement
            if not healed(path).is_dir():
                raise BundleError(f"{path} is not there any more") from None
        except BundleError:
            if healed(path).is_dir() and path.stat().st_ino != before:
                continue
            raise


def project(inputs: np.ndarray, mean: np.ndarray, projection: np.ndarray) -> np.ndarray:
    """Features `[n, F]` float32, within +-`FEATURE_BOUND`."""
    return np.clip((inputs - mean) @ projection, -FEATURE_BOUND, FEATURE_BOUND).astype(np.float32)


def _read_sums(path: Path) -> dict[str, str]:
    required = {METADATA, MODEL, *(f"{split}.safetensors" for split in SPLITS)}
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise BundleError(f"{path.parent} is not a bundle: {SUMS} cannot be read ({error.strerror})") from error
    lines = re.findall(rb"([0-9a-f]{64})  ([a-z_]+\.[a-z]+)\n", raw)
    sums = {name.decode(): sha256.decode() for sha256, name in lines}
    if b"".join(b"%s  %s\n" % line for line in lines) != raw or set(sums) - {PROFILE} != required:
        raise BundleError(f"{path} is damaged or foreign: it must list {', '.join(sorted(required))}")
    return sums


def _check_structure(bundle: Bundle) -> None:
    """Validate the content of a bundle; hashes only show that the files are unchanged."""
    try:
        about = Metadata.model_validate(bundle.metadata)
        if "test/top-2" not in about.accuracy:
            raise ValueError("its accuracy has no test/top-2")
        if about.architecture is not None and 4 * about.architecture.parameters > len(bundle.members[MODEL]):
            raise ValueError(f"its architecture has more parameters than {MODEL}")
        if bundle.profile is not None and len(bundle.profile["operations"]) != about.num_experts:
            raise ValueError(f"its profile is not of {about.num_experts} experts")
        if not all(np.isfinite(array).all() for array in bundle._tensors(MODEL).values()):
            raise ValueError(f"{MODEL} holds numbers that are not finite")
        if bundle.features(bundle.examples).shape != (len(bundle.examples), bundle.split("test").features.shape[1]):
            raise ValueError("its examples and its tables have other features")
        for name in SPLITS:
            _check_tables(bundle.split(name), about.num_experts, about.num_classes, name)
        _check_estimator(bundle._tensors(MODEL), bundle.split("rl_train"))
    except BundleError:
        raise
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise BundleError(
            f"{bundle.path / METADATA} is not the metadata of a bundle: {where}: {first['msg']}"
        ) from error
    except (KeyError, ValueError, TypeError, IndexError, AttributeError, RecursionError) as error:
        raise BundleError(f"{bundle.path} is not a bundle of this program: {error!r}") from error


def _check_tables(split: Split, experts: int, classes: int, name: str) -> None:
    n = len(split.labels)
    wanted = {
        "features": ("f2", (n, split.features.shape[1])), "gate_logits": ("f4", (n, experts)), "labels": ("i2", (n,)),
        "estimates": ("f2", (n, experts)),
        "outputs": ("i1", (n, experts, classes)), "output_scale": ("f4", (1,)),
        "outcomes": ("u1", (n, -(-len(subsets.tabulated(experts)) // 8))),
    }  # fmt: skip
    for table, (dtype, shape) in wanted.items():
        array = getattr(split, table)
        if array.dtype != np.dtype(dtype) or array.shape != shape or n < 1:
            raise ValueError(f"{table} of {name} is {array.dtype} {array.shape}, not {np.dtype(dtype)} {shape}")
        if not np.isfinite(array).all():
            raise ValueError(f"{table} of {name} holds numbers that are not finite")
    if split.estimates.min() < 0 or split.estimates.max() > 1:
        raise ValueError(f"estimates of {name} are not within 0..1")
    if split.labels.min() < 0 or split.labels.max() >= classes or np.abs(split.features).max() > FEATURE_BOUND:
        raise ValueError(f"{name} has labels or features out of bounds")


def _check_estimator(tensors: dict[str, np.ndarray], known: Split) -> None:
    experts, features = known.gate_logits.shape[1], known.features.shape[1]
    shapes = context.shapes(experts, features) | {"fold_N": (len(known.labels),), "count": ()}
    for name, shape in shapes.items():
        array = tensors[f"estimator.{name}"]
        if array.shape != shape or array.dtype.kind != ("f" if name.startswith("context") else "iu"[name == "fold_N"]):
            raise ValueError(f"estimator.{name} is {array.dtype} {array.shape}, not of {shape}")
    if tensors["estimator.fold_N"].max() >= context.FOLDS or not 1 <= tensors["estimator.count"] <= 1000:
        raise ValueError("its estimator has folds or neighbours out of bounds")
