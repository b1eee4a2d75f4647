"""Atomic file writes and checksums."""

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock, Timeout


def write_bytes(path: Path, raw: bytes | Iterable[bytes]) -> None:
    """Write a file atomically, whole or in parts, readable by all; devices such as /dev/stdout are written directly."""
    parts = [raw] if isinstance(raw, bytes) else raw
    if path.exists() and not path.is_file():
        path.write_bytes(b"".join(parts))
        return
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error
    descriptor, partial = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name[:100]}-")
    try:
        with open(descriptor, "wb") as file:
            for part in parts:
                file.write(part)
            file.flush()
            os.fsync(descriptor)
        os.chmod(partial, 0o644)  # temporary files are readable by their owner only
        os.replace(partial, path)
    except BaseException as error:
        os.unlink(partial)
        if isinstance(error, OSError) and error.filename in (None, partial):
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 text atomically."""
    write_bytes(path, text.encode())


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Let an error of the system, such as a full disk, name the file that was being written."""
    try:
        yield
    except OSError as error:
        if error.filename is not None or error.errno is None:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Lock a file or folder against other processes by a lock file next to it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(path.with_name(f".{path.name}.lock")):
        yield


@contextmanager
def alone(folder: Path, error: type[Exception], name: str = ".lock") -> Iterator[None]:
    """Hold a folder for one process and thread, which may nest this; raises `error` at once if it is held elsewhere."""
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder.resolve() / name, timeout=0, is_singleton=True)
    try:
        lock.acquire()
    except Timeout:
        raise error(
            f"{folder} is in use by another process or thread: wait for its end, or name another folder"
        ) from None
    try:
        yield
    finally:
        lock.release()


@contextmanager
def replacing(target: Path) -> Iterator[Path]:
    """A new folder, which takes the place of `target` at the end of the block; a block that fails changes nothing.

    At every moment `target` is there whole, or `healed` puts it back, whatever was interrupted.
    """
    new = target.with_name(f".{target.name}.new")
    with locked(target):
        _heal(target)
        shutil.rmtree(new, ignore_errors=True)  # of a process that was killed
        new.mkdir()
        try:
            yield new
            if target.exists():
                os.rename(target, _old(target))
            os.rename(new, target)
        finally:
            shutil.rmtree(new, ignore_errors=True)
            _heal(target)


def healed(target: Path) -> Path:
    """The same folder, put back if `replacing` was interrupted between its two renames."""
    if not target.exists() and _old(target).exists():
        with locked(target):
            _heal(target)
    return target


def _heal(target: Path) -> None:
    if _old(target).exists() and not target.exists():
        os.rename(_old(target), target)
    elif _old(target).exists():
        shutil.rmtree(_old(target))


def _old(target: Path) -> Path:
    """Where `replacing` puts a folder aside."""
    return target.with_name(f".{target.name}.old")


def sha256_of(raw: bytes) -> str:
    """SHA-256 in hexadecimal."""
    return hashlib.sha256(raw).hexdigest()


def sums_of(members: Mapping[str, bytes]) -> bytes:
    """Checksums of files by name, in the format of `sha256sum`."""
    return "".join(f"{sha256_of(raw)}  {name}\n" for name, raw in sorted(members.items())).encode()


def read_verified(path: Path, sha256: str | None, error: type[Exception], mend: str) -> bytes:
    """Read a file; raises `error` naming the file and the fix if its SHA-256 is not `sha256`, unless that is None."""
    try:
        raw = path.read_bytes()
    except OSError as cause:
        raise error(f"{path} cannot be read: {cause.strerror}") from cause
    if sha256 is not None and sha256_of(raw) != sha256:
        raise error(f"{path} is damaged: {mend}")
    return raw


def read_arrays(path: Path, error: type[Exception], mend: str) -> tuple[dict[str, str], dict[str, Any]]:
    """Read metadata and arrays of a safetensors file with its own SHA-256 (`sealed`); raises `error` naming the file
    and the fix if it is damaged or foreign."""
    try:
        raw = path.read_bytes()
    except OSError as cause:
        raise error(f"{path} cannot be read ({cause.strerror}): {mend}") from cause
    return arrays_of(raw, str(path), error, mend)


def arrays_of(
    raw: bytes, source: str, error: type[Exception], mend: str
) -> tuple[dict[str, str], dict[str, np.ndarray]]:
    """As `read_arrays`, from the bytes of a file."""
    from safetensors import SafetensorError
    from safetensors.numpy import load

    try:
        arrays = load(raw)
        metadata = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")]).get("__metadata__", {})
    except (SafetensorError, ValueError, KeyError, TypeError, RecursionError) as cause:
        raise error(f"{source} is damaged or no safetensors file ({cause}): {mend}") from cause
    if metadata.get("sha256") != sealed(arrays, metadata.get("settings", ""))["sha256"]:
        raise error(f"{source} is damaged: its SHA-256 is not the one it names; {mend}")
    return metadata, arrays


def sealed(arrays: Mapping[str, Any], settings: str = "") -> dict[str, str]:
    """Metadata of a safetensors file with the SHA-256 of its arrays and of its settings, if any."""
    found = digest(arrays)
    if not settings:
        return {"sha256": found}
    return {"settings": settings, "sha256": sha256_of(f"{settings}{found}".encode())}


def digest(arrays: Mapping[str, Any]) -> str:
    """SHA-256 of the names, shapes and bytes of arrays or tensors."""
    shapes = json.dumps({key: list(arrays[key].shape) for key in sorted(arrays)})
    return hashlib.sha256(
        shapes.encode() + b"".join(np.asarray(arrays[key]).tobytes() for key in sorted(arrays))
    ).hexdigest()


def save_json(path: Path, content: dict[str, Any]) -> None:
    """Write a dict with the SHA-256 of its content."""
    write_text(path, json.dumps(content | {"sha256": _sha256(content)}, indent=1))


def load_json(path: Path, error: type[Exception], mend: str) -> dict[str, Any]:
    """Load a dict saved by `save_json`; raises `error` naming the file, the problem and the fix."""
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
    return sha256_of(json.dumps(content, sort_keys=True).encode())
