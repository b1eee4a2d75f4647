"""How matrices are run: the ways that a level has, and that a product on integers is the product."""

import pytest
import torch
from torch import nn

from experts.compression import LEVELS
from experts.compression.execution import DENSE, INTEGERS, Product, all_ways, integer_product, name_of, operation, ways

NAMES = [level.name for level in LEVELS]


def test_only_inputs_of_8_bits_run_on_integers_and_only_low_ranks_as_two_products() -> None:
    linear, conv = Product((96, 64)), Product((16, 9), nn.Conv2d(1, 16, 3), (28, 28))
    assert ways(linear, NAMES.index("int8")) == {DENSE}
    assert ways(linear, NAMES.index("int8"), activations=True) == {DENSE, INTEGERS}
    assert ways(linear, NAMES.index("int4"), activations=True) == {DENSE}
    assert ways(conv, NAMES.index("int8"), activations=True) == {DENSE}
    rank = 64 * 96 // 2 // (64 + 96)
    assert ways(linear, NAMES.index("low rank, 0.5 of the weights, int8")) == {DENSE, rank}
    assert {DENSE, INTEGERS, rank} <= all_ways(linear)
    assert [name_of(linear, way) for way in (DENSE, INTEGERS, 3)] == [
        "96x64, dense",
        "96x64, integers",
        "96x64, rank 3",
    ]


def test_a_product_on_integers_is_the_product_of_what_was_rounded() -> None:
    generator = torch.Generator().manual_seed(0)
    x, scales = torch.randn(9, 40, generator=generator), torch.rand(6, generator=generator)
    weights = torch.randint(-127, 128, (40, 6), generator=generator, dtype=torch.int8)
    wanted = (x / 0.05).round().clamp(-127, 127) * 0.05 @ (weights.float() * scales)
    torch.testing.assert_close(integer_product(x, 0.05, weights, scales), wanted, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("way", [DENSE, INTEGERS, 7])
def test_every_way_gives_outputs_of_the_product_s_shape(way: int) -> None:
    found = operation(Product((10, 40)), way)(5)()
    assert isinstance(found, torch.Tensor)
    assert found.shape == (5, 10)
    assert found.dtype == torch.float32
