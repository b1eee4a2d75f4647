"""The page: tabs of learning curves, Pareto fronts, expert use, cost profiles and a live server.

Dash was chosen among maintained libraries that need no JavaScript of ours: it serves everything from this machine,
keeps a page's state in the browser and calls plain functions. Streamlit runs the whole script anew at each click and
brings pyarrow; Panel and NiceGUI keep a connection and a session for each page.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import dash
import dash_bootstrap_components
import numpy as np
from dash import Dash, Input, Output

from benchmarks.dashboard import data, figures
from benchmarks.dashboard.data import TrainedRun, Watched

html: Any = dash.html
dcc: Any = dash.dcc
dash_table: Any = dash.dash_table
dbc: Any = dash_bootstrap_components
PAGE = """<!DOCTYPE html>
<html lang="en"><head>{%metas%}<title>{%title%}</title>{%favicon%}{%css%}
<style>body{font-family:system-ui,sans-serif;max-width:1200px;margin:0 auto;padding:0 1rem;color:#1a1a1a}
label{margin:.5rem .4rem .2rem 0}fieldset{border:0;padding:0;margin:.5rem 0}
.two{display:grid;grid-template-columns:repeat(auto-fit,minmax(420px,1fr))}</style>
</head><body>{%app_entry%}<footer>{%config%}{%scripts%}{%renderer%}</footer></body></html>"""
TABS = {"curves": "Learning curves", "pareto": "Pareto fronts", "experts": "Experts", "costs": "Cost profile",
        "server": "Server"}  # fmt: skip
SECONDS = 2.0  # between two looks at a server


def create_dashboard(
    folders: Sequence[Path] = (), server: str | None = None, key: str | None = None, model: str = "language"
) -> Any:
    """The dashboard of the runs in these folders, of a server and of a language model; raises `ValueError` for a folder
    without runs."""
    found = data.find_runs(folders)
    watched = None if server is None else Watched(server, key)
    app: Any = Dash(__name__, title="moe-envs", index_string=PAGE, update_title="", suppress_callback_exceptions=True)
    app.layout = html.Main([
        html.H1("moe-envs"),
        dcc.Tabs(
            id="tabs", value="curves" if found or watched is None else "server",
            children=[dcc.Tab(label=label, value=name) for name, label in TABS.items()],
        ),
        dcc.Loading(html.Div(id="page"), delay_show=300, target_components={"page": "children"}),
        dcc.Interval(id="clock", interval=int(1e3 * SECONDS), disabled=watched is None),
    ])  # fmt: skip

    def show(tab: str) -> Any:
        pages: dict[str, Callable[[], Any]] = {
            "curves": lambda: _curves_page(found), "pareto": lambda: _pareto_page(found),
            "experts": lambda: _experts_page(model, watched), "costs": _costs_page,
            "server": lambda: _server_page(watched),
        }  # fmt: skip
        return pages[tab]()

    def show_curves(of: str, groups: list[str]) -> Any:
        trained = [each for each in data.read_runs(found)[0] if each.group in groups]
        return _graph(figures.curves(data.bands(trained), trained, of == "validation"), "Learning curves of the runs")

    def show_experts(domain: str) -> Any:
        shares = data.routing(model)
        values = np.mean(list(shares.values()), axis=0) if domain == "all" else shares[domain]
        title = f"Share of the tokens that run an expert, {model}, {domain}"
        return _graph(figures.heat(values, title, "share"), title)

    def show_costs(name: str) -> Any:
        times = data.times(data.profiles()[name])
        rows = [dict(zip(times.columns, row, strict=True)) for row in times.round(4).to_numpy().tolist()]
        return [_graph(figures.costs(times), f"Cost profile {name}"), _table(rows)]

    def show_server(count: int | None) -> Any:
        return _live(watched)

    for output, inputs, answer in (
        (("page", "children"), [("tabs", "value")], show),
        (("curves-figure", "children"), [("curves-of", "value"), ("curves-groups", "value")], show_curves),
        (("experts-figure", "children"), [("experts-domain", "value")], show_experts),
        (("costs-figure", "children"), [("costs-profile", "value")], show_costs),
        (("server-figures", "children"), [("clock", "n_intervals")], show_server),
    ):
        app.callback(Output(*output), [Input(*each) for each in inputs])(answer)
    _warm_up(found)
    return app


def _warm_up(found: list[Path]) -> None:
    """Read the runs and load Plotly before the first page asks for them."""
    figures.curves(data.bands(data.read_runs(found)[0]), [], False)


def _graph(figure: Any, about: str) -> Any:
    """A figure with a name for those who do not see it."""
    return html.Div(dcc.Graph(figure=figure, config={"displaylogo": False}), role="figure", **{"aria-label": about})


def _table(rows: list[dict[str, Any]]) -> Any:
    """Rows as a table that can be sorted."""
    if not rows:
        return html.P("Nothing to show.")
    return dash_table.DataTable(
        rows, [{"name": name, "id": name} for name in rows[0]], sort_action="native",
        page_action="none", style_table={"maxHeight": "30rem", "overflowY": "auto"},
        style_cell={"textAlign": "left", "padding": "4px 8px"}, style_header={"fontWeight": "bold"},
    )  # fmt: skip


def _choose(about: str, options: list[str], name: str) -> list[Any]:
    """A menu that the browser itself knows; Dash's own has no name for those who listen."""
    menu = dbc.Select(id=name, options=_options(options), value=options[0])
    return [html.Label(about, htmlFor=name), menu]


def _options(names: list[str]) -> list[dict[str, str]]:
    return [{"label": each, "value": each} for each in names]


def _problems(problems: list[str]) -> list[Any]:
    return [html.P(f"Not read: {each}", role="alert") for each in problems]


def _no_runs() -> Any:
    return html.P(
        ["No runs were given: ", html.Code("moe-dashboard runs/"), " shows those of moe-train in that folder."]
    )


def _curves_page(found: list[Path]) -> Any:
    if not found:
        return _no_runs()
    trained, problems = data.read_runs(found)
    groups = list(dict.fromkeys(each.group for each in trained))
    return [
        html.H2(TABS["curves"]), *_problems(problems),
        *_choose("Show", ["training", "validation"], "curves-of"),
        html.Fieldset([
            html.Legend("Runs"),
            dbc.Checklist(id="curves-groups", options=_options(groups), value=groups),
        ]),
        html.Div(id="curves-figure"),
        html.P("Training: means over seeds with 95 % intervals (t) where there are several."),
        _table([_row(each) for each in trained]),
    ]  # fmt: skip


def _row(each: TrainedRun) -> dict[str, Any]:
    return {"run": each.name, "seed": each.seed, **{name: round(value, 4) for name, value in each.last.items()}}


def _pareto_page(found: list[Path]) -> Any:
    if not found:
        return _no_runs()
    trained, problems = data.read_runs(found)
    return [
        html.H2(TABS["pareto"]), *_problems(problems),
        _graph(figures.pareto(trained), "Quality against cost of each run"),
        html.P("Means of the last tenth of each training, with exploration."),
        _table([_row(each) for each in trained]),
    ]  # fmt: skip


def _experts_page(model: str, watched: Watched | None) -> Any:
    domains = ["all", *data.routing(model)]
    page = [
        html.H2(TABS["experts"]),
        *_choose("Domain", domains, "experts-domain"),
        html.Div(id="experts-figure"),
    ]  # fmt: skip
    if watched is not None:
        watched.look()
        if watched.experts:
            page.append(_graph(figures.bars(watched.experts), "Rows that ran each expert of the served model"))
        else:
            page.append(html.P(watched.problem or "The server has answered nothing yet."))
    return page


def _costs_page() -> Any:
    return [
        html.H2(TABS["costs"]),
        *_choose("Profile", list(data.profiles()), "costs-profile"),
        html.Div(id="costs-figure"),
    ]


def _server_page(watched: Watched | None) -> Any:
    if watched is None:
        return html.P(["No server was given: ", html.Code("moe-dashboard --server http://127.0.0.1:8000"), "."])
    return [html.H2(TABS["server"]), html.P(watched.url), html.Div(_live(watched), id="server-figures")]


def _live(watched: Watched | None) -> Any:
    if watched is None:
        return []
    watched.look()
    if watched.problem:
        return html.P(watched.problem, role="alert")
    names = ("Predictions a second", "Latency", "Queue and batches", "Quality levels")
    return html.Div(
        [_graph(figure, name) for figure, name in zip(figures.live(watched), names, strict=True)], className="two"
    )
