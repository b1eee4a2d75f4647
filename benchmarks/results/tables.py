"""Result tables for the terminal and as Markdown."""

from __future__ import annotations

import math
from typing import Any

import pandas as pd
from rich.table import Table

from benchmarks.results.statistics import mean_interval

STYLES = {"learned": "bold red", "bound": "green", "baseline": ""}
Rows = list[dict[str, Any]]


def row(frame: pd.DataFrame, env: str, policy: str, kind: str, *, seed: int, **env_kwargs: Any) -> dict[str, Any]:
    """Result of a policy over the episodes of `frame`: means, and 95 % interval of the mean return."""
    found = {
        "env": env.split(":")[-1],
        "cost_weight": env_kwargs.get("cost_weight"),
        "split": env_kwargs.get("split"),
        "policy": policy,
        "kind": kind,
        "seed": seed,
        "return": float(frame["return"].mean()),
        "ci95": list(mean_interval(frame["return"].to_numpy())),
    }
    return found | {name: float(frame[name].mean()) if name in frame else None for name in ("quality", "cost")}


def plain_table(title: str, *columns: str) -> Table:
    """Create a table that fits 80 columns: names in the first column wrap, figures never."""
    drawn = Table(title=title, box=None, padding=(0, 2, 0, 0))
    for column in columns:
        drawn.add_column(column, no_wrap=column != columns[0])
    return drawn


def markdown_row(*cells: str) -> str:
    """Row of a Markdown table."""
    return f"| {' | '.join(cells)} |"


def markdown_header(*columns: str) -> list[str]:
    """Header and separator of a Markdown table."""
    return [markdown_row(*columns), "|" + "---|" * len(columns)]


def policies(rows: Rows, title: str) -> Table:
    """Table of rows of `row` by decreasing return, with learned policies and bounds highlighted."""
    drawn = plain_table(title, "policy", "kind", "return", "95 %", "quality", "cost")
    for entry in sorted(rows, key=lambda entry: -entry["return"]):
        low, high = entry["ci95"]
        figures = f"{entry['return']:.4f}", f"{low:.3f} .. {high:.3f}", cell(entry["quality"]), cell(entry["cost"])
        drawn.add_row(entry["policy"], entry["kind"], *figures, style=STYLES[entry["kind"]])
    return drawn


def cell(value: Any) -> str:
    """Format a table cell: four digits, intervals as "low .. high", missing values as empty text."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    if isinstance(value, bool):
        return "yes" if value else ""
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1e4 else f"{value:.4g}"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, list | tuple):
        return (" .. " if len(value) == 2 else ", ").join(map(cell, value))
    return str(value)


def _columns(rows: Rows) -> list[str]:
    return list(dict.fromkeys(key for each in rows for key in each if key != "kind"))


def terminal(title: str, rows: Rows) -> Table:
    """Result table for the terminal; `kind` selects the colour of a row."""
    drawn = Table(title=title, box=None, padding=(0, 2, 0, 0))
    for column in _columns(rows):
        drawn.add_column(column, overflow="fold")
    for each in rows:
        drawn.add_row(*(cell(each.get(name)) for name in _columns(rows)), style=STYLES.get(str(each.get("kind")), ""))
    return drawn


def markdown(title: str, rows: Rows) -> list[str]:
    """Result table as Markdown; learned rows are bold."""
    lines = [f"## {title}", "", *markdown_header(*_columns(rows))]
    for each in rows:
        cells = [cell(each.get(name)) for name in _columns(rows)]
        cells[0] = f"**{cells[0]}**" if each.get("kind") == "learned" else cells[0]
        lines.append(markdown_row(*cells))
    return [*lines, ""]


def renamed(frame: pd.DataFrame, columns: dict[str, str]) -> Rows:
    """Selected columns of a frame, renamed, as rows."""
    return records(frame[[*columns]].rename(columns=columns))


def records(frame: pd.DataFrame) -> Rows:
    """Rows of a frame as dicts."""
    found: Any = frame.to_dict("records")
    rows: Rows = found
    return rows


def text(title: str, about: str, result: dict[str, Any]) -> str:
    """Report of an experiment from the `tables` (rows by title) and optional `notes` of its result."""
    lines = [f"# {title}", "", about, ""]
    for name, rows in result["tables"].items():
        lines += markdown(name, rows)
    return "\n".join([*lines, *result.get("notes", [])])
