"""Bodies of requests: read with a limit of size and time, checked, turned into rows of a model."""

from __future__ import annotations

import asyncio
import io
import math
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image, UnidentifiedImageError
from pydantic_core import from_json
from starlette.requests import ClientDisconnect

from cost.arguments import one_line
from experts.serving.control import CAPS

if TYPE_CHECKING:
    from experts.serving.served import Served, Texts

LARGEST = 1e6  # of an input's numbers
IMAGES = {"image/png": "PNG", "image/jpeg": "JPEG"}
JSON, NPY = "application/json", ("application/x-npy", "application/octet-stream")
MOST_PIXELS = 4_000_000
OUTSIDE = f"each number must be finite and from -{LARGEST:.0f} to {LARGEST:.0f}"
LONGEST = 32  # characters for each token of the context that are read of a text, from its end


class RefusedError(Exception):
    """A request that is answered with this status and this sentence."""

    def __init__(self, status: int, detail: str) -> None:
        super().__init__(detail)
        self.status, self.detail = status, detail


async def read(stream: AsyncIterator[bytes], length: str | None, most: int, seconds: float) -> bytes:
    """A body of at most so many bytes, which must come within so many seconds."""
    too_large = RefusedError(413, f"the body is larger than {most} bytes")
    if length is not None and length.isdigit() and int(length) > most:
        raise too_large
    parts, size = list[bytes](), 0
    try:
        async with asyncio.timeout(seconds):
            async for part in stream:
                size += len(part)
                if size > most:
                    raise too_large
                parts.append(part)
    except TimeoutError:
        raise RefusedError(408, f"the body did not come within {seconds:g} s") from None
    except ClientDisconnect:
        raise RefusedError(499, "the client left") from None
    return b"".join(parts)


def parse_json(raw: bytes) -> dict[str, Any]:
    """An object in JSON."""
    try:
        found = from_json(raw, allow_inf_nan=False)  # several times as fast as json
    except ValueError as error:
        raise RefusedError(400, f"the body is no JSON: {one_line(error)}") from None
    if not isinstance(found, dict):
        raise RefusedError(422, f"the body must be a JSON object, is {_kind(found)}")
    return found


def as_integer(value: Any) -> Any:
    """A number such as 1.0 as an integer, which it is in JSON; all else as it is."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def rows_of(raw: bytes, media_type: str, served: Served) -> tuple[list[np.ndarray], dict[str, Any]]:
    """Rows of a body, and what else its JSON says. Raises `RefusedError` with a sentence for the sender."""
    kind = media_type.partition(";")[0].strip().lower()
    text = served.dtype == "int64"
    if kind == JSON:
        content = parse_json(raw)
        inputs = content.pop("inputs", None)
        if not isinstance(inputs, list) or not inputs:
            raise RefusedError(422, '"inputs" must be a list of at least one row')
        if len(inputs) > CAPS[-1]:
            raise RefusedError(422, f'"inputs" has {len(inputs)} rows, more than {CAPS[-1]}')
        return (_texts(inputs, served) if text else _numbers(inputs, served.shape)), content
    if kind in (*IMAGES, *NPY) and not text:
        return (_image(raw, IMAGES[kind], served.shape) if kind in IMAGES else _array(raw, served.shape)), {}
    known = ", ".join((JSON,) if text else (JSON, *IMAGES, NPY[0]))
    raise RefusedError(415, f"the media type {kind[:80]!r} is none of {known}")


def _numbers(inputs: Any, shape: tuple[int, ...]) -> list[np.ndarray]:
    wanted = f"each row must be a list of {_size(shape)} numbers"
    if not all(isinstance(row, list) for row in inputs):
        raise RefusedError(422, wanted)
    lengths = {len(row) for row in inputs}
    if lengths != set(shape):
        raise RefusedError(422, f"{wanted}, these have {' and '.join(map(str, sorted(lengths)[:3]))}")
    if not all(type(value) in (int, float) for row in inputs for value in row):
        raise RefusedError(422, f"{wanted}, and hold nothing else")
    try:
        return _checked(np.array(inputs, dtype=np.float64), shape)
    except OverflowError:
        raise RefusedError(422, OUTSIDE) from None


def _checked(array: np.ndarray, shape: tuple[int, ...]) -> list[np.ndarray]:
    flat = array.reshape(len(array), -1) if array.ndim > 2 else array
    if flat.shape[1:] != shape:
        raise RefusedError(422, f"each row must have {_size(shape)} numbers, these have {_size(array.shape[1:])}")
    with np.errstate(over="ignore"):
        found = flat.astype(np.float32)
    if not (np.abs(found) <= LARGEST).all():  # also for NaN
        raise RefusedError(422, OUTSIDE)
    return list(found)


def _texts(inputs: list[Any], served: Any) -> list[np.ndarray]:
    """Texts or lists of token ids; the end of a text that is too long is used."""
    found, model, context = [], served.model, served.shape[0]
    for each in inputs:
        if isinstance(each, str):
            ids = encoded(served, each)[-context:]
        elif isinstance(each, list) and all(type(as_integer(token)) is int for token in each):
            ids = [int(token) for token in each]
        else:
            raise RefusedError(422, "each row must be a text or a list of token ids")
        if not 1 <= len(ids) <= context:
            raise RefusedError(422, f"a row has {len(ids)} tokens; the model takes 1 to {context}")
        if min(ids) < 0 or max(ids) >= model.settings.vocabulary:
            raise RefusedError(422, f"token ids must be from 0 to {model.settings.vocabulary - 1}")
        found.append(np.array(ids, dtype=np.int64))
    return found


def encoded(served: Texts, text: str) -> list[int]:
    """Ids of the end of a text, after the one that begins a document."""
    try:
        return [0, *served.model.encode(text[-LONGEST * served.shape[0] :])]
    except (UnicodeEncodeError, TypeError):  # half of a surrogate pair
        raise RefusedError(422, "the text is no valid Unicode") from None


def _image(raw: bytes, form: str, shape: tuple[int, ...]) -> list[np.ndarray]:
    """A grey image of the model's size with values from 0 to 1; one of another size is scaled."""
    side = int(np.prod(shape) ** 0.5)
    if side**2 != int(np.prod(shape)):
        raise RefusedError(415, "the model takes no images")
    try:
        with Image.open(io.BytesIO(raw), formats=[form]) as image:
            if image.width * image.height > MOST_PIXELS:
                raise RefusedError(422, f"the image has more than {MOST_PIXELS} pixels")
            grey = image.convert("L")
    except (UnidentifiedImageError, OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise RefusedError(422, f"the body is no {form} image: {one_line(error)}") from None
    if grey.size != (side, side):
        grey = grey.resize((side, side), Image.Resampling.BILINEAR)
    return _checked(np.asarray(grey, dtype=np.float32).reshape(1, -1) / 255, shape)


def _array(raw: bytes, shape: tuple[int, ...]) -> list[np.ndarray]:
    """An array in NumPy's format, one row or several."""
    file = io.BytesIO(raw)
    try:
        major, _ = np.lib.format.read_magic(file)
        header = np.lib.format.read_array_header_1_0 if major == 1 else np.lib.format.read_array_header_2_0
        stated, _, dtype = header(file)
        if math.prod(stated) * dtype.itemsize != len(raw) - file.tell():
            raise ValueError(f"it has other bytes than an array of the shape {stated}")
        file.seek(0)
        array = np.lib.format.read_array(file, allow_pickle=False)
    except Exception as error:  # of a header that can hold anything
        raise RefusedError(422, f"the body is no array in NumPy's format: {one_line(error)}") from None
    if array.dtype.kind not in "iufb":
        raise RefusedError(422, "the array must hold numbers")
    array = array[None] if array.shape == shape else array
    if array.ndim < 2 or not 1 <= len(array) <= CAPS[-1]:
        raise RefusedError(422, f"the array has the shape {array.shape}; it must be 1 to {CAPS[-1]} rows")
    return _checked(array, shape)


def _size(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape)) or "no list of"


def _kind(value: object) -> str:
    return {list: "a list", str: "a text", bool: "a truth value", type(None): "null"}.get(type(value), "a number")
