"""Report of the experiment `cooperation`: Markdown, table of runs, and plots."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure

from benchmarks.results.tables import markdown_header, markdown_row, records
from experts import bundle, data
from experts.checkpoints import load_model
from experts.confidence import (
    Isotonic,
    confidence,
    expected_calibration_error,
    fit_temperature,
    gate_is_right,
    reliability,
    right_experts,
)
from experts.landscape import landscape
from experts.network import MoENetwork

GRAPHS = (
    "flat, k=2, identity",
    "flat, k=2, random",
    "flat, k=2, random, no L1",
    "flat, k=2, random, sum",
    "flat, k=2, random, conv",
    "flat, k=3, random",
)
SURFACES = "flat, k=2, no graph", *GRAPHS[:2], "diversity", "drift stabiliser"  # variants in the loss plot
SHOWN = 8  # inputs per expert in routing.png
POSITIONS = np.linspace(-1, 1, 21)
Result = dict[str, Any]


def draw(frame: pd.DataFrame, result: Result, out: Path) -> list[str]:
    """Plot accuracy.png, confidence.png and edges.png, and routing.png and landscape.png if the network files
    still exist."""
    first = {row["network"]: row for row in records(frame.sort_values("seed", ascending=False))}
    _draw_accuracy(result, out / "accuracy.png")
    _draw_confidence(result["data"], result["gate"], out / "confidence.png")
    names = ["accuracy.png", "confidence.png"]
    if _draw_edges(first, out / "edges.png"):
        names.append("edges.png")
    there = {name: row for name, row in first.items() if Path(row["path"]).exists()}
    if there:
        best = max(there.values(), key=lambda row: row["validation"])
        _draw_routing(result["data"], load_model(Path(best["path"]), MoENetwork), out / "routing.png")
        _draw_landscape(result["data"], there, out / "landscape.png")
        names += ["routing.png", "landscape.png"]
    return names


def text(result: Result) -> str:
    """The report as Markdown."""
    rows = {row["name"]: row for row in result["rows"]}
    plain = [rows[name] for name in ("flat, k=2, no graph", "hierarchical, k=2, no graph") if name in rows]
    found, best = result["gate"], result["best"]
    lines = [
        f"# Cooperation of experts on {result['data']}", "",
        f"Networks of two MoE layers with eight experts each; means of {result['rows'][0]['seeds']} seeds, 95 % "
        "intervals (Student's t); differences are paired by seed. Time: CPU time of a batch over that of "
        f"`{result['beside']}`. Sparse: share of the edges between different experts, in a team of all eight, under "
        f"{result['threshold']:g}, half an even one (in brackets before training). Others: mean share of an expert's "
        "contribution that comes from the others of its team, on test. Both by layer.", "",
        "## Graphs", "",
        *markdown_header("network", "accuracy", "points more than without", "diversity", "time", "sparse", "others"),
        *(
            markdown_row(row["name"], _percent(row), _points(row), f"{row['diversity']:.2f}", f"{row['time']:.2f}",
                  _sparse(row), _layers(row["others"], ".2f"))
            for row in _of(result, "graph")
        ), "",
        "## Routers", "",
        f"Utilisation: entropy of the load over that of an even one; {result['utilisation_asked']:.0%} asked for.", "",
        *markdown_header("router", "accuracy", "points more than top-2", "utilisation", "experts per input", "dropped",
                         "time"),
        *(
            markdown_row(row["name"], _percent(row), _points(row), _layers(row["utilisation"], ".1%"),
                  f"{row['experts_per_input']:.2f}", f"{row['dropped']:.1%}", f"{row['time']:.2f}")
            for row in plain + _of(result, "router")
        ), "",
        "## Regularisers", "",
        "Drift: distance that the experts' weights move in the last epoch over their norm.", "",
        *markdown_header("trained with", "accuracy", "points more than without", "utilisation", "diversity", "drift"),
        *(
            markdown_row(row["name"], _percent(row), _points(row), _layers(row["utilisation"], ".1%"),
                  f"{row['diversity']:.2f}", f"{row['drift']:.4f}")
            for row in plain[:1] + _of(result, "regulariser")
        ), "",
        "## Confidence of a gate", "",
        f"The gate of the bundle {result['data']}: how far its probability of the expert that it takes is from how "
        "often that expert is right, expected calibration error on test; corrections are fitted on validation.", "",
        *markdown_header("as it is", "temperature", "isotonic"),
        markdown_row(f"{found['plain']:.3f}", f"{found['temperature']:.3f} (gate logits / {found['divisor']:.2f})",
              f"{found['isotonic']:.3f}"), "",
        f"Best network on validation: **{best['network']}**, seed {best['seed']}, test accuracy "
        f"{best['accuracy']:.2%}.",
    ]  # fmt: skip
    return "\n".join(lines)


def _sparse(row: Result) -> str:
    now, before = (_layers(row[key], ".0%") for key in ("sparsity", "sparsity_before"))
    return f"{now} ({before})" if now else ""


def _layers(values: list[float], form: str) -> str:
    return ", ".join(f"{each:{form}}" for each in values)


def corrections(source: str) -> Result:
    """Calibration errors of a bundle's gate on test, before and after correction on validation."""
    ways, truth, divisor = _corrected(source)
    return {name: expected_calibration_error(sure, truth) for name, sure in ways.items()} | {"divisor": divisor}


def _corrected(source: str) -> tuple[dict[str, np.ndarray], np.ndarray, float]:
    loaded = bundle.load(source)
    known, judged = loaded.split("validation"), loaded.split("test")
    rights = [right_experts(split.logits, split.labels) for split in (known, judged)]
    divisor = fit_temperature(known.gate_logits, rights[0])
    isotonic = Isotonic.fit(confidence(known.gate_logits), gate_is_right(known.gate_logits, rights[0]))
    plain, truth = confidence(judged.gate_logits), gate_is_right(judged.gate_logits, rights[1])
    ways = {"plain": plain, "temperature": confidence(judged.gate_logits, divisor), "isotonic": isotonic(plain)}
    return ways, truth, divisor


def _draw_confidence(source: str, errors: Result, path: Path) -> None:
    """Plot the reliability diagram of a bundle's gate."""
    ways, truth, _ = _corrected(source)
    figure = Figure((5.5, 5), layout="constrained")
    panel = figure.subplots()
    panel.plot([0, 1], [0, 1], color="grey", lw=0.8, ls="--")
    for name, sure in ways.items():
        found = reliability(sure, truth)
        said, was = (each[found.counts >= 20] for each in (found.confidence, found.right))
        panel.plot(said, was, marker="o", label=f"{name}, error {errors[name]:.3f}")
    panel.set(xlabel="confidence of the gate in its expert", ylabel="accuracy of that expert",
              title=f"gate of the bundle {source}, test", xlim=(0, 1), ylim=(0, 1))  # fmt: skip
    panel.legend()
    figure.savefig(path, dpi=120)


def _of(result: Result, question: str) -> list[Result]:
    return [row for row in result["rows"] if row["question"] == question]


def _percent(row: Result) -> str:
    low, high = row["accuracy_ci95"]
    return f"{row['accuracy']:.2%} ({100 * low:.2f} .. {100 * high:.2f})"


def _points(row: Result) -> str:
    if "points" not in row:
        return ""
    low, high = row["points_ci95"]
    return f"{row['points']:+.2f} ({low:+.2f} .. {high:+.2f})"


def _draw_accuracy(result: Result, path: Path) -> None:
    rows = result["rows"]
    figure = Figure((8, 0.27 * len(rows) + 1.2), layout="constrained")
    panel = figure.subplots()
    colours = {"graph": "C0", "router": "C1", "regulariser": "C2"}
    for number, row in enumerate(rows):
        low, high = row["accuracy_ci95"]
        panel.plot([100 * low, 100 * high], [number] * 2, color=colours[row["question"]], lw=2)
        panel.plot(100 * row["accuracy"], number, "o", color=colours[row["question"]])
    panel.set(
        yticks=range(len(rows)), yticklabels=[row["name"] for row in rows], xlabel="test accuracy [%], 95 % over seeds"
    )
    panel.invert_yaxis()
    panel.grid(alpha=0.3)
    figure.savefig(path, dpi=120)


def _draw_edges(first: dict[str, Result], path: Path) -> bool:
    """Plot the edge weights of the first layer over epochs for a few networks."""
    names = [name for name in GRAPHS if name in first] or [name for name in first if first[name]["edges"]][:6]
    if not names:
        return False
    figure = Figure((9, 2.4 * len(names)), layout="constrained")
    panels = figure.subplots(len(names), 4, squeeze=False)
    for line, name in zip(panels, names, strict=True):
        edges = first[name]["edges"]
        shown = np.unique(np.linspace(0, len(edges) - 1, 4).astype(int))
        for panel in line[len(shown) :]:
            panel.axis("off")
        for panel, epoch in zip(line, shown, strict=False):
            drawn = panel.imshow(edges[epoch][0], vmin=0, vmax=1, cmap="viridis")
            panel.set(title=f"{name}\nafter epoch {epoch}" if epoch == shown[0] else f"after epoch {epoch}")
            panel.title.set_fontsize(8)
            panel.tick_params(labelsize=6)
    figure.colorbar(drawn, ax=panels, shrink=0.5, label="weight of expert (column) in the output of expert (row)")
    figure.savefig(path, dpi=120)
    return True


@torch.inference_mode()
def _draw_routing(source: str, network: MoENetwork, path: Path) -> None:
    """Show the test inputs with the highest gate probability for each expert of the first layer."""
    inputs, labels = data.load(source)["test"]
    statistics = network(torch.from_numpy(inputs))[1][0]
    probability, load = statistics.logits.softmax(-1).numpy(), statistics.load.tolist()
    experts, side = len(network.layers[0].experts), int(inputs.shape[1] ** 0.5)  # type: ignore[arg-type]
    figure = Figure((SHOWN + 1.5, 1.15 * experts), layout="constrained")
    for expert, line in enumerate(figure.subplots(experts, SHOWN)):
        for panel, row in zip(line, np.argsort(-probability[:, expert])[:SHOWN], strict=True):
            panel.imshow(inputs[row].reshape(side, side), cmap="gray_r")
            panel.set(xticks=[], yticks=[])
            panel.set_title(f"{labels[row]}: {probability[row, expert]:.2f}", fontsize=7)
        line[0].set_ylabel(f"expert {expert}\n{load[expert]:.0%}", fontsize=8)
    figure.suptitle(
        "inputs with the highest gate probability per expert of the first layer (class: probability)", fontsize=9
    )
    figure.savefig(path, dpi=120)


def _draw_landscape(source: str, first: dict[str, Result], path: Path) -> None:
    """Plot the test loss along one random direction for several networks, and along two for the first."""
    inputs, labels = (torch.from_numpy(each[:1000]) for each in data.load(source)["test"])
    figure = Figure((11, 4.5), layout="constrained")
    line, plane = figure.subplots(1, 2)
    for number, name in enumerate([name for name in SURFACES if name in first] or list(first)[:6]):
        network = load_model(Path(first[name]["path"]), MoENetwork)

        def loss(network: MoENetwork = network) -> torch.Tensor:
            return F.cross_entropy(network(inputs)[0], labels)

        line.plot(POSITIONS, landscape(network, loss, POSITIONS), label=name)
        if number == 0:
            grid = landscape(network, loss, POSITIONS, (0, 1))
            drawn = plane.contourf(POSITIONS, POSITIONS, grid, levels=20, cmap="viridis")
            plane.set(title=name, xlabel="second direction", ylabel="first direction")
            figure.colorbar(drawn, ax=plane, label="loss")
    line.set(xlabel="steps along a random direction, filters normalised", ylabel="cross-entropy on 1,000 test inputs")
    line.legend(fontsize=7)
    figure.savefig(path, dpi=120)
