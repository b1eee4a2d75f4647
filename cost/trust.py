"""What a file may import: nothing but what is already imported, unless the caller trusts the file."""

import sys
from collections.abc import Collection
from pathlib import Path


def require_import(reference: str, where: str | Path, trusted: bool | Collection[str] = ()) -> None:
    """Raise `ValueError` if a file's "module:name" would import a module that is neither imported nor trusted.

    `trusted` has the references or modules that may be imported; True is all.
    """
    module = reference.partition(":")[0]
    if trusted is True or module in sys.modules or (trusted and {reference, module} & {*trusted}):
        return
    raise ValueError(
        f"{where} names {reference!r}: importing {module!r} would run its code. If it is yours, import it first, or "
        "allow it by allow_import=True, or --trust of the command"
    )


def require_env(env_id: object, where: str | Path, allow_import: bool = False) -> None:
    """Raise `ValueError` if a file names no environment, or one of a package that is neither imported nor trusted."""
    if not isinstance(env_id, str):
        raise ValueError(f"{where} names no environment, but {env_id!r}")
    module = env_id.rpartition(":")[0]
    if module not in ("", "moe_envs"):
        require_import(env_id, where, allow_import)
