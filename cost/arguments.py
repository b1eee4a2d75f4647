"""Validation of arguments by the annotations of a signature: types, bounds and choices stand there and nowhere else."""

from __future__ import annotations

import difflib
import inspect
import reprlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import astuple
from functools import cache, wraps
from pathlib import Path
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
WORDS: dict[type, str] = {Ge: "of at least {}", Gt: "above {}", Le: "of at most {}", Lt: "below {}"}
_REPR = reprlib.Repr()
_REPR.maxstring = _REPR.maxother = _REPR.maxlong = 80
Adapters = dict[str, tuple[Any, "TypeAdapter[Any]"]]  # annotations and their validators by argument


def validated(function: Callable[..., None]) -> Callable[..., None]:
    """Decorate a method so that its arguments are validated and converted by `check` before it runs."""
    signature = inspect.signature(function)

    @wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> None:
        bound, adapters = signature.bind(*args, **kwargs), _adapters(function)
        for name, value in bound.arguments.items():
            if signature.parameters[name].kind is inspect.Parameter.VAR_KEYWORD:
                bound.arguments[name] = check(adapters, value)
            elif name in adapters:
                bound.arguments[name] = check(adapters, {name: value})[name]
        function(*bound.args, **bound.kwargs)

    return wrapper


def check(adapters: Adapters, given: Mapping[str, Any]) -> dict[str, Any]:
    """The values of arguments, those with an adapter converted; numpy numbers and arrays become Python's.

    Raises `ValueError` in one line with the argument, its value and what is allowed.
    """
    return {
        name: _checked(name, value, *adapters[name]) if name in adapters else value for name, value in given.items()
    }


def adapters_of(hints: Mapping[str, Any]) -> Adapters:
    """Validators by name for annotations; what pydantic has no schema for, and iterators, are left out."""
    found: Adapters = {}
    for name, hint in hints.items():
        if get_origin(hint) in (Iterable, Iterator):
            continue
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
    try:
        hints = get_type_hints(function, include_extras=True)
    except NameError as error:
        raise TypeError(
            f"{function.__qualname__}: the annotation {error.name!r} is not there when the program runs; import it, "
            "and not for type checkers only"
        ) from error
    for name, each in inspect.signature(function).parameters.items():
        if each.kind is each.VAR_KEYWORD and name in hints:
            typed = get_args(hints.pop(name))  # of **face: Unpack[Face]
            hints |= get_type_hints(typed[0], include_extras=True) if typed else {}
    return adapters_of({name: hint for name, hint in hints.items() if name not in ("self", "return")})


def _checked(name: str, value: object, hint: Any, adapter: TypeAdapter[Any]) -> Any:
    try:
        return adapter.validate_python(_plain(value, hint))
    except ValidationError:
        raise ValueError(f"{name}={short(value)}: must be {_allowed(hint)}") from None


def _allowed(hint: Any) -> str:
    """What an annotation allows, in words: those in it, if there are any."""
    origin, parts = get_origin(hint), get_args(hint)
    if origin is Annotated:
        kind, *bounds = parts
        if isinstance(bounds[0], str):
            return bounds[0]
        said = [WORDS.get(type(each), "{}").format(_bound(each)) for each in bounds]
        return f"{_allowed(kind)} {' and '.join(said)}"
    if origin in (Union, UnionType):
        return " or ".join(map(_allowed, parts))
    if origin is Literal:
        return " or ".join(map(repr, parts))
    if origin is dict:
        return "a dict"
    if origin is tuple and ... not in parts:
        return f"a list of {len(parts)}, each {_allowed(parts[0])}"
    if origin in (Sequence, list, tuple):
        return f"a list, each {_allowed(parts[0])}"
    return NAMES.get(hint, getattr(hint, "__name__", str(hint)))


def _plain(value: Any, hint: Any) -> Any:
    """A value with Python's numbers for numpy's, and with the containers of the annotation, as far as it has them."""
    if isinstance(value, np.generic | np.ndarray):
        value = value.tolist()
    origin, parts = get_origin(hint), get_args(hint)
    if origin is Annotated:
        return _plain(value, parts[0])
    if hint is Path and isinstance(value, str):
        return Path(value)
    if origin in (Union, UnionType):
        wanted = Path if isinstance(value, str) and str not in parts else None
        many = [part for part in parts if _container(part)] if isinstance(value, list | tuple) else []
        return _plain(value, many[0] if many else wanted)
    if isinstance(value, list | tuple) and (kind := _container(hint)):
        each = parts if origin is tuple and len(parts) == len(value) and ... not in parts else parts[:1] * len(value)
        each = each if len(each) == len(value) else (None,) * len(value)
        return kind(map(_plain, value, each))
    return [_plain(each, None) for each in value] if isinstance(value, list) else value


def _container(hint: Any) -> type[list[Any]] | type[tuple[Any, ...]] | None:
    """In which container pydantic wants the elements of an annotation."""
    origin = get_origin(hint) or hint
    if origin is Annotated:
        return _container(get_args(hint)[0])
    kinds: dict[Any, Any] = {list: list, tuple: tuple, Sequence: tuple}
    return kinds.get(origin)


def _bound(each: Any) -> str:
    """The number of a bound; further metadata as it is."""
    if type(each) not in WORDS:
        return str(each)
    (value,) = astuple(each)
    return f"{value:,}" if isinstance(value, int) else f"{value:g}"
