"""Models as files that other runtimes run: ONNX, ONNX in int8, TorchScript, torch.export, Hugging Face's format.

An exported folder has the model and a manifest: version, inputs and outputs, SHA-256 of every file, and how far its
answers are from PyTorch's. All but Hugging Face's are static graphs: all experts run, those not chosen count nothing.
"""

from __future__ import annotations

import datetime
import importlib.util
import logging
import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import nn

from cost.arguments import one_line
from cost.files import load_json, locked, read_verified, replacing, save_json, sha256_of
from cost.machine import provenance
from cost.timing import torch_threads
from experts.data import DataError
from experts.serving import latency
from experts.serving.runners import Run, Source, onnx_runner, torch_runner

Format = Literal["onnx", "onnx-int8", "torchscript", "torch-export", "huggingface"]
FORMATS: tuple[Format, ...] = get_args(Format)
MANIFEST, SCHEMA, MEND = "manifest.json", 1, "export it anew with moe-export"
FILES: dict[str, str] = {
    "onnx": "model.onnx", "onnx-int8": "model.onnx", "torchscript": "model.pt", "torch-export": "model.pt2",
    "huggingface": "model.safetensors",
}  # fmt: skip
SEMVER = re.compile(r"(0|[1-9]\d*)\.(0|[1-9]\d*)\.(0|[1-9]\d*)(-[0-9A-Za-z.-]+)?(\+[0-9A-Za-z.-]+)?")
DIFFERENCE = 1e-4  # of a prediction's logits, relative to the largest of all if that is above 1
# Share of predictions that must be so close, as a router's ties can fall the other way; share with the same best class.
CLOSE, AGREEMENT = 0.99, 0.999
BATCHES = (1, 7, 32)
PREDICTIONS = 2000  # that are compared at least, so that a tenth of a point can be told


class ExportError(DataError):
    """A model cannot be exported so, or an exported folder is damaged; the message says why."""


@dataclass(frozen=True)
class Exported:
    """An exported ONNX model: `run` maps inputs to logits."""

    manifest: dict[str, Any]
    run: Run


def export(
    source: Source, folder: Path | str, form: Format, version: str = "0.1.0", *, measured: bool = False
) -> dict[str, Any]:
    """Write a model into a new folder, or in the place of an exported one; returns the manifest.

    With `measured` an ONNX file is timed beside PyTorch, and the manifest says how fast it is and what to run it with.

    What was written is run and compared with PyTorch: raises `ExportError`, and writes nothing, where logits or
    predictions differ, except in int8, whose differences are only said.
    """
    if form not in FORMATS:
        raise ValueError(f"format={form!r} is not one of {', '.join(FORMATS)}")
    if not SEMVER.fullmatch(version):
        raise ValueError(f"version={version!r} is not a semantic version, as 1.0.2")
    if form == "huggingface" and source.language is None:
        raise ExportError("Hugging Face's format is for language models")
    target = Path(folder)
    _require_replaceable(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    with replacing(target) as new, torch_threads(1), _quiet():
        run = _WRITERS[form](source, new)
        parity = _parity(source, run)
        _require_alike(parity, form)
        about = _timed(source, form, new / FILES[form]) if measured else {}
        files = {str(path.relative_to(new)): sha256_of(path.read_bytes()) for path in _files(new)}
        manifest = {
            "schema": SCHEMA, "version": version, "format": form, "model": FILES[form], "files": files,
            "input": _schema("input", source.examples, source),
            "output": _schema("logits", _answers(source.module, _batch(source, 0)), source),
            "source": source.about, "parity": parity,
            "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"), **provenance(),
            **about,
        }  # fmt: skip
        save_json(new / MANIFEST, manifest)
    return manifest


def add_tuned_rule(folder: Path | str, files: dict[str, str], found: dict[str, Any]) -> dict[str, Any]:
    """Write into the manifest of an exported model which rule should decide in its server; returns the manifest. Raises
    `ExportError` where the model is no longer of the `files` for which the rule was tuned."""
    place = Path(folder)
    with locked(place):
        manifest, read = _read(place)
        if read.files != files:
            raise ExportError(f"{place} was exported again while its rule was tuned, which is not written")
        manifest |= {"tuned_rule": found}
        save_json(place / MANIFEST, manifest)
    return manifest


def _timed(source: Source, form: Format, path: Path) -> dict[str, Any]:
    if not form.startswith("onnx"):
        raise ExportError(f"format={form!r} is not timed here; only ONNX is")
    raw = path.read_bytes()
    rows = latency.compare(source, {form: raw}, [1, 8, 64])
    return {"latency": rows, "recommended": latency.recommended(rows), "operators": latency.fusion(raw)}


class _Manifest(BaseModel):
    """What is read of a manifest; the rest is for people."""

    model_config = ConfigDict(extra="allow", strict=True)
    schema_: int = Field(alias="schema")
    version: str
    format: Literal["onnx", "onnx-int8", "torchscript", "torch-export", "huggingface"]
    model: str
    files: dict[str, str]


def _require_replaceable(target: Path) -> None:
    """Raise `ExportError` where something else than an exported model would be lost."""
    if not target.exists():
        return
    listed: set[str] = set()
    if target.is_dir() and (target / MANIFEST).is_file():
        with suppress(ExportError):
            listed = {MANIFEST, *_read(target)[1].files}
    if not target.is_dir() or {str(path.relative_to(target)) for path in _files(target)} - listed:
        raise ExportError(f"{target} holds something else than an exported model; name another folder")


def load_exported(folder: Path | str, threads: int = 1) -> Exported:
    """An exported ONNX model, once every file's SHA-256 is that of the manifest; raises `ExportError` otherwise."""
    place = Path(folder)
    manifest, read = _read(place)
    raw = {name: read_verified(place / name, sha256, ExportError, MEND) for name, sha256 in read.files.items()}
    if read.format not in ("onnx", "onnx-int8"):
        raise ExportError(f"{place} is of the format {read.format!r}, which another runtime loads")
    try:
        return Exported(manifest, onnx_runner(raw[read.model], threads))
    except Exception as error:  # onnxruntime's have no base of their own
        raise ExportError(f"{place / read.model} is no model that onnxruntime loads: {one_line(error)}") from error


def _read(place: Path) -> tuple[dict[str, Any], _Manifest]:
    """The manifest of an exported folder, whole and checked."""
    manifest = load_json(place / MANIFEST, ExportError, MEND)
    try:
        read = _Manifest.model_validate(manifest)
        if read.schema_ != SCHEMA or read.model not in read.files or not SEMVER.fullmatch(read.version):
            raise ValueError("it is of another version, or lists no model")
        if any(Path(name).is_absolute() or ".." in Path(name).parts for name in read.files):
            raise ValueError("it names a file outside its folder")
    except ValueError as error:
        raise ExportError(f"{place / MANIFEST} is no manifest: {one_line(error)}; {MEND}") from error
    return manifest, read


def _program(source: Source) -> torch.export.ExportedProgram:
    """The module as a graph, for any number of rows unless the source says which."""
    example = torch.from_numpy(_batch(source, 0))
    free = None if source.batch else ({0: torch.export.Dim("batch")},)
    if source.language is not None:
        free = ({0: torch.export.Dim("batch"), 1: torch.export.Dim("tokens")},)
    return torch.export.export(source.module, (example,), dynamic_shapes=free)


def _write_onnx(source: Source, folder: Path) -> Run:
    if importlib.util.find_spec("onnxscript") is None:
        raise ImportError("an export to ONNX needs onnx and onnxscript: pip install 'moe-envs[export]'")
    path = folder / FILES["onnx"]
    torch.onnx.export(
        _program(source), (), str(path), input_names=["input"], output_names=["logits"], dynamo=True,
        external_data=False, verbose=False,
    )  # fmt: skip
    return onnx_runner(path.read_bytes())


def _write_int8(source: Source, folder: Path) -> Run:
    import onnx
    from onnxruntime.quantization import QuantType, quantize_dynamic

    _write_onnx(source, folder)
    path = folder / FILES["onnx"]
    model = onnx.load(str(path))
    del model.graph.value_info[:]  # shapes of the export's example, which the quantiser would hold against it
    quantize_dynamic(model, str(path), weight_type=QuantType.QInt8)
    return onnx_runner(path.read_bytes())


def _write_torchscript(source: Source, folder: Path) -> Run:
    path = folder / FILES["torchscript"]
    module = _program(source).module() if source.batch else source.module  # a graph has its batch's size in it
    traced: Any = torch.jit.trace(module, torch.from_numpy(_batch(source, 0)))
    traced.save(str(path))
    return torch_runner(torch.jit.load(str(path)))


def _write_program(source: Source, folder: Path) -> Run:
    path = folder / FILES["torch-export"]
    torch.export.save(_program(source), str(path))
    return torch_runner(torch.export.load(str(path)).module())


def _write_huggingface(source: Source, folder: Path) -> Run:
    from transformers import AutoModelForCausalLM

    from experts.language.huggingface import save_huggingface

    assert source.language is not None
    save_huggingface(source.language, folder / "model")
    for path in (folder / "model").iterdir():
        path.rename(folder / path.name)
    (folder / "model").rmdir()
    for lock in folder.glob(".*.lock"):
        lock.unlink()
    loaded: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return torch_runner(lambda ids: loaded(ids).logits)


_WRITERS: dict[str, Callable[[Source, Path], Run]] = {
    "onnx": _write_onnx, "onnx-int8": _write_int8, "torchscript": _write_torchscript, "torch-export": _write_program,
    "huggingface": _write_huggingface,
}  # fmt: skip


def _answers(module: nn.Module, inputs: np.ndarray) -> np.ndarray:
    return torch_runner(module)(inputs)


def _batch(source: Source, number: int) -> np.ndarray:
    """A batch that the model takes: the next texts of the examples, a few tokens less each time, or, of a classifier,
    inputs between two examples."""
    size = source.batch or BATCHES[number % len(BATCHES)]
    if not source.batch and number == 0:
        size = 4  # an export takes a batch of one for a constant
    if source.language is not None:
        found = np.take(source.examples, np.arange(number, number + size), axis=0, mode="wrap")
        return found[:, : max(2, found.shape[1] - 3 * number)]
    random = np.random.default_rng(number)
    one, other = source.examples[random.integers(len(source.examples), size=(2, size))]
    share = random.random((size, *[1] * (one.ndim - 1)), dtype=np.float32)
    return np.asarray(one + share * (other - one))


def _parity(source: Source, run: Run) -> dict[str, float]:
    """How far an exported model's answers are from PyTorch's, on batches of several sizes."""
    differences, largest, same, rows, number = list[np.ndarray](), 0.0, 0, 0, 0
    while rows < PREDICTIONS or number < 2 * len(BATCHES):
        inputs = _batch(source, number)
        wanted, found = _answers(source.module, inputs), run(inputs)
        if wanted.shape != found.shape:
            raise ExportError(f"the exported model answers {found.shape} where PyTorch answers {wanted.shape}")
        differences.append(np.abs(found - wanted).max(-1).ravel())
        largest = max(largest, float(np.abs(wanted).max()))
        agree = found.argmax(-1) == wanted.argmax(-1)
        same, rows, number = same + int(agree.sum()), rows + agree.size, number + 1
    every = np.concatenate(differences)
    return {
        "predictions": rows, "largest_difference": float(every.max()), "largest_logit": largest,
        "close": float((every <= DIFFERENCE * max(1.0, largest)).mean()), "same_top_1": same / rows,
    }  # fmt: skip


def _require_alike(parity: dict[str, float], form: str) -> None:
    far = parity["close"] < CLOSE or parity["same_top_1"] < AGREEMENT
    if far and form != "onnx-int8":
        raise ExportError(
            f"the exported model's logits are PyTorch's in {parity['close']:.1%} of predictions, and differ by up to "
            f"{parity['largest_difference']:.2g}; its best class is in {parity['same_top_1']:.1%}: nothing was written"
        )


def _schema(name: str, array: np.ndarray, source: Source) -> dict[str, Any]:
    rest = array.shape[1:] if source.language is None else ("tokens", *array.shape[2:])
    return {"name": name, "dtype": str(array.dtype), "shape": [source.batch or "batch", *rest]}


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


@contextmanager
def _quiet() -> Iterator[None]:
    """Without what the exporters say about themselves."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "root", "onnxscript")]
    levels = [each.level for each in loggers]
    for each in loggers:
        each.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for each, level in zip(loggers, levels, strict=True):
            each.setLevel(level)
