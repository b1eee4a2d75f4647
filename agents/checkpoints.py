"""Checkpoints: a folder of safetensors and JSON with the SHA-256 of every byte, written whole or not at all.

A checkpoint is a nested dict of arrays, numbers, strings and lists. Arrays go to `arrays.safetensors`, the rest to
`manifest.json`; nothing is pickled.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

FORMAT = 1
ARRAYS, MANIFEST = "arrays.safetensors", "manifest.json"
PREFIX = "checkpoint-"


class CheckpointError(RuntimeError):
    """A checkpoint is absent, damaged or foreign; the message names the file, the cause and what helps."""


def save(folder: Path, content: dict[str, Any]) -> None:
    """Write a checkpoint under a temporary name and rename it; one that is there is replaced."""
    from safetensors.numpy import save as dump

    arrays: dict[str, np.ndarray] = {}
    tree = _pack(content, "", arrays)
    raw = dump(arrays)
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}-"))
    try:
        os.chmod(partial, 0o755)
        manifest = {"format": FORMAT, "content": tree, "sha256": {ARRAYS: hashlib.sha256(raw).hexdigest()}}
        for name, data in ((ARRAYS, raw), (MANIFEST, _seal(json.dumps(manifest).encode()))):
            with (partial / name).open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
        if folder.exists():
            _replace(folder, partial)
        else:
            partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def load(folder: Path) -> dict[str, Any]:
    """The content of a checkpoint; raises `CheckpointError` where one bit of it is not as it was written."""
    from safetensors import SafetensorError
    from safetensors.numpy import load as parse

    try:
        sealed, raw = (folder / MANIFEST).read_bytes(), (folder / ARRAYS).read_bytes()
    except OSError as error:
        raise CheckpointError(f"{folder} holds no checkpoint: {error.filename}: {error.strerror}") from error
    text = sealed[:-66]
    if sealed != _seal(text):
        raise CheckpointError(f"{folder / MANIFEST} is damaged or foreign: its SHA-256 does not fit; use another one")
    manifest = json.loads(text)
    if manifest["format"] != FORMAT:
        raise CheckpointError(f"{folder} is of format {manifest['format']}; this moe-envs reads {FORMAT}")
    if hashlib.sha256(raw).hexdigest() != manifest["sha256"][ARRAYS]:
        raise CheckpointError(f"{folder / ARRAYS} is damaged: its SHA-256 is not the manifest's; use another one")
    try:
        return dict(_unpack(manifest["content"], parse(raw)))
    except (SafetensorError, KeyError) as error:
        raise CheckpointError(f"{folder} is damaged or foreign: {error!r}") from error


def numbered(run: Path, number: int) -> Path:
    """Where a run's checkpoint of this number belongs."""
    return run / f"{PREFIX}{number:012d}"


def find(path: Path) -> dict[str, Any]:
    """The checkpoint in a folder, or the newest whole one of a run's; raises `CheckpointError` where there is none."""
    inside = _all(path)
    if (path / MANIFEST).exists() or not inside:
        return load(path)
    errors: list[str] = []
    for folder in inside:
        try:
            return load(folder)
        except CheckpointError as error:
            errors.append(str(error))
    raise CheckpointError("; ".join(errors))


def prune(run: Path, keep: int = 2) -> None:
    """Delete all checkpoints of a run but the newest, and what was left by a save that was killed."""
    for folder in [*_all(run)[keep:], *run.glob(f".{PREFIX}*")]:
        shutil.rmtree(folder, ignore_errors=True)


def _all(run: Path) -> list[Path]:
    return sorted(run.glob(f"{PREFIX}*"), reverse=True)


def _pack(value: Any, name: str, arrays: dict[str, np.ndarray]) -> Any:
    """A JSON form of a nested value whose arrays go into `arrays` under their path."""
    if isinstance(value, np.ndarray):
        raw = value.dtype.kind == "V"  # records, which safetensors does not know
        arrays[name] = np.frombuffer(value.tobytes(), np.uint8) if raw else np.ascontiguousarray(value)
        return {"array": name, "shape": value.shape, "dtype": value.dtype.str if raw else None}
    if isinstance(value, dict):
        return {"dict": {key: _pack(each, f"{name}/{key}", arrays) for key, each in value.items()}}
    if isinstance(value, list | tuple):
        return [_pack(each, f"{name}/{place}", arrays) for place, each in enumerate(value)]
    return value.item() if isinstance(value, np.generic) else value


def _unpack(value: Any, arrays: dict[str, np.ndarray]) -> Any:
    if isinstance(value, list):
        return [_unpack(each, arrays) for each in value]
    if not isinstance(value, dict):
        return value
    if "array" in value:
        array = arrays[value["array"]]
        return (array.view(value["dtype"]) if value["dtype"] else array).reshape(value["shape"])
    return {key: _unpack(each, arrays) for key, each in value["dict"].items()}


def _seal(raw: bytes) -> bytes:
    """The text and, in a last line of its own, its SHA-256."""
    return raw + b"\n" + hashlib.sha256(raw).hexdigest().encode() + b"\n"


def _replace(folder: Path, partial: Path) -> None:
    """Put a new folder in an old one's place; between two renames the old one has another name."""
    old = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}-old-"))
    folder.rename(old / folder.name)
    partial.rename(folder)
    shutil.rmtree(old, ignore_errors=True)
