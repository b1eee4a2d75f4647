"""Validation of arguments by the annotations of a signature: types, bounds and choices stand there and nowhere else."""

from __future__ import annotations

import difflib
import inspect
import reprlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import astuple
from functools import cache, wraps
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

import numpy as np
from annotated_types import Ge, Gt, Le, Lt
from pydantic import ConfigDict, TypeAdapter, ValidationError
from pydantic.errors import PydanticUserError

Count = Annotated[int, Ge(1)]
NonNegative = Annotated[float, Ge(0), Le(1e12)]  # larger ones overflow where they meet others
Positive = Annotated[float, Gt(0), Le(1e12)]
STRICT = ConfigDict(strict=True, allow_inf_nan=False)
NAMES = {int: "a whole number", float: "a finite number", bool: "True or False", str: "text", type(None): "None"}
WORDS: dict[type, str] = {Ge: "of at least {:g}", Gt: "above {:g}", Le: "of at most {:g}", Lt: "below {:g}"}
_REPR = reprlib.Repr()
_REPR.maxstring = _REPR.maxother = _REPR.maxlong = 80
Adapters = dict[str, tuple[Any, "TypeAdapter[Any]"]]  # annotations and their validators by argument


def validated(function: Callable[..., None], **more: Any) -> Callable[..., None]:
    """Decorate a method so that its arguments are validated and converted by `check` before it runs; `more` has further
    annotations, which take precedence."""
    signature, extra = inspect.signature(function), adapters_of(more)

    @wraps(function)
    def wrapper(self: Any, *args: Any, **kwargs: Any) -> None:
        given = dict(zip(list(signature.parameters)[1:], args, strict=False)) | kwargs
        checked = check(_adapters(function) | extra, given)
        function(self, *(checked[name] for name in list(checked)[: len(args)]), **{k: checked[k] for k in kwargs})

    return wrapper


def check(adapters: Adapters, given: Mapping[str, Any]) -> dict[str, Any]:
    """The values of arguments, those with an adapter converted; numpy numbers and arrays become Python's.

    Raises `ValueError` in one line with the argument, its value and what is allowed.
    """
    return {
        name: _checked(name, value, *adapters[name]) if name in adapters else value for name, value in given.items()
    }


def adapters_of(hints: Mapping[str, Any]) -> Adapters:
    """Validators by name for annotations; what pydantic has no schema for is left out."""
    found: Adapters = {}
    for name, hint in hints.items():
        try:
            found[name] = hint, TypeAdapter(hint, config=STRICT)
        except PydanticUserError:  # a class of the caller's own
            continue
    return found


def short(value: object) -> str:
    """A value as it is shown in a message: its repr, cut in the middle if it is long."""
    return _REPR.repr(value)


def one_line(error: object) -> str:
    """What an error of a library says, in one line."""
    said = " ".join(str(error).split())
    return said if len(said) <= 300 else f"{said[:300]} ..."


def choose(name: str, value: object, allowed: Iterable[str]) -> str:
    """Return `value` if it is allowed; otherwise raise `ValueError` naming the allowed values."""
    names = list(allowed)
    if not isinstance(value, str) or value not in names:
        close = difflib.get_close_matches(str(value), names, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise ValueError(f"{name}={short(value)} is not one of {', '.join(map(repr, names))}{hint}")
    return value


@cache
def _adapters(function: Callable[..., None]) -> Adapters:
    hints = get_type_hints(function, include_extras=True)
    for name, each in inspect.signature(function).parameters.items():
        if each.kind is each.VAR_KEYWORD and name in hints:
            typed = get_args(hints.pop(name))  # of **face: Unpack[Face]
            hints |= get_type_hints(typed[0], include_extras=True) if typed else {}
    return adapters_of({name: hint for name, hint in hints.items() if name not in ("self", "return")})


def _checked(name: str, value: object, hint: Any, adapter: TypeAdapter[Any]) -> Any:
    try:
        return adapter.validate_python(_plain(value))
    except ValidationError:
        raise ValueError(f"{name}={short(value)}: must be {_allowed(hint)}") from None


def _allowed(hint: Any) -> str:
    """What an annotation allows, in words: those in it, if there are any."""
    origin, parts = get_origin(hint), get_args(hint)
    if origin is Annotated:
        kind, *bounds = parts
        said = [each if isinstance(each, str) else WORDS[type(each)].format(*astuple(each)) for each in bounds]
        return said[0] if isinstance(bounds[0], str) else f"{_allowed(kind)} {' and '.join(said)}"
    if origin in (Union, UnionType):
        return " or ".join(map(_allowed, parts))
    if origin is Literal:
        return " or ".join(map(repr, parts))
    if origin is dict:
        return "a dict"
    if origin is tuple:
        return f"a list of {len(parts)}, each {_allowed(parts[0])}"
    if origin is Sequence:
        return f"a list, each {_allowed(parts[0])}"
    return NAMES.get(hint, getattr(hint, "__name__", str(hint)))


def _plain(value: Any) -> Any:
    if isinstance(value, np.generic | np.ndarray):
        value = value.tolist()
    return tuple(map(_plain, value)) if isinstance(value, list | tuple) else value
