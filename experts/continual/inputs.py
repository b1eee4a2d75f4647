"""How inputs are kept: small images of few bits a pixel, packed into bytes, or features as they are."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

CHUNK = 4096
LEAST_SIDE = 4


@dataclass(frozen=True)
class Encoding:
    """Images of `shape` (channels, side, side) are shrunk to `side` and stored with `bits` a pixel; features `(d,)` are
    float32."""

    shape: tuple[int, ...]
    side: int | None = None
    bits: int = 8

    def __post_init__(self) -> None:
        if self.side is not None and (len(self.shape) != 3 or not LEAST_SIDE <= self.side <= self.shape[1]):
            raise ValueError(
                f"side={self.side}: must be from {LEAST_SIDE} to that of the inputs, of the shape {self.shape}"
            )
        if self.bits not in (1, 2, 4, 8):
            raise ValueError(f"bits={self.bits!r} is not 1, 2, 4 or 8")
        if self.bits != 8 and len(self.shape) != 3:
            raise ValueError(f"bits={self.bits} is for images; the inputs have the shape {self.shape}")

    @property
    def decoded(self) -> tuple[int, ...]:
        """Shape of a decoded input."""
        side = self.side or self.shape[-1]
        return (self.shape[0], side, side) if len(self.shape) == 3 else self.shape

    def encode(self, inputs: np.ndarray) -> np.ndarray:
        """Rows `[n, bytes]` uint8 of images uint8, or the features themselves; raises `ValueError` for others."""
        wanted = np.uint8 if len(self.shape) == 3 else np.float32
        if inputs.shape[1:] != self.shape or inputs.dtype != wanted:
            said = f"inputs {inputs.shape} {inputs.dtype}"
            raise ValueError(f"{said}: [n, {', '.join(map(str, self.shape))}] {np.dtype(wanted)} is needed")
        if len(self.shape) != 3:
            return np.ascontiguousarray(inputs)
        return np.concatenate([self._packed(part) for part in np.array_split(inputs, max(1, -(-len(inputs) // CHUNK)))])

    def decode(self, rows: np.ndarray) -> torch.Tensor:
        """Inputs `[n, ...]` float32; pixels in 0..1."""
        if len(self.shape) != 3:
            return torch.from_numpy(rows)
        if self.bits < 8:
            places = np.arange(0, 8, self.bits, dtype=np.uint8)
            rows = ((rows[:, :, None] >> places) & (2**self.bits - 1)).reshape(len(rows), -1)
        values = torch.from_numpy(rows[:, : int(np.prod(self.decoded))]).float() / (2**self.bits - 1)
        return values.view(-1, *self.decoded)

    def _packed(self, images: np.ndarray) -> np.ndarray:
        if self.side not in (None, self.shape[1]):
            found = F.interpolate(torch.from_numpy(images).float(), size=(self.side, self.side), mode="area")
            images = found.round().to(torch.uint8).numpy()
        flat = images.reshape(len(images), -1)
        if self.bits == 8:
            return flat
        levels, each = 2**self.bits - 1, 8 // self.bits
        values = (flat.astype(np.uint16) * levels + 127) // 255
        values = np.pad(values, ((0, 0), (0, -values.shape[1] % each))).reshape(len(flat), -1, each)
        return (values << np.arange(0, 8, self.bits)).sum(2).astype(np.uint8)


def shifted(x: torch.Tensor, most: int, random: np.random.Generator) -> torch.Tensor:
    """Images `[B, channels, side, side]` moved by up to `most` pixels each way, zeros behind."""
    side, count = x.shape[-1], len(x)
    moves = torch.from_numpy(random.integers(0, 2 * most + 1, size=(2, count, 1)))
    rows, columns = moves + torch.arange(side)
    padded = F.pad(x, (most,) * 4)
    return padded[torch.arange(count)[:, None, None], :, rows[:, :, None], columns[:, None]].permute(0, 3, 1, 2)
