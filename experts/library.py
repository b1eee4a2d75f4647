"""Load bundles, tasks, reference models and language models by name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, overload

if TYPE_CHECKING:
    from experts.bundle import Bundle
    from experts.language import LanguageModel
    from experts.tasks import Task

Kind = Literal["bundle", "task", "model", "language"]


@overload
def load(kind: Literal["bundle"], name: str | Path) -> Bundle: ...
@overload
def load(kind: Literal["task"], name: str | Path) -> Task: ...
@overload
def load(kind: Literal["model"], name: str | Path) -> Any: ...
@overload
def load(kind: Literal["language"], name: str | Path) -> LanguageModel: ...
def load(kind: Kind, name: str | Path) -> Any:
    """Load and verify an artefact by kind and name, a bundle or a language model also by folder; artefacts that are
    built on first use are built.

    Raises `ValueError` for an unknown kind, and the error of the kind, which lists the known names, for an unknown
    name.
    """
    loaders: dict[str, Callable[[str], Any]] = {
        "bundle": _bundle,
        "task": _task,
        "model": _model,
        "language": _language,
    }
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


def _language(name: str) -> Any:
    from experts import language

    return language.load(name)
