"""The command `moe-profile`: measure, show and compare profiles."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import pandas as pd
import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from benchmarks.cli.terminal import Json, console_of, group, write
from cost.profile import SIZES, Profile, ProfileError

if TYPE_CHECKING:
    from torch import nn

app = group("Measure, show and compare the costs of models on this machine.")
Save = Annotated[Path | None, typer.Option("--out", help="Also save the profile to this file.")]
Repeats = Annotated[int, typer.Option(help="Measurement rounds over all operations and sizes, at least 50.")]
Name = Annotated[str, typer.Argument(help="Profile file, or name of a bundle for its reference profile.")]


@app.command("bundle")
def measure_bundle(
    name: Annotated[str, typer.Argument(help="Name or folder of a bundle.")] = "fashion-mnist",
    repeats: Repeats = 200,
    save: Save = None,
) -> None:
    """Measure the costs of a bundle's experts on this machine, for use with costs="machine".

    Example: moe-profile bundle fashion-mnist --out mine.json
    """
    from experts import bundle as bundles
    from experts import profiles

    loaded = bundles.load(name)
    measured = profiles.measure(loaded, repeats, progress=True)
    _print(measured, f"{name}: time of an expert on n inputs = fixed + slope * n", console_of(None))
    _save(measured, save)
    path = profiles.machine_path(loaded)
    console_of(None).print(f"[green]saved[/] {path}    use it: gymnasium.make(..., costs='machine')")


@app.command("model")
def measure_model(
    build: Annotated[
        str, typer.Argument(help="module:function without arguments, importable from the current folder.")
    ],
    sizes: Annotated[str, typer.Option(help="Comma-separated batch sizes.")] = ",".join(map(str, SIZES)),
    dtypes: Annotated[str, typer.Option(help="Comma-separated dtypes, e.g. float32,bfloat16.")] = "float32",
    devices: Annotated[str, typer.Option(help="Comma-separated devices, e.g. cpu,cuda.")] = "cpu",
    threads: Annotated[str, typer.Option(help="Comma-separated numbers of torch threads, e.g. 1,2.")] = "1",
    repeats: Repeats = 50,
    save: Save = None,
) -> None:
    """Measure the forward pass of a torch module, or a set of callables, on this machine.

    The function returns (module, inputs), where the first dimension of the inputs tensor is the batch, or a dict that
    maps names to callables. A callable takes n and runs the operation on n inputs, or returns a prepared callable.

    Example: moe-profile model my_module:build --dtypes float32,bfloat16 --threads 1,2
    """
    from cost import profile as profiles

    made, counts = _build(build), _numbers(sizes, "--sizes")
    if isinstance(made, dict):
        if (dtypes, devices, threads) != ("float32", "cpu", "1"):
            raise ValueError("--dtypes, --devices and --threads apply to a module only, not to callables")
        measured = profiles.measure(made, counts, repeats, progress=True)
    else:
        grid: dict[str, Any] = {"dtypes": dtypes.split(","), "devices": devices.split(",")}
        grid["threads"] = _numbers(threads, "--threads")
        measured = profiles.measure_module(*made, counts, repeats, **grid, progress=True)
    _print(measured, f"{build}: time on n inputs = fixed + slope * n", console_of(None))
    _save(measured, save)


@app.command("logs")
def report_logs(
    folder: Annotated[Path, typer.Argument(help="Log folder of cost.monitor.Monitor.")],
    out: Annotated[Path, typer.Option(help="Output folder of the report.")] = Path("runs/monitor"),
    json_file: Json = None,
) -> None:
    """Report the logs of a monitor: costs per epoch, cost against accuracy, normalised costs, alerts and plots.

    Example: moe-profile logs runs/monitor --out runs/costs
    """
    from benchmarks.experiments.monitor import report
    from benchmarks.results.tables import terminal

    result = report.write(folder, out)
    write(json_file, result)
    console = console_of(json_file)
    for title, rows in report.tables(result).items():
        if rows:
            console.print(terminal(title, rows))
    for alert in result["alerts"]:
        console.print(f"[yellow]alert:[/] {alert}")
    console.print(f"[green]saved[/] {out}/report.md, results.json and pictures")


@app.command()
def show(profile: Name, json_file: Json = None) -> None:
    """Show a profile: fitted costs, fit residuals and spread, and the machine it was measured on.

    Example: moe-profile show fashion-mnist
    """
    from cost.profile import require_this_machine

    loaded = load(profile)
    write(json_file, loaded.model_dump(mode="json"))
    console = console_of(json_file)
    _print(loaded, f"{profile}: time on n inputs = fixed + slope * n", console)
    for key, value in loaded.fingerprint.items():
        console.print(Text(f"{key}: {value}"))
    console.print(f"measured {loaded.created}, {loaded.repeats} repeats")
    try:
        require_this_machine(loaded, profile)
    except ProfileError as error:
        console.print(Text(str(error), "yellow"), soft_wrap=True)


@app.command()
def compare(
    first: Name,
    second: Name,
    plot: Annotated[Path | None, typer.Option(help="Plot the times of both profiles to this PNG file.")] = None,
) -> None:
    """Compare the times of two profiles, operation by operation.

    Example: moe-profile compare fashion-mnist mine.json --plot both.png
    """
    frame = differences(load(first), load(second))
    console = console_of(None)
    table = Table("operation", "n", escape(first), escape(second), "difference", title="time [µs]")
    for row in frame.to_dict("records"):
        figures = (f"{row['first'] * 1e6:.2f}", f"{row['second'] * 1e6:.2f}", f"{row['difference']:+.1%}")
        table.add_row(Text(row["operation"]), str(row["n"]), *figures)
    console.print(table)
    sizes = frame["difference"].abs()
    console.print(f"difference: median {sizes.median():.1%}, P95 {sizes.quantile(0.95):.1%} of {len(frame)} times")
    if plot is not None:
        draw(frame, plot, (first, second))
        console.print(Text.assemble(("saved", "green"), f" {plot}"))


def load(name: str) -> Profile:
    """Load a profile from a file, measured on any machine, or the reference profile of a bundle."""
    from cost.profile import parse
    from experts import bundle as bundles
    from experts.bundle import BundleError

    if Path(name).is_file():
        return Profile.load(name, any_machine=True)
    try:
        content = bundles.load(name).profile
    except BundleError as error:
        raise ProfileError(f"{name!r} is neither a file nor a bundle: {error}") from error
    if content is None:
        raise ProfileError(f"the bundle {name!r} has no reference profile; measure one: moe-profile bundle {name}")
    return parse(content, name)


def differences(first: Profile, second: Profile) -> pd.DataFrame:
    """Times in s of the common operations by n: medians if both profiles measured n, otherwise fitted times."""
    common = [name for name in first.operations if name in second.operations]
    if not common:
        raise ProfileError(f"no operation in common: {', '.join(first.operations)}; {', '.join(second.operations)}")
    rows = []
    for name in common:
        pair = first.operations[name], second.operations[name]
        measured = [dict(zip(each.sizes, each.median, strict=True)) for each in pair]
        sizes = [n for n in measured[0] if n in measured[1]]
        for n in sizes or SIZES:
            ours, theirs = (
                table[n] if sizes else each.time.fixed + each.time.slope * n
                for table, each in zip(measured, pair, strict=True)
            )
            rows.append({"operation": name, "n": n, "first": ours, "second": theirs, "difference": theirs / ours - 1})
    return pd.DataFrame(rows)


def draw(frame: pd.DataFrame, path: Path, names: tuple[str, str]) -> None:
    """Plot the times of both profiles against n, one panel per operation."""
    from matplotlib.figure import Figure

    operations = list(frame["operation"].unique())
    columns = min(4, len(operations))
    figure = Figure((3 * columns, 2.4 * -(-len(operations) // columns)), layout="constrained")
    for index, operation in enumerate(operations):
        axes = figure.add_subplot(-(-len(operations) // columns), columns, index + 1)
        rows = frame[frame["operation"] == operation]
        axes.plot(rows["n"], rows["first"] * 1e6, "o-", label=names[0], markersize=3)
        axes.plot(rows["n"], rows["second"] * 1e6, "s--", label=names[1], markersize=3)
        axes.set(title=operation, xlabel="n", ylabel="µs", ylim=(0, None))
    figure.axes[0].legend(fontsize="small")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def _print(profile: Profile, title: str, console: Console) -> None:
    table = Table("operation", "fixed [µs]", "slope [µs]", "residual", "spread", "held [B]", title=Text(title))
    for name, operation in profile.operations.items():
        time = operation.time
        figures = (
            f"{time.fixed * 1e6:.2f}",
            f"{time.slope * 1e6:.3f}",
            f"{time.residual:.1%}",
            f"{operation.spread:.1%}",
        )
        table.add_row(Text(name), *figures, f"{operation.memory.fixed:,.0f}")
    console.print(table)
    console.print(f"energy: {profile.energy_source}", soft_wrap=True)
    for complaint in profile.noise.complaints() if profile.noise else ():
        console.print(f"[yellow]noisy host:[/] {complaint}")


def _save(profile: Profile, path: Path | None) -> None:
    if path is not None:
        profile.save(path)
        console_of(None).print(Text.assemble(("saved", "green"), f" {path}"))


def _numbers(text: str, option: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise ValueError(f"{option} {text!r}: expected whole numbers separated by commas") from None


def _build(reference: str) -> tuple[nn.Module, Any] | dict[str, Any]:
    name, _, function = reference.partition(":")
    sys.path.insert(0, str(Path.cwd()))
    try:
        builder = getattr(importlib.import_module(name), function or "build")
    except (ImportError, AttributeError) as error:
        raise ValueError(f"{reference!r} cannot be found: {error}") from error
    import torch

    made = builder()

    fits = isinstance(made, tuple) and len(made) == 2
    fits = fits and isinstance(made[0], torch.nn.Module) and isinstance(made[1], torch.Tensor)
    if not fits and not (isinstance(made, dict) and all(callable(each) for each in made.values())):
        raise ValueError(f"{reference!r} must return (module, inputs tensor) or a dict of callables, got {type(made)}")
    return made
