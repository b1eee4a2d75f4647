"""Files that are whole or absent, and that say whether they are damaged."""

import hashlib
import json
import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock


def write_bytes(path: Path, raw: bytes) -> None:
    """Write a file whole or not at all, readable by all; a device such as /dev/stdout is written to."""
    if path.exists() and not path.is_file():
        path.write_bytes(raw)
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, partial = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}-")
    try:
        with open(descriptor, "wb") as file:
            file.write(raw)
        os.chmod(partial, 0o644)  # a temporary file is its owner's alone
        os.replace(partial, path)
    except BaseException:
        os.unlink(partial)
        raise


def write_text(path: Path, text: str) -> None:
    """Write a text whole or not at all, in UTF-8."""
    write_bytes(path, text.encode())


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """A lock beside a file or a folder, which other processes wait for."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(path.with_name(f".{path.name}.lock")):
        yield


def digest(arrays: Mapping[str, Any]) -> str:
    """SHA-256 of named arrays or tensors: their names, shapes and bytes."""
    shapes = json.dumps({key: list(arrays[key].shape) for key in sorted(arrays)})
    return hashlib.sha256(
        shapes.encode() + b"".join(np.asarray(arrays[key]).tobytes() for key in sorted(arrays))
    ).hexdigest()


def save_json(path: Path, content: dict[str, Any]) -> None:
    """Write a dict with the SHA-256 of its content."""
    write_text(path, json.dumps(content | {"sha256": _sha256(content)}, indent=1))


def load_json(path: Path, error: type[Exception], mend: str) -> dict[str, Any]:
    """The dict in a file of `save_json`; raises `error` naming the file, what is wrong and the mend."""
    try:
        content = json.loads(path.read_bytes())
        if not isinstance(content, dict) or content.pop("sha256", None) != _sha256(content):
            raise error(f"{path} is damaged or foreign: its SHA-256 does not fit; {mend}")
    except OSError as cause:
        raise error(f"{path} cannot be read: {cause.strerror}; {mend}") from cause
    except (ValueError, RecursionError) as cause:
        raise error(f"{path} is not JSON: {cause}; {mend}") from cause
    return content


def _sha256(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
