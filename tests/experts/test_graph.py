"""The expert graph: mixing by hand, an identity start that changes nothing, learning that does, and its losses."""

import pytest
import torch

from experts.graph import ExpertGraph
from experts.routers import TopK


def team() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    routing = TopK(2)(torch.randn(6, 4, generator=generator))
    return torch.randn(6, 4, 3, generator=generator), routing.weights, routing.members


def by_loop(graph: ExpertGraph, outputs: torch.Tensor, weights: torch.Tensor, members: torch.Tensor) -> torch.Tensor:
    """Every team on its own."""
    answers = []
    for output, weight, member in zip(outputs, weights, members, strict=True):
        places = member.nonzero()[:, 0]
        edges = graph.edges[places][:, places].softmax(-1)
        mixed = edges @ output[places]
        if graph.convolution is not None:
            mixed = output[places] + graph.strength * mixed.relu() @ graph.convolution
        else:
            mixed = (1 - graph.strength) * output[places] + graph.strength * mixed
        answers.append(((1.0 if graph.mode == "sum" else weight[places, None]) * mixed).sum(0))
    return torch.stack(answers)


@pytest.mark.parametrize("mode", ["sum", "weighted", "conv"])
@pytest.mark.parametrize("strength", [1.0, 0.3])
def test_a_team_s_answer_is_that_of_a_plain_loop(mode: str, strength: float) -> None:
    torch.manual_seed(0)
    graph = ExpertGraph(4, mode, "random", strength=strength, width=3 if mode == "conv" else None)
    if graph.convolution is not None:
        torch.nn.init.normal_(graph.convolution)
    torch.testing.assert_close(graph(*team()), by_loop(graph, *team()), atol=1e-6, rtol=1e-5)


def test_two_experts_by_hand() -> None:
    graph = ExpertGraph(2, "weighted", "random")
    with torch.no_grad():
        graph.edges.copy_(torch.tensor([[0.75, 0.25], [0.5, 0.5]]).log())
    weights = graph.weights(torch.tensor([[0.8, 0.2], [1.0, 0.0]]), torch.tensor([[True, True], [True, False]]))
    torch.testing.assert_close(weights, torch.tensor([[0.8 * 0.75 + 0.2 * 0.5, 0.8 * 0.25 + 0.2 * 0.5], [1.0, 0.0]]))


def test_a_team_of_one_answers_alone_and_an_empty_one_not_at_all() -> None:
    graph, members = ExpertGraph(3, init="random"), torch.tensor([[False, True, False], [False] * 3])
    weights = graph.weights(members.float(), members)
    torch.testing.assert_close(weights, members.float())


@pytest.mark.parametrize("mode", ["weighted", "conv"])
def test_an_identity_start_is_close_to_no_graph(mode: str) -> None:
    outputs, weights, members = team()
    graph = ExpertGraph(4, mode, "identity", width=3 if mode == "conv" else None)
    plain = torch.einsum("te,tec->tc", weights, outputs)
    assert (graph(outputs, weights, members) - plain).abs().max() < 0.06 * outputs.abs().max()


@pytest.mark.parametrize("mode", ["sum", "weighted", "conv"])
def test_learning_moves_the_edges_and_is_the_same_under_a_seed(mode: str) -> None:
    outputs, weights, members = team()

    def learn() -> torch.Tensor:
        torch.manual_seed(1)
        graph = ExpertGraph(4, mode, "random", width=3 if mode == "conv" else None)
        if graph.convolution is not None:
            torch.nn.init.normal_(graph.convolution)
        before = graph.edges.detach().clone()
        optimizer = torch.optim.Adam(graph.parameters(), lr=0.05)
        for _ in range(20):
            loss = (graph(outputs, weights, members) - outputs[:, 0]).square().mean() + 0.01 * graph.sparsity_loss()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        assert (graph.edges - before).abs().max() > 0.1
        return graph.edges.detach()

    assert torch.equal(learn(), learn())


def test_sparsity_by_hand() -> None:
    graph = ExpertGraph(3, init="random")
    with torch.no_grad():
        graph.edges.copy_(torch.tensor([[0.9, 0.09, 0.01], [0.3, 0.4, 0.3], [0.005, 0.005, 0.99]]).log())
    assert graph.sparsity_loss().item() == pytest.approx(1 - (0.9 + 0.4 + 0.99) / 3)
    assert graph.sparsity(0.02) == pytest.approx(3 / 6)


def test_the_share_of_others_is_that_of_the_teams_by_hand() -> None:
    graph = ExpertGraph(3, init="random")
    with torch.no_grad():
        graph.edges.copy_(torch.tensor([[0.6, 0.3, 0.1], [0.25, 0.5, 0.25], [0.1, 0.1, 0.8]]).log())
    members = torch.tensor([[True, True, False], [False, False, True]])
    assert graph.share_of_others(members).item() == pytest.approx((1 / 3 + 1 / 3 + 0) / 3)


def test_the_gate_learns_in_every_mode() -> None:
    outputs, _, members = team()
    for mode in ("sum", "weighted"):
        weights = torch.rand(6, 4, requires_grad=True)
        ExpertGraph(4, mode, "random")(outputs, weights * members, members).square().sum().backward()
        assert weights.grad is not None
        assert weights.grad.abs().max() > 1e-3


def test_no_weight_is_lost_to_an_edge_that_is_much_larger_and_outside_the_team() -> None:
    graph = ExpertGraph(3, init="random")
    with torch.no_grad():
        graph.edges.copy_(torch.tensor([[0.0, 0.0, 75.0]] * 3))
    weights = graph.weights(torch.tensor([[0.5, 0.5, 0.0]]), torch.tensor([[True, True, False]]))
    torch.testing.assert_close(weights, torch.tensor([[0.5, 0.5, 0.0]]))


def test_refusals_name_what_is_allowed() -> None:
    with pytest.raises(ValueError, match="weighted"):
        ExpertGraph(4, "mean")
    with pytest.raises(ValueError, match="0 to 1"):
        ExpertGraph(4, strength=2)
    with pytest.raises(ValueError, match="conv"):
        ExpertGraph(4, "conv")
