"""Do cooperating experts improve accuracy? Networks with and without an expert graph, several gates and routers.

All variants share their seeds, initial experts and data order, so differences are paired by seed. Accuracy is measured
on test; the best network is selected on validation.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
import torch

from benchmarks.experiments.cooperation import report
from benchmarks.experiments.cooperation.networks import EXPERTS, LAYERS, Variant, variants
from benchmarks.results.statistics import seeds_interval
from benchmarks.results.tables import records
from benchmarks.runner.setup import Arguments
from cost.files import locked
from experts import data
from experts.checkpoints import load_model, save_model
from experts.losses import diversity_loss
from experts.network import MoENetwork, NetworkSettings, train_network
from moe_envs.core.threads import one_thread

EPOCHS = {"digits": (30, 32), "fashion-mnist": (8, 128)}  # epochs, batch size
BATCH, ROUNDS = 256, 31  # inputs per timed batch, number of timings
BASE = "flat, k=2, no graph"
THRESHOLD = 0.5 / EXPERTS  # minimum weight of an edge: half of the uniform weight
SEEDS = (0, 1, 2, 3, 4)
SETTINGS = {name: {"network": name} for name in variants()}
QUICK = {"seeds": [0, 1], "settings": {"epochs": 2},
         "setups": {name: SETTINGS[name] for name in (BASE, "flat, k=2, identity", "switch")}}  # fmt: skip


class CooperationSetup(Arguments):
    """Name of a variant; `epochs` defaults to 30 on digits and 8 on Fashion-MNIST."""

    network: str
    data: Literal["digits", "fashion-mnist"] = "digits"
    epochs: int | None = None


Setup = CooperationSetup


def check(setups: dict[str, CooperationSetup], splits: list[str]) -> None:
    """Raise `ValueError` for an unknown variant."""
    if unknown := {setup.network for setup in setups.values()} - set(variants()):
        raise ValueError(f"no network {unknown.pop()!r}; there are {'; '.join(variants())}")


def measure(setup: CooperationSetup, seed: int, split: str, folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Train and evaluate a variant; its time is relative to that of the plain top-2 network."""
    with one_thread():
        path, found = _trained(setup, seed, folder)
        return found, {"time": _relative_time(setup.data, path), "path": str(path)}


def _trained(setup: CooperationSetup, seed: int, folder: Path) -> tuple[Path, dict[str, Any]]:
    """Train the network if its file does not exist; returns the file and the metrics."""
    variant, (epochs, batch_size) = variants()[setup.network], EPOCHS[setup.data]
    epochs = setup.epochs or epochs
    path = folder / "networks" / f"{setup.data}-{epochs}-{_file(setup.network)}-{seed}.safetensors"
    content = data.load(setup.data)
    edges: list[Any] = []
    moved: list[torch.Tensor] = []

    def after_epoch(epoch: int, network: MoENetwork) -> None:
        moved.append(torch.cat([w.detach().flatten() for layer in network.layers for w in _experts(layer)]))
        if variant.network.get("graph") is not None:
            edges.append([layer.graph.adjacency.tolist() for layer in network.layers])  # type: ignore[union-attr, operator]

    with locked(path):
        rows = np.concatenate([content.splits[split] for split in ("train", "rl_train")])
        settings = NetworkSettings(epochs=epochs, batch_size=batch_size, seed=seed, **variant.training)
        made = lambda: _make(setup.data, variant.network)  # noqa: E731
        network = train_network(made, content.inputs[rows], content.labels[rows], settings, after_epoch)
        save_model(network, path)
    others = ~np.eye(EXPERTS, dtype=np.bool_)
    found = _described(network, content) | {
        "edges": edges,
        "sparsity_before": [float((np.array(each)[others] < THRESHOLD).mean()) for each in (edges or [[]])[0]],
        "drift": float((moved[-1] - moved[-2]).norm() / moved[-2].norm()) if len(moved) > 1 else 0.0,
    }
    return path, found


@torch.inference_mode()
def _relative_time(source: str, path: Path) -> float:
    """Median ratio of the CPU times per batch of a network and an untrained plain top-2 network, measured in
    alternation."""
    x = torch.from_numpy(data.load(source)["test"][0][:BATCH])
    with torch.random.fork_rng(devices=[]):
        plain = _make(source, variants()[BASE].network).eval()
    network, ratios = load_model(path, MoENetwork), []
    for _ in range(ROUNDS):
        marks = [time.process_time_ns()]
        for each in (network, plain):
            for _ in range(3):
                each(x)
            marks.append(time.process_time_ns())
        ratios.append((marks[1] - marks[0]) / max(1, marks[2] - marks[1]))
    return float(np.median(ratios[1:]))


def _make(source: str, options: dict[str, Any]) -> MoENetwork:
    content = data.load(source)
    classes = int(content.labels.max()) + 1
    return MoENetwork(content.inputs.shape[1], classes, num_experts=EXPERTS, num_layers=LAYERS, **options)


def _experts(layer: Any) -> list[torch.Tensor]:
    return list(layer.experts.parameters())


@torch.inference_mode()
def _described(network: MoENetwork, content: data.Dataset) -> dict[str, Any]:
    found: dict[str, Any] = {}
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


def score(frame: pd.DataFrame) -> dict[str, Any]:
    """Means over seeds with 95 % intervals, paired accuracy differences in points, and the gate's calibration."""
    trained = records(frame)
    by_name: dict[str, list[dict[str, Any]]] = {}
    for each in trained:
        by_name.setdefault(each["network"], []).append(each)
    rows = [_row(name, of_seeds, variants()[name], by_name) for name, of_seeds in by_name.items()]
    best = max(trained, key=lambda each: each["validation"])
    source = str(frame["data"].iloc[0])
    shown = [
        {
            "network": row["name"], "accuracy": f"{row['accuracy']:.2%}", "points more than beside": row.get("points"),
            "95 %": row.get("points_ci95"), "utilisation": min(row["utilisation"]), "diversity": row["diversity"],
            "time": row["time"],
        }
        for row in rows
    ]  # fmt: skip
    return {
        "data": source, "threshold": THRESHOLD, "utilisation_asked": 0.85, "rows": rows,
        "beside": BASE if BASE in by_name else next(iter(by_name)),
        "best": {key: best[key] for key in ("network", "seed", "validation", "accuracy")},
        "gate": report.corrections(source), "tables": {f"{source}, {len(by_name)} networks": shown},
    }  # fmt: skip


def plot(frame: pd.DataFrame, result: dict[str, Any], out: Path) -> list[str]:
    """Plot accuracies, graph edges, routing, loss surfaces and the gate's calibration."""
    with one_thread():
        return report.draw(frame, result, out)


text = report.text


def _row(
    name: str, of_seeds: list[dict[str, Any]], variant: Variant, by_name: dict[str, list[dict[str, Any]]]
) -> dict[str, Any]:
    row: dict[str, Any] = {"name": name, "question": variant.question, "seeds": len(of_seeds)}
    row["time"] = float(np.median([each["time"] for each in of_seeds]))
    for key in ("accuracy", "diversity", "drift", "experts_per_input", "dropped"):
        values = np.array([each[key] for each in of_seeds])
        row[key], row[f"{key}_ci95"] = float(values.mean()), seeds_interval(values)
    for key in ("utilisation", "sparsity", "others", "sparsity_before"):
        row[key] = np.mean([each[key] for each in of_seeds], axis=0).tolist()
    if variant.beside in by_name:
        theirs = {each["seed"]: each["accuracy"] for each in by_name[variant.beside]}
        both = [each for each in of_seeds if each["seed"] in theirs]
        points = 100 * np.array([each["accuracy"] - theirs[each["seed"]] for each in both])
        row |= {"beside": variant.beside, "points": float(points.mean()), "points_ci95": seeds_interval(points)}
    return row


def _file(name: str) -> str:
    return "".join(letter if letter.isalnum() else "-" for letter in name).replace("--", "-")
