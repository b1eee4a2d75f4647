"""Everything that environments run on, by name: one way in for bundles, tasks and reference models."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, overload

if TYPE_CHECKING:
    from experts.bundle import Bundle
    from experts.tasks import Task

Kind = Literal["bundle", "task", "model"]


@overload
def load(kind: Literal["bundle"], name: str | Path) -> Bundle: ...
@overload
def load(kind: Literal["task"], name: str | Path) -> Task: ...
@overload
def load(kind: Literal["model"], name: str | Path) -> Any: ...
def load(kind: Kind, name: str | Path) -> Any:
    """The artefact of a kind by its name, or a bundle by its folder, every byte verified; what is made when it is first
    asked for is made now.

    Raises `ValueError` for an unknown kind, and the kind's own error, which names what there is, for an unknown name.
    """
    loaders: dict[str, Callable[[str], Any]] = {"bundle": _bundle, "task": _task, "model": _model}
    if kind not in loaders:
        raise ValueError(f"kind={kind!r} is not one of {', '.join(loaders)}")
    return loaders[kind](str(name))


def _bundle(name: str) -> Any:
    from experts import bundle

    return bundle.load(name)


def _task(name: str) -> Any:
    from experts import tasks

    return tasks.load(name)


def _model(name: str) -> Any:
    from experts import reference_models

    return reference_models.load(name)
