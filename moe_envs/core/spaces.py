"""Named parts of observation vectors, and validation of arguments and actions."""

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
from gymnasium import spaces
from gymnasium.error import InvalidAction


class Part(NamedTuple):
    """Part of an observation: slice, bounds and meaning."""

    slice: slice
    low: float
    high: float
    meaning: str


Layout = dict[str, Part]


def layout(parts: Iterable[tuple[str, int, float, float, str]]) -> Layout:
    """Lay out parts of (name, size, low, high, meaning) one after another."""
    result, start = {}, 0
    for name, size, low, high, meaning in parts:
        result[name] = Part(slice(start, start + size), low, high, meaning)
        start += size
    return result


def box(parts: Layout) -> spaces.Box:
    """The float32 space of a layout."""
    bounds = np.concatenate([[[part.low, part.high]] * (part.slice.stop - part.slice.start) for part in parts.values()])
    return spaces.Box(bounds[:, 0].astype(np.float32), bounds[:, 1].astype(np.float32), dtype=np.float32)


def check_actions(space: spaces.Space[np.ndarray], actions: object) -> np.ndarray:
    """Convert actions to an array; raises `InvalidAction` if one is outside the space."""
    array = np.asarray(actions)
    if isinstance(space, spaces.MultiBinary) or (isinstance(space, spaces.Box) and space.dtype == np.int8):
        fits = array.shape == space.shape and array.dtype.kind in "bif" and bool(((array == 0) | (array == 1)).all())
    else:
        fits = space.contains(array)
    if not fits:
        raise InvalidAction(f"action {actions!r} is not in {space}")
    return array
