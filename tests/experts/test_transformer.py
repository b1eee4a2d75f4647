"""The language model's network: caches, numbers of experts, masks."""

from typing import Any

import pytest
import torch

from experts.language.transformer import ModelSettings, Transformer

SMALL = ModelSettings(vocabulary=50, d_model=32, layers=3, heads=2, num_experts=4, d_ff=16, k=2, context=40)


@pytest.fixture(scope="module")
def model() -> Transformer:
    torch.manual_seed(0)
    made = Transformer(SMALL).eval().requires_grad_(False)
    for weight in made.parameters():
        if weight.ndim == 2:
            weight.mul_(8)  # so that routings differ
    return made


@pytest.fixture
def ids() -> torch.Tensor:
    return torch.randint(50, (3, 12), generator=torch.Generator().manual_seed(1))


def test_with_a_cache_and_without_it_answers_the_same(model: Transformer, ids: torch.Tensor) -> None:
    whole = model(ids).logits
    cache = model.cache(3)
    parts = [model(part, cache=cache).logits for part in ids.split([5, 1, 1, 4, 1], dim=1)]
    torch.testing.assert_close(torch.cat(parts, dim=1), whole, atol=1e-4, rtol=1e-4)
    assert cache.lengths.tolist() == [12] * 3


def test_rows_at_different_places_answer_as_alone(model: Transformer, ids: torch.Tensor) -> None:
    alone = [model(ids[row : row + 1, : 6 + 2 * row]).logits[0, -1] for row in range(3)]
    cache = model.cache(3)
    for row in range(3):
        one = model.cache(1)
        model(ids[row : row + 1, : 5 + 2 * row], cache=one)
        cache.keys[:, row], cache.values[:, row] = one.keys[:, 0], one.values[:, 0]
        cache.lengths[row] = one.lengths[0]
    last = torch.stack([ids[row, 5 + 2 * row] for row in range(3)])[:, None]
    torch.testing.assert_close(model(last, cache=cache).logits[:, 0], torch.stack(alone), atol=1e-4, rtol=1e-4)
    again = cache.rows(torch.tensor([2, 2, 0]))
    assert again.lengths.tolist() == [10, 10, 6]


def test_k_by_number_layer_and_token(model: Transformer, ids: torch.Tensor) -> None:
    by_number = model(ids, k=3).logits
    torch.testing.assert_close(model(ids, k=[3, 3, 3]).logits, by_number)
    each = torch.full((*ids.shape, 3), 3)
    torch.testing.assert_close(model(ids, k=each).logits, by_number, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(model(ids, k=2).logits, model(ids).logits)
    each[0] = 0
    found = model(ids, k=each)
    torch.testing.assert_close(found.logits[1:], by_number[1:], atol=1e-5, rtol=1e-5)
    assert not torch.allclose(found.logits[0], by_number[0])
    used = torch.stack([routing.members.unflatten(0, ids.shape).sum(-1) for routing in found.routing], -1)
    assert torch.equal(used, each)


def test_experts_that_are_not_allowed_do_not_answer(model: Transformer, ids: torch.Tensor) -> None:
    allowed = torch.ones(3, 4, dtype=torch.bool)
    torch.testing.assert_close(model(ids, allowed_LE=allowed).logits, model(ids).logits, atol=1e-5, rtol=1e-5)
    allowed[1] = torch.tensor([True, False, False, False])
    found = model(ids, allowed_LE=allowed)
    assert found.routing[1].members.sum(0).tolist() == [36, 0, 0, 0]


def test_later_tokens_are_not_seen(model: Transformer, ids: torch.Tensor) -> None:
    changed = ids.clone()
    changed[:, 8:] = (changed[:, 8:] + 1) % 50
    torch.testing.assert_close(model(changed).logits[:, :8], model(ids).logits[:, :8], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"k": 5}, "from 0 to 4"),
        ({"k": [1, 1]}, "one for each of 3 layers"),
        ({"k": torch.ones(3, 12)}, r"must be \(3, 12, 3\)"),
    ],
)
def test_wrong_numbers_of_experts_are_told(
    model: Transformer, ids: torch.Tensor, arguments: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        model(ids, **arguments)


def test_the_context_is_a_limit(model: Transformer, ids: torch.Tensor) -> None:
    cache = model.cache(3, size=14)
    model(ids, cache=cache)
    with pytest.raises(ValueError, match="room for 2 only"):
        model(ids[:, :3], cache=cache)
    with pytest.raises(ValueError, match="there are 4 experts"):
        ModelSettings(num_experts=4, k=5)
    with pytest.raises(ValueError, match="multiple of twice"):
        ModelSettings(d_model=10, heads=3)


def test_it_learns() -> None:
    torch.manual_seed(0)
    model = Transformer(SMALL)
    ids = torch.arange(24).repeat(4, 1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(60):
        loss = torch.nn.functional.cross_entropy(model(ids[:, :-1]).logits.flatten(0, 1), ids[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert float(loss.detach()) < 0.1
