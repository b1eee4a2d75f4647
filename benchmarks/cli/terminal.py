"""Consoles, options, progress bars and JSON output shared by all commands."""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from errno import EISDIR
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

errors = Console(stderr=True)
Json = Annotated[
    str | None, typer.Option("--json", help="Write the result as JSON to this file; '-' for standard output.")
]
EnvKwargs = Annotated[
    list[str], typer.Option("--env-kwarg", "-k", help="name=value, passed to gymnasium.make; can be repeated.")
]
Out = Annotated[Path, typer.Option(help="Output folder of the results.")]
Add = Callable[[str], Callable[[float], None]]


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"moe-envs {version('moe-envs')}")
        raise typer.Exit


def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Options common to all commands."""


def group(help_text: str) -> typer.Typer:
    """Create an app with subcommands."""
    app = typer.Typer(no_args_is_help=True, help=help_text, pretty_exceptions_enable=False)
    app.callback()(options)
    return app


def console_of(json_file: str | None) -> Console:
    """Console for tables: standard error if the JSON goes to standard output."""
    return errors if json_file == "-" else Console()


def require_writable(json_file: str | None) -> None:
    """Raise `OSError` before any work if the file of `--json` cannot be written."""
    from cost.files import naming

    if json_file not in (None, "-"):
        path = Path(str(json_file))
        if path.is_dir():
            raise IsADirectoryError(EISDIR, "it is a folder", str(path))
        if not path.exists() or path.is_file():
            with naming(path):
                path.parent.mkdir(parents=True, exist_ok=True)
                tempfile.TemporaryFile(dir=path.parent).close()


def write(json_file: str | None, result: Any) -> None:
    """Write a result as JSON if `--json` was given."""
    if json_file == "-":
        sys.stdout.write(json.dumps(result, indent=1) + "\n")
    elif json_file is not None:
        from cost.files import write_text

        write_text(Path(json_file), json.dumps(result, indent=1))


def pairs(given: list[str], option: str) -> dict[str, Any]:
    """Parse "name=value" options; a value that is not valid JSON is kept as text."""
    parsed: dict[str, Any] = {}
    for pair in given:
        name, equals, value = pair.partition("=")
        if not equals:
            raise ValueError(f"{option} {pair!r}: expected name=value")
        try:
            parsed[name] = json.loads(value)
        except RecursionError as error:
            raise ValueError(f"{option} {name}: its value is nested too deeply") from error
        except ValueError:
            parsed[name] = {"True": True, "False": False, "None": None}.get(value, value)
    return parsed


@contextmanager
def bar() -> Iterator[Add]:
    """Show progress bars with the remaining time on standard error."""
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=errors) as progress:

        def add(description: str) -> Callable[[float], None]:
            task = progress.add_task(description, total=1.0)
            return lambda share: progress.update(task, completed=share)

        yield add
