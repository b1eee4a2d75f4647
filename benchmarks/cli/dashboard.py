"""The command `moe-dashboard`: runs, models and a server in the browser."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from benchmarks.cli.terminal import _version, errors

app = typer.Typer(pretty_exceptions_enable=False)
KEY = "MOE_SERVE_KEY"


@app.command()
def _dashboard(
    runs: Annotated[
        list[Path] | None, typer.Argument(help="Run folders of moe-train, or folders that hold them.", exists=True)
    ] = None,
    server: Annotated[
        str | None, typer.Option(help=f"Address of a moe-serve; its API key, if any, is in the variable {KEY}.")
    ] = None,
    model: Annotated[str, typer.Option(help="Language model whose routing is shown.")] = "language",
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port to listen on.")] = 8080,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Show learning curves, Pareto fronts, expert use, cost profiles and a live server in the browser.

    Example: moe-dashboard runs --server http://127.0.0.1:8000
    """
    if server is not None and not server.startswith(("http://", "https://")):
        raise ValueError(f"--server {server!r}: must begin with http:// or https://")
    try:
        from benchmarks.dashboard.app import create_dashboard
    except ImportError as error:
        raise ImportError(f"moe-dashboard needs {error.name}: pip install 'moe-envs[dashboard]'") from error
    made = create_dashboard(runs or (), server, os.environ.get(KEY), model)
    errors.print(f"http://{host}:{port}")
    made.run(host=host, port=port, debug=False)
