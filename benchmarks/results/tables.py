"""Rows and tables of results."""

from typing import Any

import pandas as pd
from rich.table import Table

from benchmarks.results.statistics import mean_interval

STYLES = {"learned": "bold red", "bound": "green", "baseline": ""}


def row(frame: pd.DataFrame, env: str, policy: str, kind: str, *, seed: int, **env_kwargs: Any) -> dict[str, Any]:
    """One policy's result over the episodes of `frame`: means, and the 95 % interval of the mean return."""
    return {
        "env": env.split(":")[-1],
        "cost_weight": env_kwargs.get("cost_weight"),
        "split": env_kwargs["split"],
        "policy": policy,
        "kind": kind,
        "seed": seed,
        "return": float(frame["return"].mean()),
        "quality": float(frame["quality"].mean()),
        "cost": float(frame["cost"].mean()),
        "ci95": list(mean_interval(frame["return"].to_numpy())),
    }


def plain_table(title: str, *columns: str) -> Table:
    """A table narrow enough for 80 columns."""
    drawn = Table(title=title, box=None, padding=(0, 2, 0, 0))
    for column in columns:
        drawn.add_column(column, no_wrap=True)
    return drawn


def markdown_row(*cells: str) -> str:
    """A line of a Markdown table."""
    return f"| {' | '.join(cells)} |"


def markdown_header(*columns: str) -> list[str]:
    """The first two lines of a Markdown table."""
    return [markdown_row(*columns), "|" + "---|" * len(columns)]


def table(rows: list[dict[str, Any]], title: str) -> Table:
    """Rows by falling return; the learned ones and the bounds stand out."""
    drawn = plain_table(title, "policy", "kind", "return", "95 %", "quality", "cost")
    for entry in sorted(rows, key=lambda entry: -entry["return"]):
        low, high = entry["ci95"]
        name = entry["policy"] + (" *" if entry.get("chosen") else "")
        figures = (
            f"{entry['return']:.4f}",
            f"{low:.3f} .. {high:.3f}",
            f"{entry['quality']:.4f}",
            f"{entry['cost']:.3f}",
        )
        drawn.add_row(name, entry["kind"], *figures, style=STYLES[entry["kind"]])
    return drawn
