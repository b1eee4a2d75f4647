"""Files that are whole or absent, and JSON that carries its own SHA-256."""

import hashlib
import json
import os
import tempfile
from pathlib import Path
from typing import Any


def write_text(path: Path, text: str) -> None:
    """Write a file whole or not at all, in UTF-8; a device such as /dev/stdout is written to."""
    if path.exists() and not path.is_file():
        path.write_text(text, encoding="utf-8")
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, partial = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}-")
    try:
        with open(descriptor, "w", encoding="utf-8") as file:
            file.write(text)
        os.chmod(partial, 0o644)  # a temporary file is its owner's alone
        os.replace(partial, path)
    except BaseException:
        os.unlink(partial)
        raise


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
