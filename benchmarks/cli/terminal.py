"""What the commands share: consoles, progress bars, results as JSON."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

console = Console()
errors = Console(stderr=True)
Json = Annotated[Path | None, typer.Option("--json", help="Write the result to this file as JSON.")]


@contextmanager
def bar() -> Iterator[Callable[[str], Callable[[float], None]]]:
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=errors) as progress:

        def add(description: str) -> Callable[[float], None]:
            task = progress.add_task(description, total=1.0)
            return lambda share: progress.update(task, completed=share)

        yield add


def write(path: Path | None, result: Any) -> None:
    if path is not None:
        from cost.files import write_text

        write_text(path, json.dumps(result, indent=1))


def say_reused(result: dict[str, Any]) -> None:
    """Policies that were there already may be of another commit than what judged them."""
    if older := sorted({str(each["commit"]) for each in result["policies"]} - {str(result["commit"])}):
        console.print(f"[yellow]policies trained at {', '.join(older)}, judged at {result['commit']}[/]")
