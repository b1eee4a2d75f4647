"""Checkpoints: folders of safetensors and JSON with SHA-256 checksums, written atomically.

A checkpoint is a nested dict of arrays, numbers, strings and lists. Arrays go to `arrays-HASH.safetensors`, the rest to
`manifest.json`, which is renamed into place last; nothing is pickled.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import warnings
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import numpy as np

from cost.files import naming

FORMAT = 1
ARRAYS, MANIFEST, PARTIAL = "arrays-{}.safetensors", "manifest.json", ".partial"
PREFIX = "checkpoint-"


class CheckpointError(RuntimeError):
    """A checkpoint is absent, damaged or foreign; the message names the file, the cause and the fix."""


def save(folder: Path, content: dict[str, Any]) -> None:
    """Write a checkpoint and atomically replace an existing one; raises `ValueError` if the folder has other files."""
    from safetensors.numpy import save as dump

    arrays: dict[str, np.ndarray] = {}
    tree = _pack(content, "", arrays)
    raw = dump(arrays)
    sha256 = hashlib.sha256(raw).hexdigest()
    name = ARRAYS.format(sha256[:16])
    manifest = {"format": FORMAT, "content": tree, "arrays": {"file": name, "sha256": sha256}}
    if folder.exists() and (not folder.is_dir() or foreign(folder)):
        raise ValueError(f"{folder} holds something that is not a checkpoint; name a folder that does not exist yet")
    folder.mkdir(parents=True, exist_ok=True)
    try:
        for file, data in ((name, raw), (MANIFEST, _seal(json.dumps(manifest).encode()))):
            with naming(folder / file), (folder / PARTIAL).open("wb") as partial:
                partial.write(data)
                partial.flush()
                os.fsync(partial.fileno())
            (folder / PARTIAL).replace(folder / file)
    finally:
        (folder / PARTIAL).unlink(missing_ok=True)
    for path in folder.iterdir():
        if path.name not in (name, MANIFEST):
            path.unlink()


def load(folder: Path) -> dict[str, Any]:
    """Load a checkpoint; raises `CheckpointError` if any byte was changed."""
    from safetensors import SafetensorError
    from safetensors.numpy import load as parse

    try:
        sealed = (folder / MANIFEST).read_bytes()
        text = sealed[:-66]
        if sealed != _seal(text):
            raise CheckpointError(
                f"{folder / MANIFEST} is damaged or foreign: its SHA-256 does not fit; use another checkpoint"
            )
        manifest = json.loads(text)
        if manifest["format"] != FORMAT:
            raise CheckpointError(f"{folder} is of format {manifest['format']}; this moe-envs reads {FORMAT}")
        raw = (folder / manifest["arrays"]["file"]).read_bytes()
        if hashlib.sha256(raw).hexdigest() != manifest["arrays"]["sha256"]:
            raise CheckpointError(
                f"{folder / manifest['arrays']['file']} is damaged: its SHA-256 is not the manifest's; use another "
                "checkpoint"
            )
        return dict(_unpack(manifest["content"], parse(raw)))
    except OSError as error:
        raise CheckpointError(f"{folder} holds no checkpoint: {error.filename}: {error.strerror}") from error
    except (SafetensorError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{folder} is damaged or foreign: {error!r}") from error


def numbered(run: Path, number: int) -> Path:
    """Path of the numbered checkpoint of a run."""
    return run / f"{PREFIX}{number:012d}"


def find(path: Path) -> dict[str, Any]:
    """Find the checkpoint in a folder, or the newest intact one of a run, with a warning about newer damaged ones;
    raises `CheckpointError` if there is none."""
    inside = of_run(path)
    if (path / MANIFEST).exists() or not inside:
        return load(path)
    errors: list[str] = []
    for folder in inside:
        try:
            found = load(folder)
        except CheckpointError as error:
            errors.append(str(error))
            continue
        if errors:
            warnings.warn(f"{'; '.join(errors)}; {folder} is taken", stacklevel=2)
        return found
    raise CheckpointError("; ".join(errors))


def prune(run: Path, keep: int = 2) -> None:
    """Delete all but the newest `keep` checkpoints of a run, and leftovers of interrupted saves."""
    kept = of_run(run)[:keep]
    for folder in run.glob(f"{PREFIX}*"):
        if folder not in kept and folder.is_dir() and not foreign(folder):
            shutil.rmtree(folder)


def of_run(run: Path) -> list[Path]:
    """Checkpoint folders of a run, newest first, without interrupted saves."""
    return sorted((manifest.parent for manifest in run.glob(f"{PREFIX}*/{MANIFEST}")), reverse=True)


def newest(run: Path) -> str | None:
    """Identifier of the newest checkpoint of a run, intact or not; None if there is none."""
    there = of_run(run)
    return f"{there[0].name} {(there[0] / MANIFEST).read_bytes()[-65:].hex()}" if there else None


def foreign(folder: Path) -> bool:
    """Whether a folder has files not written by `save`."""
    return any(
        path.name not in (MANIFEST, PARTIAL) and not fnmatch(path.name, ARRAYS.format("*")) for path in folder.iterdir()
    )


def _pack(value: Any, name: str, arrays: dict[str, np.ndarray]) -> Any:
    """Convert a nested value to JSON; arrays are moved to `arrays`, keyed by path."""
    if isinstance(value, np.ndarray):
        raw = value.dtype.kind == "V"  # structured arrays, which safetensors does not support
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
    """Append the SHA-256 of the text as a last line."""
    return raw + b"\n" + hashlib.sha256(raw).hexdigest().encode() + b"\n"
