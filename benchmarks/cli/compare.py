"""`moe-compare RUN... --out DIR`: compare the learning curves and final results of several runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pandas as pd
import typer
from matplotlib.figure import Figure
from scipy import stats

from agents import runs
from benchmarks.cli.terminal import _version, console_of
from benchmarks.results import pareto
from benchmarks.results import tables as report
from cost.files import write_text
from cost.machine import provenance

CURVES = {"return": "return", "reward/quality": "accuracy", "reward/cost": "cost", "entropy": "policy entropy"}
POINTS = 200  # per curve
LAST = 0.1  # final share of a training that is averaged
app = typer.Typer(pretty_exceptions_enable=False)


@app.command()
def _compare(
    run_dirs: Annotated[list[Path], typer.Argument(help="Run folders of moe-train, or parent folders of them.")],
    out: Path = Path("runs/compare"),
    by: Annotated[
        str, typer.Option(help="Comma-separated keys; runs with equal values form one curve.")
    ] = "env,algo,backend,cost_weight",
    smoothing: Annotated[
        float, typer.Option(min=0, max=0.999, help="Weight of the exponential moving average; 0 disables it.")
    ] = 0.9,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Compare training runs: learning curves with 95 % bands over seeds, Pareto front, summary table.

    Example: moe-compare runs/* --out runs/compare
    """
    console = console_of(None)
    result = compare(run_dirs, out, by.split(","), smoothing)
    table = report.plain_table(
        f"means over the last {LAST:.0%} of each training",
        "runs",
        "seeds",
        *(name.split()[-1] for name in CURVES.values()),
    )
    for row in result["groups"]:
        numbers = ("-" if row[name] is None else f"{row[name]:.4f}" for name in CURVES)
        table.add_row(row["group"], str(row["seeds"]), *numbers)
    console.print(table)
    console.print(f"[green]saved[/] {out}/compare.png, {out}/compare.json, {out}/curves.csv", soft_wrap=True)


def compare(folders: list[Path], out: Path, by: list[str], smoothing: float) -> dict[str, Any]:
    """Compare the runs in `folders`; writes compare.png, compare.json and curves.csv to `out`."""
    found = {folder: runs.load_config(folder) for folder in find(folders)}
    names = _names(list(found.values()), by)
    curves: dict[str, list[pd.DataFrame]] = {}
    ends: list[dict[str, Any]] = []
    for (folder, config), group in zip(found.items(), names, strict=True):
        frame = runs.episodes(folder).reindex(columns=["timesteps", *CURVES])
        if frame.empty:
            raise runs.RunError(f"{folder / runs.EPISODES} has no episodes: the training was too short")
        curves.setdefault(group, []).append(_smooth(frame, smoothing))
        last = frame[frame["timesteps"] >= (1 - LAST) * frame["timesteps"].max()].drop(columns="timesteps").mean()
        ends.append({"group": group, "run": str(folder), "seed": config["seed"], **last.to_dict()})
    bands = {group: band(frames) for group, frames in curves.items()}
    table = pd.DataFrame(ends)
    groups = [
        {"group": group, "seeds": len(part), **{name: _number(part[name].mean()) for name in CURVES}}
        for group, part in table.groupby("group", sort=False)
    ]
    runs_ended = json.loads(table.to_json(orient="records"))
    result = {"groups": groups, "runs": runs_ended, "by": by, "smoothing": smoothing, **provenance()}
    out.mkdir(parents=True, exist_ok=True)
    long = pd.concat(frame.assign(group=group) for group, frame in bands.items())
    write_text(out / "curves.csv", long.to_csv(index=False))
    write_text(out / "compare.json", json.dumps(result, indent=1))
    _draw(bands, table, out / "compare.png")
    return result


def find(folders: list[Path]) -> list[Path]:
    """Find finished runs in folders, recursively; raises `RunError` if there are none."""
    found = [path.parent for folder in folders for path in sorted(folder.rglob(runs.SETTINGS))]
    if not found:
        raise runs.RunError(f"no finished run in {', '.join(map(str, folders))}: moe-train writes them")
    return list(dict.fromkeys(found))


def band(frames: list[pd.DataFrame]) -> pd.DataFrame:
    """Mean curve over seeds at common timesteps, with 95 % Student's t interval for two seeds or more."""
    steps = np.linspace(
        max(f["timesteps"].iloc[0] for f in frames), min(f["timesteps"].iloc[-1] for f in frames), POINTS
    )
    columns: dict[str, np.ndarray] = {"timesteps": steps}
    for name in CURVES:
        values = np.array([np.interp(steps, frame["timesteps"], frame[name]) for frame in frames])
        half = np.full(POINTS, np.nan)
        if len(frames) > 1:
            half = values.std(0, ddof=1) / len(frames) ** 0.5 * stats.t.ppf(0.975, len(frames) - 1)
        mean = values.mean(0)
        columns |= {name: mean, f"{name} low": mean - half, f"{name} high": mean + half}
    return pd.DataFrame(columns)


def _names(configs: list[dict[str, Any]], by: list[str]) -> list[str]:
    """Name each run by its values of the keys that differ between runs, or of all keys if none differ."""
    values = [{"backend": "sb3", **config["env_kwargs"], **config} for config in configs]
    differing = [key for key in by if len({str(each.get(key)) for each in values}) > 1] or by
    return [" ".join(str(each.get(key)).removeprefix("moe_envs:") for key in differing) for each in values]


def _smooth(frame: pd.DataFrame, smoothing: float) -> pd.DataFrame:
    """Mean over the episodes that end at the same timestep, smoothed by an exponential moving average."""
    means = frame.groupby("timesteps").mean()
    return (means.ewm(alpha=1 - smoothing).mean() if smoothing else means).reset_index()


def _draw(bands: dict[str, pd.DataFrame], ends: pd.DataFrame, path: Path) -> None:
    figure = Figure((15, 8), layout="constrained")
    panels = figure.subplots(2, 3).ravel()
    for panel, (name, label) in zip(panels, CURVES.items(), strict=False):
        for place, frame in enumerate(bands.values()):
            colour = f"C{place % 10}"
            panel.plot(frame["timesteps"], frame[name], color=colour)
            panel.fill_between(frame["timesteps"], frame[f"{name} low"], frame[f"{name} high"], color=colour, alpha=0.2)
        panel.set(xlabel="timesteps", ylabel=label)
        panel.grid(alpha=0.3)
    plane = ends.dropna(subset=["reward/cost", "reward/quality"])
    for place, group in enumerate(bands):
        part = plane[plane["group"] == group]
        panels[4].plot(part["reward/cost"], part["reward/quality"], "o", color=f"C{place % 10}", label=group)
        panels[5].plot([], [], color=f"C{place % 10}", label=group)
    if len(plane):
        points = plane[["reward/cost", "reward/quality"]].to_numpy()
        best = points[pareto.front(points)]
        best = best[np.argsort(best[:, 0])]
        panels[4].step(best[:, 0], best[:, 1], where="post", color="black", linewidth=1)
    panels[4].set(xlabel="cost", ylabel="accuracy", title="final results and Pareto front")
    panels[5].axis("off")
    panels[5].legend(loc="center", fontsize="small")
    figure.savefig(path, dpi=120)


def _number(value: float) -> float | None:
    return None if np.isnan(value) else float(value)
