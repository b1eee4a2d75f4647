"""Routers: cases worked out by hand, plain loops, capacity, noise, and gradients that reach the gate."""

import math

import pytest
import torch

from experts.routers import (
    ROUTERS,
    Decided,
    ExpertChoice,
    Hierarchical,
    Router,
    Routing,
    Sampled,
    Switch,
    TopK,
    TopP,
    WithNull,
    make_router,
)

# Softmaxes of (.5, .25, .125, .125) in different orders: their logits are logarithms.
P = torch.tensor([[0.5, 0.25, 0.125, 0.125], [0.25, 0.5, 0.125, 0.125], [0.5, 0.125, 0.25, 0.125]])
LOGITS = P.log()
ALL: list[Router] = [*(make(**({"max_k": 3} if make is TopP else {})) for make in ROUTERS.values()),
                     WithNull(TopK(2), 1), Decided(lambda logits: logits > logits.median())]  # fmt: skip


def close(found: torch.Tensor, wanted: list[list[float]]) -> None:
    torch.testing.assert_close(found, torch.tensor(wanted), atol=1e-6, rtol=0)


def test_top_k_by_hand() -> None:
    third = [2 / 3, 1 / 3]
    close(TopK(2)(LOGITS).weights, [[*third, 0, 0], [*third[::-1], 0, 0], [third[0], 0, third[1], 0]])


def test_switch_by_hand_weighs_by_the_softmax_over_all_and_drops_what_is_too_much() -> None:
    found = Switch(capacity_factor=4 / 3)(LOGITS)  # ceil(4/3 * 3 / 4) = 1 input for each expert; two want the first
    assert found.members.sum(0).tolist() == [1, 1, 0, 0]
    assert float(found.statistics.dropped) == pytest.approx(1 / 3)
    close(Switch(capacity_factor=None)(LOGITS).weights, [[0.5, 0, 0, 0], [0, 0.5, 0, 0], [0.5, 0, 0, 0]])


def test_what_a_full_expert_drops_is_what_wants_it_least() -> None:
    logits = torch.tensor([[1.0, 0.0], [3.0, 0.0], [2.0, 0.0], [5.0, 9.0]])
    found = TopK(1, capacity_factor=1.0)(logits)  # two for each
    assert found.members.tolist() == [[False, False], [True, False], [True, False], [False, True]]


def test_expert_choice_by_hand() -> None:
    found = ExpertChoice(k=4 / 3)(LOGITS)  # one input for each expert: 3 * (4/3) / 4
    assert found.members.sum(0).tolist() == [1, 1, 1, 1]
    assert found.members[1, 1]
    assert found.members[2, 2]
    assert float(found.weights[1, 1]) == pytest.approx(0.5)


@pytest.mark.parametrize("k", [1, 2, 3])
def test_expert_choice_fills_every_expert_exactly(k: int) -> None:
    logits = torch.randn(40, 8, generator=torch.Generator().manual_seed(k)) + torch.arange(8.0)
    found = ExpertChoice(k)(logits)
    assert found.members.sum(0).tolist() == [5 * k] * 8
    assert float(found.statistics.utilisation) == pytest.approx(1)


def test_top_p_by_hand() -> None:
    weights = TopP(p=0.6)(LOGITS).weights
    close(weights[:1], [[2 / 3, 1 / 3, 0, 0]])
    close(TopK(1, normalize=False)(LOGITS).weights[:1], [[0.5, 0, 0, 0]])
    assert TopP(p=0.5)(LOGITS).members.sum(1).tolist() == [1, 1, 1]
    assert TopP(p=0.0)(LOGITS).members.sum(1).tolist() == [1, 1, 1]
    assert TopP(p=1.0, max_k=3)(LOGITS).members.sum(1).tolist() == [3, 3, 3]
    assert TopP(p=0.8)(LOGITS).members.sum(1).tolist() == [3, 3, 3]


def test_hierarchical_by_hand() -> None:
    probabilities = torch.tensor([[0.3, 0.3, 0.4, 0.0 + 1e-9]])  # the first two outweigh the group of the largest
    found = Hierarchical(k=1, groups=2)(probabilities.log())
    assert found.members[0, 2:].tolist() == [False, False]
    both = Hierarchical(k=2, groups=2, top_groups=2)(LOGITS)
    torch.testing.assert_close(both.weights, TopK(2)(LOGITS).weights)
    with pytest.raises(ValueError, match="must divide"):
        Hierarchical(k=2, groups=3)(LOGITS)


def test_null_experts_answer_for_nobody() -> None:
    found = WithNull(TopK(2), 1)(torch.cat([LOGITS, torch.full((3, 1), math.log(0.3))], dim=1))
    assert found.weights.shape == (3, 4)
    assert found.members.sum(1).tolist() == [1, 1, 1]  # .5 and the null expert's .3
    close(found.weights.sum(1, keepdim=True), [[1.0]] * 3)
    assert float(found.statistics.experts_per_input) == 1
    with pytest.raises(ValueError, match="at least 1"):
        WithNull(TopK(2), 0)


def test_sampled_draws_by_the_softmax_and_says_how_likely_that_was() -> None:
    generator = torch.Generator().manual_seed(0)
    many = P[:1].log().expand(40_000, 4)
    found = Sampled(1)(many, generator)
    torch.testing.assert_close(found.members.float().mean(0), P[0], atol=0.01, rtol=0)
    chosen = found.members.float().argmax(1)
    torch.testing.assert_close(found.statistics.log_probability, P[0].log()[chosen])
    pair = Sampled(2)(LOGITS)  # without a generator the largest: .5, then .25 of what is left
    torch.testing.assert_close(pair.statistics.log_probability, torch.full((3,), math.log(0.5 * 0.5)))


def test_a_policy_decides() -> None:
    found = Decided(lambda logits: torch.tensor([[True, False, False, True], [False] * 4, [True] * 4]))(LOGITS)
    close(found.weights, [[0.8, 0, 0, 0.2], [0, 0, 0, 0], [0.5, 0.125, 0.25, 0.125]])


@pytest.mark.parametrize("router", ALL, ids=lambda router: type(router).__name__)
def test_gradients_flow_and_deterministic_calls_are_equal(router: Router) -> None:
    logits = torch.randn(16, 8, generator=torch.Generator().manual_seed(0), requires_grad=True)
    found, again = router(logits), router(logits)
    torch.testing.assert_close(found.weights, again.weights, rtol=0, atol=0)
    used = torch.arange(found.weights.shape[1], dtype=torch.float32)
    (found.weights * used).sum().backward()
    assert logits.grad is not None
    assert logits.grad.isfinite().all()
    single = found.members.sum() == len(logits) and not isinstance(router, Switch)  # a softmax over one is constant
    assert bool((logits.grad.abs().sum(1) > 0).any()) is not single
    assert ((found.weights > 0) <= found.members).all()


@pytest.mark.parametrize("router", [TopK(2, noise=1.0), Switch(noise=1.0), ExpertChoice(noise=1.0), TopP(noise=1.0),
                                    Hierarchical(noise=1.0), Sampled(2)])  # fmt: skip
def test_noise_comes_from_the_generator_alone(router: Router) -> None:
    logits = torch.randn(64, 8, generator=torch.Generator().manual_seed(0))

    def run(seed: int) -> Routing:
        return router(logits, torch.Generator().manual_seed(seed))

    before = torch.get_rng_state()
    assert torch.equal(run(1).members, run(1).members)
    assert not torch.equal(run(1).members, run(2).members)
    assert not torch.equal(run(1).members, router(logits).members)
    assert torch.equal(before, torch.get_rng_state())


def by_loop(router: Router, logits: torch.Tensor) -> torch.Tensor:
    """Weights, input by input or expert by expert, in plain Python."""
    rows = [[float(value) for value in row] for row in logits]
    soft = [[math.exp(value) / sum(map(math.exp, row)) for value in row] for row in rows]
    experts, weights = len(rows[0]), [[0.0] * len(rows[0]) for _ in rows]
    if isinstance(router, ExpertChoice):
        count = math.ceil(len(rows) * router.k / experts)
        for expert in range(experts):
            for place in sorted(range(len(rows)), key=lambda place: -soft[place][expert])[:count]:
                weights[place][expert] = soft[place][expert]
        return torch.tensor(weights)
    for row, probabilities, weight in zip(rows, soft, weights, strict=True):
        order = sorted(range(experts), key=lambda expert: -row[expert])
        if isinstance(router, Hierarchical):
            size = experts // router.groups
            sums = [sum(map(math.exp, row[start : start + size])) for start in range(0, experts, size)]
            order = [expert for expert in order if sums[expert // size] == max(sums)]
        count, total = getattr(router, "k", 1), 0.0
        if isinstance(router, TopP):
            count = 0
            while total < router.p:
                total, count = total + probabilities[order[count]], count + 1
        for expert in order[:count]:
            whole = sum(math.exp(row[each]) for each in order[:count])
            weight[expert] = probabilities[expert] if isinstance(router, Switch) else math.exp(row[expert]) / whole
    return torch.tensor(weights)


PLAIN = [TopK(1), TopK(3), Switch(capacity_factor=None), ExpertChoice(2), ExpertChoice(1.3), TopP(0.7), Hierarchical(2)]


@pytest.mark.parametrize("router", PLAIN, ids=repr)
def test_weights_are_those_of_a_plain_loop(router: Router) -> None:
    logits = torch.randn(33, 8, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(router(logits).weights, by_loop(router, logits), atol=1e-6, rtol=0)


@pytest.mark.parametrize("name", ROUTERS)
def test_no_inputs_and_no_choices(name: str) -> None:
    found = make_router(name)(torch.zeros(0, 8))
    assert found.weights.shape == found.members.shape == (0, 8)
    logits = torch.randn(5, 8, requires_grad=True)
    statistics = (
        Decided(lambda given: given > torch.inf)(logits).statistics
        if name == "topk"
        else make_router(name)(logits).statistics
    )
    assert float(statistics.dropped) == 0 or name == "switch"
    (statistics.balance_loss + statistics.entropy_weighted_balance_loss + statistics.gate_entropy).backward()
    assert logits.grad is not None
    assert logits.grad.isfinite().all()


def test_statistics_by_hand() -> None:
    found = TopK(1)(LOGITS).statistics
    close(found.load[None], [[2 / 3, 1 / 3, 0, 0]])
    assert float(found.utilisation) == pytest.approx((math.log(3) - 2 / 3 * math.log(2)) / math.log(4))
    assert float(found.gate_entropy) == pytest.approx(1.75 * math.log(2))
    assert float(found.z_loss) == pytest.approx(0, abs=1e-9)
    wanted = 4 * (2 / 3 * 1.25 / 3 + 1 / 3 * 0.875 / 3)
    assert float(found.balance_loss) == pytest.approx(wanted)


def test_names_and_what_is_not_one() -> None:
    assert make_router("topk", 3, {"noise": 0.5}) == TopK(3, noise=0.5)
    assert make_router("top-p", 3) == TopP()
    with pytest.raises(ValueError, match="has no noize; it has k, noise"):
        make_router("topk", 3, {"noize": 0.5})
    with pytest.raises(ValueError, match="is one already"):
        make_router(TopK(2), options={"noise": 0.5})
    with pytest.raises(ValueError, match="expert-choice"):
        make_router("best")
    with pytest.raises(ValueError, match="from 1 to 4"):
        TopK(5)(LOGITS)


@pytest.mark.parametrize(
    ("router", "option", "value"),
    [
        ("topk", "k", 0), ("topk", "noise", -1.0), ("switch", "capacity_factor", 0.0), ("top-p", "p", float("nan")),
        ("top-p", "max_k", 0), ("hierarchical", "groups", 0), ("sampled", "temperature", 0.0),
        ("expert-choice", "k", float("inf")),
    ],
)  # fmt: skip
def test_options_out_of_range_are_refused_when_a_router_is_made(router: str, option: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"{option}={value}: must be"):
        make_router(router, options={option: value})
