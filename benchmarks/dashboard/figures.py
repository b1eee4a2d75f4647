"""The dashboard's figures, in one style."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from benchmarks.dashboard.data import TrainedRun, Watched
from benchmarks.results.pareto import front

COLOURS = ("#0050b3", "#b34700", "#1a7f37", "#7a1fa2", "#a40e26", "#00695c", "#5d4037", "#37474f")
HEIGHT = 460


def _figure(title: str, x: str, y: str) -> go.Figure:
    figure = go.Figure()
    figure.update_layout(
        title=title, xaxis_title=x, yaxis_title=y, template="simple_white", height=HEIGHT, colorway=list(COLOURS),
        legend={"orientation": "h", "y": -0.2}, margin={"t": 50, "r": 20},
    )  # fmt: skip
    return figure


def curves(bands: Mapping[str, pd.DataFrame], trained: Iterable[TrainedRun], validation: bool) -> go.Figure:
    """Return against timesteps: mean and 95 % interval over seeds, or each run's validation."""
    figure = _figure("Learning curves", "timesteps", "return on validation" if validation else "return in training")
    if validation:
        for each in trained:
            if len(each.looks):
                x, y = each.looks["steps"], each.looks["score"]
                figure.add_scatter(x=x, y=y, mode="lines+markers", name=f"{each.group}, seed {each.seed}")
        return figure
    for number, (name, band) in enumerate(bands.items()):
        colour = COLOURS[number % len(COLOURS)]
        both = pd.concat([band["timesteps"], band["timesteps"][::-1]])
        edge = pd.concat([band["high"], band["low"][::-1]])
        figure.add_scatter(x=both, y=edge, fill="toself", line={"width": 0}, fillcolor=colour, opacity=0.2,
                           hoverinfo="skip", showlegend=False, legendgroup=name)  # fmt: skip
        figure.add_scatter(x=band["timesteps"], y=band["mean"], name=name, line={"color": colour}, legendgroup=name)
    return figure


def pareto(trained: Iterable[TrainedRun]) -> go.Figure:
    """Quality against cost at the end of each training; the runs that no other beats in both are joined by steps."""
    figure, every = _figure("Quality and cost", "cost", "quality"), [each for each in trained if "cost" in each.last]
    groups: dict[str, list[TrainedRun]] = {}
    for each in every:
        groups.setdefault(each.group, []).append(each)
    for name, members in groups.items():
        figure.add_scatter(
            x=[each.last["cost"] for each in members], y=[each.last["quality"] for each in members], mode="markers",
            marker={"size": 10}, name=name, text=[f"seed {each.seed}" for each in members],
        )  # fmt: skip
    if every:
        points = np.array([[each.last["cost"], each.last["quality"]] for each in every])
        best = points[front(points)]
        best = best[best[:, 0].argsort()]
        figure.add_scatter(
            x=best[:, 0], y=best[:, 1], mode="lines", name="Pareto front", line={"dash": "dot", "shape": "hv"}
        )
    return figure


def heat(values: np.ndarray, title: str, unit: str) -> go.Figure:
    """Use of experts, `[L, E]`."""
    figure = _figure(title, "expert", "layer")
    figure.add_heatmap(z=values, colorscale="Blues", colorbar={"title": unit}, xgap=1, ygap=1)
    figure.update_yaxes(dtick=1, autorange="reversed")
    figure.update_xaxes(dtick=1)
    return figure


def bars(counts: Mapping[str, float]) -> go.Figure:
    """Rows that ran each expert of a served model."""
    figure = _figure("Experts of the served model", "expert (layer/expert)", "rows")
    names = sorted(counts, key=lambda name: [int(part) for part in name.split("/")])
    figure.add_bar(x=names, y=[counts[name] for name in names])
    figure.update_xaxes(type="category")
    return figure


def costs(times: pd.DataFrame) -> go.Figure:
    """Measured time of each operation against rows."""
    figure = _figure("Cost profile", "rows", "median ms")
    for name, part in times.groupby("operation", sort=False):
        figure.add_scatter(x=part["rows"], y=part["ms"], mode="lines+markers", name=str(name))
    figure.update_xaxes(type="log")
    figure.update_yaxes(type="log")
    return figure


def live(watched: Watched) -> list[go.Figure]:
    """Requests, latency, queue and levels of a server over time."""
    history = list(watched.history)
    time = pd.to_datetime([each["time"] for each in history], unit="s")
    requests = _figure("Predictions", "time", "a second, by status")
    for code in sorted({code for each in history for code in each["codes"]}):
        requests.add_scatter(x=time, y=[each["codes"].get(code, 0) for each in history], name=code)
    latency = _figure("Latency", "time", "ms")
    for name in ("p50", "p95"):
        values: list[Any] = [None if each[name] is None else 1e3 * each[name] for each in history]
        latency.add_scatter(x=time, y=values, name=name)
    queue = _figure("Queue and batches", "time", "rows")
    queue.add_scatter(x=time, y=[each["queue"] for each in history], name="waiting")
    queue.add_scatter(x=time, y=[each["rows"] for each in history], name="of a batch, mean")
    levels = _figure("Quality levels", "time", "batches a second")
    for level in sorted({level for each in history for level in each["levels"]}):
        levels.add_scatter(x=time, y=[each["levels"].get(level, 0) for each in history], name=level)
    figures = [requests, latency, queue, levels]
    for figure in figures:
        figure.update_layout(height=320, showlegend=True)
        figure.update_yaxes(rangemode="tozero")
    return figures
