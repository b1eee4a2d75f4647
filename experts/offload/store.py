"""A file of experts, each of which is read alone, from the disk rather than from the page cache where that is possible.

The file has a header of JSON with sizes, checksums and places, then the experts, each on a boundary of `ALIGNED` bytes.
The header is under SHA-256, every expert under CRC-32, compared at each read, and under SHA-256, compared by `check`.
"""

from __future__ import annotations

import json
import mmap
import os
import threading
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import torch
from annotated_types import Interval
from pydantic import BaseModel, ConfigDict, ValidationError

from cost.arguments import one_line
from cost.files import digest, sha256_of, write_bytes
from experts.compression.quantize import dequantize, quantize, quantized_bytes
from experts.data import DataError
from experts.layers import MoELayer, SwiGLU

MAGIC, ALIGNED = b"moe-experts-1\n", 4096
LARGEST = 2**26  # bytes of a header
Weights = Literal["float32", "bfloat16", "int8", "int4"]
Whole = Annotated[int, Interval(ge=0, lt=2**48)]
BITS = {"int8": 8, "int4": 4}


class OffloadError(DataError):
    """An expert cannot be had: its file is damaged, cut off, or foreign."""


class _Expert(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)
    start: Whole
    size: Whole
    crc32: Whole
    sha256: str


class _Header(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)
    weights: Weights
    source: str  # SHA-256 of the experts that were written
    d_model: Whole
    d_ff: Whole
    layers: Whole
    num_experts: Whole
    experts: list[_Expert]


def write(path: Path | str, layers: Sequence[MoELayer], weights: Weights = "float32") -> None:
    """Write the experts of layers, which must be SwiGLUs of one size, in float32, bfloat16, int8 or int4."""
    if weights not in get_args(Weights):
        raise ValueError(f"weights={weights!r} is not one of {', '.join(get_args(Weights))}")
    every: list[Any] = [expert for layer in layers for expert in layer.experts]
    shapes = {tuple(each.w_in.shape) if type(each) is SwiGLU else type(each).__name__ for each in every}
    if len(shapes) != 1 or isinstance((shape := next(iter(shapes))), str):
        raise ValueError(f"experts must be SwiGLUs of one size, here are {', '.join(map(str, shapes))}")
    experts, start = list[_Expert](), 0
    for each in every:  # packed twice, so that one of them at a time is held
        raw = _packed(each, weights)
        experts.append(_Expert(start=start, size=len(raw), crc32=zlib.crc32(raw), sha256=sha256_of(raw)))
        start += -(-len(raw) // ALIGNED) * ALIGNED
    header = _Header(
        weights=weights, source=source_of(layers), d_model=shape[1], d_ff=shape[0] // 2, layers=len(layers),
        num_experts=len(layers[0].experts), experts=experts,
    )  # fmt: skip
    said = header.model_dump_json().encode()
    head = MAGIC + b"%d %s\n" % (len(said), sha256_of(said).encode()) + said
    head += bytes(-len(head) % ALIGNED)
    body = (raw + bytes(-len(raw) % ALIGNED) for raw in (_packed(each, weights) for each in every))
    write_bytes(Path(path), chain([head], body))


def expert_bytes(d_model: int, d_ff: int, weights: Weights) -> int:
    """Bytes of an expert."""
    return _bytes((2 * d_ff, d_model), weights) + _bytes((d_model, d_ff), weights)


def rounded(expert: Any, weights: Weights) -> tuple[torch.Tensor, torch.Tensor]:
    """`w_in` and `w_out` of a SwiGLU as they are read from a file of this precision."""
    first, second = (
        _unpacked(torch.frombuffer(bytearray(_matrix(each, weights)), dtype=torch.uint8), tuple(each.shape), weights)
        for each in (expert.w_in, expert.w_out)
    )
    return first, second


def source_of(layers: Sequence[MoELayer]) -> str:
    """SHA-256 of the weights of all experts."""
    each = [
        digest({name: value.detach().cpu().float() for name, value in expert.named_parameters()})
        for layer in layers for expert in layer.experts
    ]  # fmt: skip
    return sha256_of("\n".join(each).encode())


class ExpertFile:
    """A file of `write`, opened for reading; close it, or use it in a `with` block. Several threads may read at once.

    `direct` says whether reads go past the page cache (O_DIRECT), which some file systems do not offer. Raises
    `OffloadError` for a file that is absent, damaged or foreign.
    """

    def __init__(self, path: Path | str, direct: bool = True) -> None:
        self.path = Path(path)
        with self._named("it cannot be opened"):
            self._file = os.open(self.path, os.O_RDONLY)
        try:
            self.header, self._body = self._read_header()
            self.direct = direct and self._open_direct()
        except BaseException:
            os.close(self._file)
            raise
        self._buffers = threading.local()

    def __enter__(self) -> ExpertFile:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the file."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1

    def size(self, layer: int, expert: int) -> int:
        """Bytes of an expert."""
        return self._expert(layer, expert).size

    def read(self, layer: int, expert: int) -> torch.Tensor:
        """The bytes of an expert, uint8, as they are on the disk."""
        about = self._expert(layer, expert)
        whole = -(-about.size // ALIGNED) * ALIGNED
        buffer = self._buffer(whole)
        place, done = self._body + about.start, 0
        while done < about.size:
            with self._named(f"expert {expert} of layer {layer} cannot be read"):
                count = os.preadv(self._file, [memoryview(buffer)[done:whole]], place + done)
            if count <= 0:
                raise OffloadError(f"{self.path} ends within expert {expert} of layer {layer}: write it anew")
            done += count
        if zlib.crc32(memoryview(buffer)[: about.size]) != about.crc32:
            raise OffloadError(f"{self.path} is damaged in expert {expert} of layer {layer}: write it anew")
        return torch.frombuffer(buffer, dtype=torch.uint8, count=about.size).clone()

    def weights(self, raw: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """`w_in [2F, D]` and `w_out [D, F]` of an expert's bytes, in float32."""
        own = self.header
        first, second = (2 * own.d_ff, own.d_model), (own.d_model, own.d_ff)
        size = _bytes(first, own.weights)
        return _unpacked(raw[:size], first, own.weights), _unpacked(raw[size:], second, own.weights)

    def check(self, layers: Sequence[MoELayer] = ()) -> None:
        """Read all experts and compare their SHA-256, also with that of the experts of layers that are given."""
        known = [sha256_of(_packed(each, self.header.weights)) for layer in layers for each in layer.experts]
        for number, about in enumerate(self.header.experts):
            layer, expert = divmod(number, self.header.num_experts)
            found = sha256_of(self.read(layer, expert).numpy().tobytes())
            if {found, about.sha256, *known[number : number + 1]} != {found}:
                raise OffloadError(f"{self.path} is damaged in expert {expert} of layer {layer}: write it anew")

    def _expert(self, layer: int, expert: int) -> _Expert:
        if not (0 <= layer < self.header.layers and 0 <= expert < self.header.num_experts):
            raise OffloadError(f"{self.path} has no expert {expert} in layer {layer}")
        return self.header.experts[layer * self.header.num_experts + expert]

    def _read_header(self) -> tuple[_Header, int]:
        with self._named("it cannot be read"):
            start = os.pread(self._file, 128, 0)
        try:
            magic, numbers, _ = start.split(b"\n", 2)
            length, sha256 = int(numbers.split()[0]), numbers.split()[1].decode()
            if magic + b"\n" != MAGIC or not 0 < length < LARGEST:
                raise ValueError("it begins otherwise")
            begin = len(magic) + len(numbers) + 2
            with self._named("it cannot be read"):
                said = os.pread(self._file, length, begin)
            if sha256_of(said) != sha256:
                raise ValueError("its header is damaged")
            header = _Header.model_validate_json(said)
            if len(header.experts) != header.layers * header.num_experts:
                raise ValueError(f"it lists {len(header.experts)} experts")
            wanted = expert_bytes(header.d_model, header.d_ff, header.weights)
            if {each.size for each in header.experts} != {wanted}:
                raise ValueError("its experts are of other sizes than its settings say")
        except (ValueError, IndexError, UnicodeDecodeError, ValidationError, json.JSONDecodeError) as error:
            raise OffloadError(f"{self.path} is no file of experts: {one_line(error)}") from error
        return header, -(-(begin + length) // ALIGNED) * ALIGNED

    def _open_direct(self) -> bool:
        if not hasattr(os, "O_DIRECT"):
            return False
        try:
            direct = os.open(self.path, os.O_RDONLY | os.O_DIRECT)
        except OSError:
            return False
        try:
            os.preadv(direct, [mmap.mmap(-1, ALIGNED)], 0)
        except OSError:
            os.close(direct)
            return False
        os.close(self._file)
        self._file = direct
        return True

    def _buffer(self, size: int) -> Any:
        """Memory on a page boundary, one for each thread."""
        kept = getattr(self._buffers, "kept", None)
        if kept is None or len(kept) < size:
            self._buffers.kept = kept = mmap.mmap(-1, size)
        return kept

    @contextmanager
    def _named(self, what: str) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise OffloadError(f"{self.path}: {what}: {error.strerror}") from error


def _packed(expert: Any, weights: Weights) -> bytes:
    return _matrix(expert.w_in, weights) + _matrix(expert.w_out, weights)


def _matrix(weight: torch.Tensor, weights: Weights) -> bytes:
    plain = weight.detach().float().cpu().contiguous()
    if weights in BITS:
        return quantize(plain.numpy(), BITS[weights])
    kept = plain if weights == "float32" else plain.to(torch.bfloat16).view(torch.int16)
    return kept.numpy().tobytes()


def _bytes(shape: tuple[int, int], weights: Weights) -> int:
    if weights in BITS:
        return quantized_bytes(shape, BITS[weights])
    return shape[0] * shape[1] * (4 if weights == "float32" else 2)


def _unpacked(raw: torch.Tensor, shape: tuple[int, int], weights: Weights) -> torch.Tensor:
    if weights in BITS:
        return torch.from_numpy(dequantize(raw.numpy(), shape, BITS[weights]))
    kind = torch.float32 if weights == "float32" else torch.bfloat16
    return raw.view(kind).view(shape).float()
