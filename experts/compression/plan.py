"""Compression plans: each matrix's compression level, and the compressed file of a model.

A compressed model is one safetensors file: a single tensor of bytes, matrix after matrix and then everything else as
float32, with the levels and a SHA-256 in its metadata. Its length follows from the model's shapes and the plan alone.
"""

from __future__ import annotations

import copy
import hashlib
import json
import string
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from operator import index
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save as to_bytes
from torch import nn

from cost.files import load_json, save_json
from experts.compression import LEVELS, compress, decompress, size_of
from experts.compression.pieces import other_parameters, pieces

DIGITS = string.digits + string.ascii_lowercase  # a level in the metadata is one character, whatever it is
FORMAT = "moe-envs compressed model 1"
LENGTH = 12  # digits of the longest payload


Raw = bytes


class PlanError(ValueError):
    """A plan or a compressed model is invalid or belongs to another model; the message says why."""


@dataclass(frozen=True)
class Plan:
    """Levels by the name of the matrix, with the matrices' shapes and the number of parameters that are in none."""

    levels: dict[str, int]
    shapes: dict[str, tuple[int, int]]
    others: int

    @classmethod
    def of(cls, model: nn.Module, levels: int | Iterable[int] | Mapping[str, int] = 0) -> Plan:
        """A plan for a model: one level for all matrices, one for each in order, or by name (0 where none is named)."""
        shapes = {name: piece.shape for name, piece in pieces(model).items()}
        if isinstance(levels, Mapping):
            if unknown := levels.keys() - shapes.keys():
                raise PlanError(f"the model has no {', '.join(sorted(unknown))}; it has {', '.join(shapes)}")
            chosen = {name: index(levels.get(name, 0)) for name in shapes}
        else:
            given = [levels] * len(shapes) if isinstance(levels, int | np.integer) else levels
            each = [index(level) for level in given]
            if len(each) != len(shapes):
                raise PlanError(f"{len(each)} levels for the {len(shapes)} matrices of the model")
            chosen = dict(zip(shapes, each, strict=True))
        if wrong := {name: level for name, level in chosen.items() if not 0 <= level < len(LEVELS)}:
            raise PlanError(f"levels must be from 0 to {len(LEVELS) - 1}, got {wrong}")
        return cls(chosen, shapes, _others(model))

    @property
    def bytes(self) -> int:
        """Exact size of the compressed model on disk in bytes."""
        return self.overhead + sum(size_of(self.shapes[name], level) for name, level in self.levels.items())

    @property
    def overhead(self) -> int:
        """Bytes of the file that do not depend on the levels: header and parameters outside the matrices."""
        payload = sum(size_of(self.shapes[name], level) for name, level in self.levels.items()) + 4 * self.others
        return len(_file(b"", self.levels.values(), payload)) + 4 * self.others

    def apply(self, model: nn.Module, importance: Mapping[str, np.ndarray] | None = None) -> nn.Module:
        """Copy of the model with the decompressed weights."""
        return self.compress(model, importance)[1]

    def compress(self, model: nn.Module, importance: Mapping[str, np.ndarray] | None = None) -> tuple[Raw, nn.Module]:
        """The file of the compressed model, and the model it decompresses to; `importance` as of `pieces`."""
        self.check(model)
        restored, payloads = copy.deepcopy(model), []
        for name, piece in pieces(restored).items():
            try:
                layer = compress(piece.read(), self.levels[name], None if importance is None else importance[name])
            except ValueError as error:
                raise PlanError(f"{name}: {error}") from error
            piece.write(layer.weights)
            payloads.append(layer.payload)
        others = [tensor.detach().float().numpy(force=True) for tensor in other_parameters(restored).values()]
        payloads += [np.ascontiguousarray(tensor, dtype="<f4").tobytes() for tensor in others]
        return _file(b"".join(payloads), self.levels.values()), restored

    def save(self, path: str | Path) -> None:
        """Write the plan as JSON."""
        content = {"format": 1, "others": self.others, "matrices": [
            {"name": name, "shape": list(self.shapes[name]), "level": level, "form": LEVELS[level].name}
            for name, level in self.levels.items()
        ]}  # fmt: skip
        save_json(Path(path), content)

    @classmethod
    def load(cls, path: str | Path) -> Plan:
        """Load a plan saved by `save`; raises `PlanError` if invalid."""
        try:
            content: dict[str, Any] = json.loads(Path(path).read_bytes())
            if not isinstance(content, dict):
                raise TypeError("it is no dict")
            if "sha256" in content:  # one written by hand needs none
                content = load_json(Path(path), PlanError, "save it again")
            if foreign := content.keys() - {"format", "others", "matrices"}:
                raise ValueError(f"it has {', '.join(sorted(foreign))}")
            rows = content["matrices"]
            if content["format"] != 1:
                raise ValueError(f"format {content['format']!r}")
            levels = {str(row["name"]): _whole(row["level"]) for row in rows}
            shapes = {str(row["name"]): (_whole(row["shape"][0]), _whole(row["shape"][1])) for row in rows}
            others, forms = _whole(content["others"]), [LEVELS[level].name for level in levels.values()]
        except OSError as error:
            raise PlanError(f"{path} cannot be read: {error.strerror}") from error
        except PlanError:
            raise
        except (ValueError, KeyError, TypeError, IndexError, RecursionError) as error:
            raise PlanError(f"{path} is not a plan: {type(error).__name__} {error}") from error
        if forms != [row.get("form") for row in rows]:
            raise PlanError(f"{path} has levels of another table than this version's")
        return cls(levels, shapes, others)

    def check(self, model: nn.Module) -> None:
        """Raise `PlanError` if the plan does not match the matrices of the model."""
        shapes = {name: piece.shape for name, piece in pieces(model).items()}
        if shapes != self.shapes:
            different = sorted(name for name in shapes | self.shapes if shapes.get(name) != self.shapes.get(name))
            raise PlanError(f"the plan is of another model: they differ in {', '.join(different[:5])}")
        if (others := _others(model)) != self.others:
            raise PlanError(
                f"the plan is of another model: {self.others} parameters outside the matrices, not {others}"
            )


def load_compressed(path: str | Path, model: nn.Module) -> nn.Module:
    """Fill a module with the weights of a compressed model's file, bit for bit those that `Plan.compress` gave.

    Raises `PlanError` where the file is damaged, foreign, or of another model.
    """
    try:
        with safe_open(Path(path), "numpy") as file:
            metadata, raw = file.metadata() or {}, file.get_tensor("payload").tobytes()
        content = json.loads(metadata["plan"])
        levels, sha256 = str(content["levels"]), content["sha256"]
    except (SafetensorError, OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise PlanError(f"{path} is not a compressed model: {type(error).__name__} {error}") from error
    if content.get("format") != FORMAT or sha256 != _digest(levels, raw):
        raise PlanError(f"{path} is damaged or of another format: its SHA-256 is not the one it names")
    plan = Plan.of(model, [DIGITS.index(digit) for digit in levels])
    if len(raw) != plan.bytes - plan.overhead + 4 * plan.others:
        raise PlanError(f"{path} is of another model: {len(raw)} bytes of weights")
    place = 0
    for name, piece in pieces(model).items():
        size = size_of(piece.shape, plan.levels[name])
        piece.write(decompress(raw[place : place + size], piece.shape, plan.levels[name]))
        place += size
    with torch.no_grad():
        for tensor in other_parameters(model).values():
            values = np.frombuffer(raw, dtype="<f4", count=tensor.numel(), offset=place)
            tensor.copy_(torch.from_numpy(values.reshape(tuple(tensor.shape)).copy()))
            place += values.nbytes
    return model


def _whole(value: object) -> int:
    """A whole number >= 0 of a file; raises `ValueError` for anything else."""
    if type(value) is not int or value < 0:
        raise ValueError(f"{value!r} is not a whole number")
    return value


def _others(model: nn.Module) -> int:
    return sum(tensor.numel() for tensor in other_parameters(model).values())


def _file(payload: bytes, levels: Iterable[int], pretend: int = 0) -> bytes:
    """The file of a payload; with `pretend` what such a file has before a payload of that many bytes. The header is as
    long for a payload of any length: spaces make up for the digits that say it twice."""
    digits = "".join(DIGITS[level] for level in levels)
    content = {"format": FORMAT, "levels": digits, "sha256": _digest(digits, payload)}
    size = pretend or len(payload)
    metadata = {"plan": json.dumps(content) + " " * (2 * (LENGTH - len(str(size))))}
    whole = to_bytes({"payload": np.frombuffer(payload or bytes(size), dtype=np.uint8)}, metadata)
    return whole[: len(whole) - pretend]


def _digest(levels: str, payload: bytes) -> str:
    return hashlib.sha256(levels.encode() + b" " + payload).hexdigest()
