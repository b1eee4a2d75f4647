"""Does it help when experts cooperate? Networks with and without a graph, by number of experts, gate and router.

Every setup is trained with the same seeds: the same first experts, the same order of the data; differences are paired.
Accuracy is on test; nothing is chosen on it: the best network, which is kept, is the best on validation.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from benchmarks.experiments import cooperation_report
from benchmarks.results.statistics import seeds_interval
from benchmarks.runner import processes as jobs
from cost.files import write_text
from cost.machine import provenance
from experts import data
from experts.checkpoints import load_model, save_model
from experts.losses import diversity_loss
from experts.network import MoENetwork, NetworkSettings, train_network
from moe_envs.core.threads import one_thread

EPOCHS = {"digits": (30, 32), "fashion-mnist": (8, 128)}  # and batch size
EXPERTS, LAYERS, BATCH = 8, 2, 256
BASE = "flat, k=2, no graph"
THRESHOLD = 0.5 / EXPERTS  # of an edge: half of what each of all experts would get evenly
UTILISATION = 0.85  # asked for
Result = dict[str, Any]


class Setup(NamedTuple):
    """What a network and its training differ in, the setup it is compared with, and the question it belongs to."""

    network: dict[str, Any]
    training: dict[str, Any]
    beside: str | None
    question: str


def setups() -> dict[str, Setup]:
    """Everything that is compared, by name."""
    found = {}
    graphs: dict[str, Any] = {"no graph": None, "identity": {"init": "identity"}, "random": {"init": "random"}}
    for router, gate in (("topk", "flat"), ("hierarchical", "hierarchical")):
        for k in (1, 2, 3):
            for graph, options in graphs.items():
                network = {"router": router, "k": k, "graph": options}
                if k == 1:  # over a single expert the softmax is 1, and the gate would not learn
                    network["router_options"] = {"normalize": False}
                beside = None if options is None else f"{gate}, k={k}, no graph"
                found[f"{gate}, k={k}, {graph}"] = Setup(network, {}, beside, "graph")
    for name, weight in (("identity, no L1", 0.0), ("random, no L1", 0.0), ("random, L1 times 10", 0.1)):
        options = {"init": name.partition(",")[0]}
        found[f"flat, k=2, {name}"] = Setup({"k": 2, "graph": options}, {"sparsity": weight}, BASE, "graph")
    for mode in ("sum", "conv"):
        options = {"mode": mode, "init": "random"}
        found[f"flat, k=2, random, {mode}"] = Setup({"k": 2, "graph": options}, {}, BASE, "graph")
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
    found |= {name: Setup(network, {}, BASE, "router") for name, network in routers.items()}
    weights: dict[str, dict[str, Any]] = {
        "no balancing": {"balance": 0.0},
        "entropy-weighted balancing": {"entropy_weighted": True},
        "z-loss": {"z": 1e-3},
        "diversity": {"diversity": 0.1},
        "drift stabiliser": {"drift": 1.0},
    }
    return found | {name: Setup({}, training, BASE, "regulariser") for name, training in weights.items()}


def train_one(source: str, name: str, seed: int, epochs: int, path: Path) -> Result:
    """Train a setup and describe what came out; what is there already for the same arguments is read."""
    setup, batch_size = setups()[name], EPOCHS[source][1]
    wanted = {"data": source, "name": name, "seed": seed, "epochs": epochs, "batch_size": batch_size,
              "network": setup.network, "training": setup.training}  # fmt: skip
    record = path.with_suffix(".json")
    if record.exists():
        found: Result = json.loads(record.read_text())
        if {key: found.get(key) for key in wanted} != wanted:
            raise ValueError(f"{record} is of another training; name another folder by --out")
        return found | {"path": str(path)}
    content = data.load(source)
    rows = np.concatenate([content.splits[split] for split in ("train", "rl_train")])
    x, y = content.inputs[rows], content.labels[rows]
    settings = NetworkSettings(epochs=epochs, batch_size=batch_size, seed=seed, **setup.training)
    edges: list[Any] = []
    moved: list[torch.Tensor] = []

    def after_epoch(epoch: int, network: MoENetwork) -> None:
        moved.append(torch.cat([w.detach().flatten() for layer in network.layers for w in _experts(layer)]))
        if setup.network.get("graph") is not None:
            edges.append([layer.graph.adjacency.tolist() for layer in network.layers])  # type: ignore[union-attr, operator]

    begun = time.process_time()
    network = train_network(lambda: _make(source, setup.network), x, y, settings, after_epoch)
    seconds = time.process_time() - begun
    result = wanted | {"path": str(path), "train_s": seconds, "edges": edges, **_described(network, content)}
    others = ~np.eye(EXPERTS, dtype=np.bool_)
    result["sparsity_before"] = [float((np.array(each)[others] < THRESHOLD).mean()) for each in (edges or [[]])[0]]
    result["drift"] = float((moved[-1] - moved[-2]).norm() / moved[-2].norm())
    save_model(network, path)
    result |= provenance()
    write_text(record, json.dumps(result))
    return result


def run(
    source: str, seeds: int, epochs: int | None, only: list[str], processes: int, out: Path,
    add_task: Callable[[str], Callable[[float], object]],
) -> Result:  # fmt: skip
    """Train all, summarise; writes results.json, runs.csv, report.md, pictures, and the best network."""
    names = [name for name in setups() if not only or name in only]
    todo = [(name, seed) for name in names for seed in range(seeds)]
    with jobs.pool(processes) as pool:
        trained = jobs.gather(
            [
                pool.submit(train_one, source, name, seed, epochs or EPOCHS[source][0],
                            out / "networks" / f"{_file(name)}-{seed}.safetensors")
                for name, seed in todo
            ],
            add_task(f"{len(todo)} trainings on {source}"),
        )  # fmt: skip
    times = _relative_times(source, {each["name"]: each["path"] for each in trained if each["seed"] == 0})
    for each in trained:
        each["time"] = times[each["name"]]
    best = max(trained, key=lambda each: each["validation"])
    save_model(load_model(Path(best["path"]), MoENetwork), out / "best.safetensors")
    result: Result = {
        "data": source, "threshold": THRESHOLD, "utilisation_asked": UTILISATION, "rows": summarise(trained),
        "beside": BASE if BASE in names else names[0], "commits": sorted({str(each["commit"]) for each in trained}),
        "best": {key: best[key] for key in ("name", "seed", "validation", "accuracy", "network", "training")},
        **provenance(),
    }  # fmt: skip
    write_text(out / "results.json", json.dumps(result, indent=1))
    with one_thread():
        cooperation_report.write(result, trained, out, add_task("pictures and report"))
    return result


def summarise(trained: list[Result]) -> list[Result]:
    """Means over seeds with 95 % intervals, and paired differences of accuracy, in points."""
    by_name: dict[str, list[Result]] = {}
    for each in trained:
        by_name.setdefault(each["name"], []).append(each)
    rows = []
    for name, of_seeds in by_name.items():
        setup = setups()[name]
        row: Result = {"name": name, "question": setup.question, "seeds": len(of_seeds), "time": of_seeds[0]["time"]}
        for key in ("accuracy", "diversity", "drift", "experts_per_input", "dropped"):
            values = np.array([each[key] for each in of_seeds])
            row[key], row[f"{key}_ci95"] = float(values.mean()), seeds_interval(values)
        for key in ("utilisation", "sparsity", "others", "sparsity_before"):
            row[key] = np.mean([each[key] for each in of_seeds], axis=0).tolist()
        if setup.beside in by_name:
            theirs = {each["seed"]: each["accuracy"] for each in by_name[setup.beside]}
            points = 100 * np.array([each["accuracy"] - theirs[each["seed"]] for each in of_seeds])
            row |= {"beside": setup.beside, "points": float(points.mean()), "points_ci95": seeds_interval(points)}
        rows.append(row)
    return rows


def _make(source: str, options: dict[str, Any]) -> MoENetwork:
    content = data.load(source)
    classes = int(content.labels.max()) + 1
    return MoENetwork(content.inputs.shape[1], classes, num_experts=EXPERTS, num_layers=LAYERS, **options)


def _experts(layer: Any) -> list[torch.Tensor]:
    return list(layer.experts.parameters())


@torch.inference_mode()
def _described(network: MoENetwork, content: data.Dataset) -> Result:
    found: Result = {}
    for split, key in (("validation", "validation"), ("test", "accuracy")):
        inputs, labels = (torch.from_numpy(each) for each in content[split])
        logits, statistics = network(inputs)
        found[key] = float((logits.argmax(1) == labels).float().mean())
    found["utilisation"] = [float(each.utilisation) for each in statistics]
    found["experts_per_input"] = float(np.mean([float(each.experts_per_input) for each in statistics]))
    found["dropped"] = float(np.mean([float(each.dropped) for each in statistics]))
    found["diversity"] = 1 - float(np.mean([float(diversity_loss(each)) for each in network.probe(inputs[:500])]))
    graphs: list[Any] = [layer.graph for layer in network.layers if layer.graph is not None]
    found["sparsity"] = [graph.sparsity(THRESHOLD) for graph in graphs]
    found["others"] = [
        float(graph.share_of_others(each.members)) for graph, each in zip(graphs, statistics, strict=False)
    ]
    return found


@torch.inference_mode()
def _relative_times(source: str, paths: dict[str, str], rounds: int = 31) -> dict[str, float]:
    """CPU time of a batch through each network over that of the plain top-2 one, by turns, medians of the ratios."""
    x = torch.from_numpy(data.load(source)["test"][0][:BATCH])
    plain, found = load_model(Path(paths.get(BASE) or next(iter(paths.values()))), MoENetwork), {}
    with one_thread():
        for name, path in paths.items():
            network, ratios = load_model(Path(path), MoENetwork), []
            for _ in range(rounds):
                marks = [time.process_time_ns()]
                for each in (network, plain):
                    for _ in range(3):
                        each(x)
                    marks.append(time.process_time_ns())
                ratios.append((marks[1] - marks[0]) / (marks[2] - marks[1]))
            found[name] = float(np.median(ratios[1:]))
    return found


def _file(name: str) -> str:
    return "".join(letter if letter.isalnum() else "-" for letter in name).replace("--", "-")
