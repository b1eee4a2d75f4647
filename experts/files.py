"""Files that are whole or absent."""

import os
import tempfile
from pathlib import Path


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
