"""Bundles: a trained MoE with everything an environment needs, in safetensors + JSON, checked by SHA-256.

A bundle is a folder: `bundle.json` (metadata), `model.safetensors` (weights and feature projection), one safetensors
file for each of `rl_train`, `validation` and `test`, `profile.json` where its costs were measured, and `SHA256SUMS`,
which covers them all and which `sha256sum -c` understands. Loading imports neither torch nor pickle.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from cost.machine import source_commit
from experts import zoo

if TYPE_CHECKING:
    from torch import nn

    from experts.graph import ExpertGraph
    from experts.model import MoEModel
    from experts.training import TrainingSettings

FORMAT = 1
SPLITS = ("rl_train", "validation", "test")
SUMS, METADATA, MODEL, PROFILE = "SHA256SUMS", "bundle.json", "model.safetensors", "profile.json"
MAX_EXPERTS = 10  # the outcomes of all 2^E subsets are tabulated: 128 bytes an input at 10
FEATURE_BOUND = 5.0


class Measured(Protocol):
    """A profile, as `cost.profile.Profile` is."""

    def model_dump(self, *, mode: str) -> dict[str, Any]: ...


class BundleError(RuntimeError):
    """A bundle is absent, damaged or foreign; the message names the file and the cause."""


@dataclass(frozen=True)
class Split:
    """Tables of n inputs: features `[n, F]` float16, gate logits `[n, E]` float32, labels `[n]` int16, the experts'
    class logits `[n, E, C]` as int8 in units of `output_scale`, and outcomes `[n, ceil(2^E / 8)]` uint8: bit s of row i
    says whether the experts of subset s (bit e = expert e), mixed by the gate, classify input i correctly. Outcomes are
    of the exact logits."""

    features: np.ndarray
    gate_logits: np.ndarray
    labels: np.ndarray
    outputs: np.ndarray
    output_scale: np.ndarray
    outcomes: np.ndarray

    @property
    def logits(self) -> np.ndarray:
        """The experts' class logits `[n, E, C]` float32, to within half of `output_scale`."""
        return self.outputs * self.output_scale


@dataclass(frozen=True)
class Bundle:
    """A verified bundle on disk; its tables and its model are read when asked for."""

    path: Path
    metadata: dict[str, Any]
    members: dict[str, bytes]

    @property
    def num_experts(self) -> int:
        return int(self.metadata["num_experts"])

    @cached_property
    def sha256(self) -> str:
        """One hash for the model and its tables, the same wherever the bundle lies and whatever its profile."""
        return _sha256(_sums({name: raw for name, raw in self.members.items() if name != PROFILE}).encode())

    @property
    def profile(self) -> dict[str, Any] | None:
        """The reference profile as JSON, or None where the bundle was built without one."""
        return json.loads(self.members[PROFILE]) if PROFILE in self.members else None

    def split(self, name: str) -> Split:
        """The tables of `rl_train`, `validation` or `test`."""
        if name not in SPLITS:
            raise ValueError(f"unknown split {name!r}; there are {', '.join(SPLITS)}")
        tensors = self._tensors(f"{name}.safetensors")
        if set(tensors) != {field.name for field in fields(Split)}:
            raise BundleError(f"{self.path}/{name}.safetensors holds {sorted(tensors)}: not the tables of a bundle")
        return Split(**tensors)

    def model(self, module: nn.Module | None = None) -> MoEModel:
        """The trained torch model; for a bundle of your own module pass a fresh one to fill with the weights."""
        import torch

        from experts.model import MoEClassifier

        if module is None:
            if self.metadata["architecture"] is None:
                raise ValueError(f"{self.path.name} holds a module of your own: bundle.model(YourModule())")
            settings = dict(self.metadata["architecture"])
            with torch.random.fork_rng(devices=[]):  # first weights are drawn, and replaced
                module = MoEClassifier(settings.pop("num_inputs"), settings.pop("num_classes"), **settings)
        weights = {k[6:]: torch.from_numpy(v) for k, v in self._tensors(MODEL).items() if k.startswith("model.")}
        module.load_state_dict(weights)
        return module.eval()  # type: ignore[return-value]

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
    """The bundle of that name (shipped, built into the cache, or of `zoo.MADE`, which is built now) or in
    that folder, every byte of it verified.

    Raises `BundleError` naming the file and the cause where something is absent, altered, cut short or foreign.
    """
    if name_or_path in zoo.MADE:
        from experts import reference_bundles

        path: Path | None = reference_bundles.made(str(name_or_path))
    else:
        path = zoo.find(name_or_path)
    if path is None:
        names = dict.fromkeys([*zoo.names(), *zoo.MADE])
        raise BundleError(f"no bundle {str(name_or_path)!r}; there are {', '.join(names)}")
    sums = _read_sums(path / SUMS)
    members = {name: _verified(path / name, sha256) for name, sha256 in sums.items()}
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

    `inputs` is `[n, ...]` of numbers (rows are flattened, a torch model of your own gets them flat), `labels` `[n]` of
    classes 0..C-1. `splits` gives the row indices of train, rl_train, validation and test (default: a random 40, 40, 8
    and 12 %). `profile`, as `cost.profile.measure_experts`, measures the reference costs; without it they are measured
    at first use, which a model of your own rules out: its code is not in the bundle.
    `data` is put into the metadata. The bundle goes to `folder` / name, by default into the user's cache.
    """
    import torch

    from experts import model as models
    from experts import training
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
    graph = trained.graph if isinstance(trained, models.MoEClassifier) else None
    tables, accuracy = {}, {}
    for split in SPLITS:
        gate, outputs = models.tabulate(trained, torch.from_numpy(x[rows[split]]))
        if gate.shape[1] > MAX_EXPERTS:
            raise ValueError(f"{gate.shape[1]} experts; a bundle tabulates all subsets of at most {MAX_EXPERTS}")
        label = y[rows[split]]
        features = project(x[rows[split]], mean, projection)
        tables[split] = _tabulated(features, gate.numpy(), outputs.numpy(), label, graph)
        for k in (1, 2):
            chosen = models.mix(gate, outputs, top_k(gate, min(k, gate.shape[1])), graph).argmax(-1).numpy()
            accuracy[f"{split}/top-{k}"] = float((chosen == label).mean())
    metadata = {
        "format": FORMAT,
        "name": name,
        "num_experts": int(gate.shape[1]),
        "num_classes": int(outputs.shape[2]),
        "architecture": trained.settings if isinstance(trained, models.MoEClassifier) else None,
        "training": asdict(settings) if model is None else None,
        "rows": {split: len(indices) for split, indices in rows.items()},
        "accuracy": accuracy,
        "data": data or {"sha256": _sha256(x.tobytes() + y.tobytes())},
        "commit": source_commit(),
    }
    constants = {
        "features.mean": mean,
        "features.projection": np.ascontiguousarray(projection),
        "examples": np.resize(x[rows["train"]], (64, x.shape[1])),
    }
    measured = profile(trained, constants["examples"]).model_dump(mode="json") if profile else None
    _write(target, metadata, trained, constants, tables, measured)
    return load(target)


def _tabulated(
    features: np.ndarray, gate_logits: np.ndarray, outputs: np.ndarray, labels: np.ndarray, graph: ExpertGraph | None
) -> Split:
    scale = np.abs(outputs).max(keepdims=True).ravel().astype(np.float32) / 127
    return Split(
        features=features.astype(np.float16),
        gate_logits=gate_logits,
        labels=labels.astype(np.int16),
        outputs=np.rint(outputs / scale).astype(np.int8),
        output_scale=scale,
        outcomes=pack_outcomes(gate_logits, outputs, labels)
        if graph is None
        else pack_outcomes_of(graph, gate_logits, outputs, labels),
    )


def pack_outcomes(gate_logits: np.ndarray, outputs: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Bits `[n, ceil(2^E / 8)]`, little-endian: is the gate-weighted sum of subset s's logits largest at the label?

    The softmax over the subset only divides all classes by one number, so the gate's exponentials serve unnormalised,
    held above e^-80 of the largest so that none vanishes in float32. The empty subset is never correct.
    """
    num_experts = gate_logits.shape[1]
    member_SE = (np.arange(2**num_experts)[:, None] >> np.arange(num_experts) & 1).astype(np.float32)
    weight_BE = np.exp(np.maximum(gate_logits - gate_logits.max(1, keepdims=True), -80)).astype(np.float32)
    packed = []
    for start in range(0, len(labels), 1024):
        rows = slice(start, start + 1024)
        logits_BSC = member_SE @ (weight_BE[rows, :, None] * outputs[rows].astype(np.float32))
        correct_BS = logits_BSC.argmax(-1) == labels[rows, None]
        correct_BS[:, 0] = False
        packed.append(np.packbits(correct_BS, axis=1, bitorder="little"))
    return np.concatenate(packed)


def pack_outcomes_of(
    graph: ExpertGraph, gate_logits: np.ndarray, outputs: np.ndarray, labels: np.ndarray
) -> np.ndarray:
    """The same where a graph mixes what the subset's experts return."""
    import torch

    from experts.model import mix

    num_experts = gate_logits.shape[1]
    member_SE = torch.arange(2**num_experts)[:, None] >> torch.arange(num_experts) & 1 == 1
    packed = []
    for start in range(0, len(labels), 64):
        gate_BE, outputs_BEC = (torch.from_numpy(each[start : start + 64]) for each in (gate_logits, outputs))
        every_SBE = member_SE[1:, None].expand(-1, len(gate_BE), -1)
        gates, answers = gate_BE.expand(len(every_SBE), -1, -1), outputs_BEC.expand(len(every_SBE), -1, -1, -1)
        with torch.inference_mode():
            logits = mix(gates.flatten(0, 1), answers.flatten(0, 1), every_SBE.flatten(0, 1), graph)
        correct_SB = logits.argmax(-1).unflatten(0, every_SBE.shape[:2]).numpy() == labels[start : start + 64]
        correct_BS = np.pad(np.ascontiguousarray(correct_SB.T), ((0, 0), (1, 0)))  # safetensors wants rows in order
        packed.append(np.packbits(correct_BS, axis=1, bitorder="little"))
    return np.concatenate(packed)


def principal_components(inputs: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Mean `[d]` and projection `[d, F]` onto the `count` largest principal components, each scaled to variance 1."""
    mean = inputs.mean(0, dtype=np.float64)
    variance, vectors = np.linalg.eigh(np.cov((inputs - mean).T, dtype=np.float64).reshape(inputs.shape[1], -1))
    largest = slice(-1, -min(count, len(variance)) - 1, -1)
    scale = np.sqrt(np.maximum(variance[largest], 1e-12))
    return mean.astype(np.float32), (vectors[:, largest] / scale).astype(np.float32)


def project(inputs: np.ndarray, mean: np.ndarray, projection: np.ndarray) -> np.ndarray:
    """Features `[n, F]` float32, within +-`FEATURE_BOUND`."""
    return np.clip((inputs - mean) @ projection, -FEATURE_BOUND, FEATURE_BOUND).astype(np.float32)


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
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{target.name}-", dir=target.parent) as scratch:
        new, old = Path(scratch) / "new", Path(scratch) / "old"
        new.mkdir()
        for file, raw in (members | {SUMS: _sums(members).encode()}).items():
            (new / file).write_bytes(raw)
        if target.exists():
            shutil.move(target, old)
        new.rename(target)


def _sums(members: dict[str, bytes]) -> str:
    return "".join(f"{_sha256(raw)}  {name}\n" for name, raw in sorted(members.items()))


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
    """Hashes say that a bundle is as it was written; this, that what was written is a bundle."""
    try:
        experts = bundle.num_experts
        bundle.metadata["architecture"], bundle.metadata["accuracy"]["test/top-2"]
        if bundle.profile is not None and len(bundle.profile["operations"]) != experts:
            raise ValueError(f"its profile is not of {experts} experts")
        bundle.examples, bundle.features(bundle.examples)
        for name in SPLITS:
            split = bundle.split(name)
            n = len(split.labels)
            shapes = [split.gate_logits.shape, split.outputs.shape[:2], split.outcomes.shape, split.features.shape[:1]]
            if shapes != [(n, experts), (n, experts), (n, max(1, 2**experts // 8)), (n,)] or n < 1:
                raise ValueError(f"the tables of {name} have the shapes {shapes}")
    except BundleError:
        raise
    except (KeyError, ValueError, TypeError, IndexError, RecursionError) as error:
        raise BundleError(f"{bundle.path} is not a bundle of this program: {error!r}") from error


def _verified(path: Path, sha256: str) -> bytes:
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise BundleError(f"{path} cannot be read: {error.strerror}") from error
    if _sha256(raw) != sha256:
        raise BundleError(f"{path} is damaged: its SHA-256 is not the one in {SUMS}")
    return raw


def _sha256(raw: bytes) -> str:
    return hashlib.sha256(raw).hexdigest()
