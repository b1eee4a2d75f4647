"""Network variants of the experiment `cooperation`."""

from __future__ import annotations

from typing import Any, NamedTuple

EXPERTS, LAYERS = 8, 2
BASE = "flat, k=2, no graph"


class Variant(NamedTuple):
    """Settings of a network and its training, the reference variant, and the question it answers."""

    network: dict[str, Any]
    training: dict[str, Any]
    beside: str | None
    question: str


def variants() -> dict[str, Variant]:
    """All variants by name."""
    found = {}
    graphs: dict[str, Any] = {"no graph": None, "identity": {"init": "identity"}, "random": {"init": "random"}}
    for router, gate in (("topk", "flat"), ("hierarchical", "hierarchical")):
        for k in (1, 2, 3):
            for graph, options in graphs.items():
                network = {"router": router, "k": k, "graph": options}
                if k == 1:  # over a single expert the softmax is 1, and the gate would not learn
                    network["router_options"] = {"normalize": False}
                beside = None if options is None else f"{gate}, k={k}, no graph"
                found[f"{gate}, k={k}, {graph}"] = Variant(network, {}, beside, "graph")
    for name, weight in (("identity, no L1", 0.0), ("random, no L1", 0.0), ("random, L1 times 10", 0.1)):
        options = {"init": name.partition(",")[0]}
        found[f"flat, k=2, {name}"] = Variant({"k": 2, "graph": options}, {"sparsity": weight}, BASE, "graph")
    for mode in ("sum", "conv"):
        options = {"mode": mode, "init": "random"}
        found[f"flat, k=2, random, {mode}"] = Variant({"k": 2, "graph": options}, {}, BASE, "graph")
    routers: dict[str, dict[str, Any]] = {
        "switch": {"router": "switch"},
        "expert choice": {"router": "expert-choice"},
        "top-p": {"router": "top-p", "router_options": {"p": 0.4, "max_k": 4}},
        "sampled": {"router": "sampled", "k": 2},
        "noisy top-2": {"router_options": {"noise": 1.0}},
        "top-2, capacity 1.25": {"router_options": {"capacity_factor": 1.25}},
        "top-3, 2 null experts": {"k": 3, "zero_experts": 2},
        "top-2, a copy expert": {"copy_experts": 1},
    }
    found |= {name: Variant(network, {}, BASE, "router") for name, network in routers.items()}
    weights: dict[str, dict[str, Any]] = {
        "no balancing": {"balance": 0.0},
        "entropy-weighted balancing": {"entropy_weighted": True},
        "z-loss": {"z": 1e-3},
        "diversity": {"diversity": 0.1},
        "drift stabiliser": {"drift": 1.0},
    }
    return found | {name: Variant({}, training, BASE, "regulariser") for name, training in weights.items()}
