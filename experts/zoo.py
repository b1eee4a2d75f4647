"""Locations of bundles: in the package, or in the user's cache (set by `MOE_ENVS_CACHE`)."""

import os
import re
from pathlib import Path

import platformdirs

from cost.files import healed

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
ASSETS = Path(__file__).parent / "assets"
MADE = ("fashion-mnist-graph",)  # made when first asked for: their tables are too large to ship; their profiles are


def cache_folder() -> Path:
    """The user's cache of this project; nothing is created."""
    return Path(os.environ.get("MOE_ENVS_CACHE") or platformdirs.user_cache_path("moe-envs"))


def user_folder() -> Path:
    """Folder of the user's own bundles."""
    return cache_folder() / "bundles"


def shipped() -> list[str]:
    """Names of the bundles inside the package."""
    return _bundles(ASSETS)


def names() -> list[str]:
    """Names of all bundles, the shipped ones first."""
    return [*shipped(), *_bundles(user_folder())]


def find(name_or_path: str | Path) -> Path | None:
    """The folder of a bundle, by name or by path, or None."""
    name = str(name_or_path)
    if name in shipped():
        return ASSETS / name
    own = user_folder() / name if NAME.fullmatch(name) else None
    candidates = [path for path in (own, Path(name)) if path is not None and path.name and len(name) < 4096]
    return next((path for path in candidates if len(path.name) < 200 and healed(path).is_dir()), None)


def _bundles(folder: Path) -> list[str]:
    for left in folder.glob(".*.old"):
        healed(folder / left.name[1:-4])
    return sorted(path.name for path in folder.glob("[!._]*") if path.is_dir())
