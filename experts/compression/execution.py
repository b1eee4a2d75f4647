"""Execution of compressed matrices: as a dense product, or as two thin products for low rank.

Integers of a few bits are decompressed when the model is loaded: they save bytes, not time. Only where the inputs are
integers of 8 bits too does a product run on integers (`torch._int_mm`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from experts.compression import LEVELS, Shape, effective
from experts.compression.pieces import pieces

DENSE, INTEGERS = 0, -1  # ways to run a product; others are ranks


class Product(NamedTuple):
    """A matrix product of a model: its shape, and for a convolution the module and the sides of its input."""

    shape: Shape
    conv: nn.Conv2d | None = None
    sides: tuple[int, int] = (1, 1)


def name_of(product: Product, way: int) -> str:
    """Name of a product in a profile: dense, on integers, or (`way` > 0) as two thin products."""
    places = f" at {product.sides[0]}x{product.sides[1]}" if product.conv else ""
    run = {DENSE: "dense", INTEGERS: "integers"}.get(way, f"rank {way}")
    return f"{product.shape[0]}x{product.shape[1]}{places}, {run}"


def ways(product: Product, level: int, activations: bool = False) -> set[int]:
    """Ways to run a product at a level; `activations` tells whether its inputs are 8-bit integers."""
    integers = activations and product.conv is None and LEVELS[effective(product.shape, level)].name == "int8"
    return {DENSE, rank(product.shape, level)} | ({INTEGERS} if integers else set())


def all_ways(product: Product) -> set[int]:
    """Ways to run a product at any level."""
    return {way for level in range(len(LEVELS)) for way in ways(product, level, activations=True)}


def rank(shape: Shape, level: int) -> int:
    """Rank of a matrix at a level, `DENSE` if it is not low-rank."""
    form = LEVELS[effective(shape, level)]
    return form.rank(shape) if form.rank else DENSE


def products(model: nn.Module, inputs: torch.Tensor) -> dict[str, Product]:
    """The products of a model's matrices by name; `inputs [n, ...]` tell the sizes of the images."""
    sides: dict[int, tuple[int, int]] = {}
    convolutions = {name: module for name, module in model.named_modules() if isinstance(module, nn.Conv2d)}
    handles = [
        module.register_forward_pre_hook(lambda module, given: sides.update({id(module): given[0].shape[-2:]}))
        for module in convolutions.values()
    ]
    try:
        with torch.inference_mode():
            model(inputs)
    finally:
        for handle in handles:
            handle.remove()
    found = {}
    for name, piece in pieces(model).items():
        conv = convolutions.get(name)
        found[name] = Product(piece.shape, conv, sides[id(conv)]) if conv else Product(piece.shape)
    return found


def operation(product: Product, way: int) -> Callable[[int], Callable[[], object]]:
    """The product with n inputs, made ready to run in a way."""
    return _integers(product.shape) if way == INTEGERS else _floats(product, way)


def integer_product(x: torch.Tensor, step: float, weights: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """Inputs `[n, I]` rounded to a known step, times integers `[I, O]`, times a scale of each output `[O]`."""
    rounded = (x * (1 / step)).round_().clamp_(-127, 127).to(torch.int8)
    return torch._int_mm(rounded, weights).float().mul_(scales * step)


def _integers(shape: Shape) -> Callable[[int], Callable[[], object]]:
    generator = torch.Generator().manual_seed(0)
    rows, columns = shape
    weights = torch.randint(-127, 128, (columns, rows), generator=generator, dtype=torch.int8)
    scales = torch.rand(rows, generator=generator)

    def prepare(n: int) -> Callable[[], object]:
        x = torch.randn(n, columns, generator=generator)

        def run() -> object:
            with torch.inference_mode():
                return integer_product(x, 1 / 32, weights, scales)

        return run

    return prepare


def _floats(product: Product, rank: int) -> Callable[[int], Callable[[], object]]:
    generator = torch.Generator().manual_seed(0)
    rows, columns = product.shape
    shapes = [(rank, columns), (rows, rank)] if rank else [(rows, columns)]
    matrices = [torch.randn(shape, generator=generator) / shape[1] ** 0.5 for shape in shapes]
    conv = product.conv

    def prepare(n: int) -> Callable[[], object]:
        if conv is None:
            x = torch.randn(n, columns, generator=generator)
        else:
            x = torch.randn(n, conv.in_channels, *product.sides, generator=generator)

        def run() -> object:
            with torch.inference_mode():
                if conv is None:
                    found = F.linear(x, matrices[0])
                    return F.linear(found, matrices[1]) if rank else found
                first = matrices[0].view(-1, *conv.weight.shape[1:])
                found = F.conv2d(x, first, None, conv.stride, conv.padding, conv.dilation)
                return F.conv2d(found, matrices[1][:, :, None, None]) if rank else found

        return run

    return prepare
