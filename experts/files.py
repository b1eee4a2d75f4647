"""Files that are whole or absent, and that say whether they are damaged."""

import hashlib
import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np


def write_bytes(path: Path, raw: bytes) -> None:
    """Write a file whole or not at all, readable by all."""
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


def digest(arrays: Mapping[str, Any]) -> str:
    """SHA-256 of named arrays or tensors: their names, shapes and bytes."""
    shapes = json.dumps({key: list(arrays[key].shape) for key in sorted(arrays)})
    return hashlib.sha256(
        shapes.encode() + b"".join(np.asarray(arrays[key]).tobytes() for key in sorted(arrays))
    ).hexdigest()
