"""`moe-compress`, and the subcommand of `moe-benchmark` about MoECompression-v0."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from benchmarks.cli.benchmark import benchmark_app
from benchmarks.cli.terminal import Json, bar, console, say_reused, write

LIMIT = 2**20
compress_app = typer.Typer(no_args_is_help=True, add_completion=False, help="Compress Mixture-of-Experts models.")
Model = Annotated[str, typer.Option(help="fashion-mnist-conv or digits-mlp; -1, -2, ... for other seeds")]
AsJson = Annotated[bool, typer.Option("--json", help="Print the rows as JSON, and nothing else on standard output.")]
Limit = Annotated[int, typer.Option(min=1, help="Bytes that the file may have.")]
ROW = ("method", "bytes", "accuracy", "time_s", "finetuned")


@compress_app.command("run")
def _run(
    model: Model = "fashion-mnist-conv",
    out: Annotated[Path | None, typer.Option(help="Default: runs/compress-MODEL.")] = None,
    steps: Annotated[int, typer.Option(min=1, help="Of each fine-tuning.")] = 430,
    evaluations: Annotated[int, typer.Option(min=1, help="Of the local search.")] = 400,
    limit: Limit = LIMIT,
    seed: int = 0,
    as_json: AsJson = False,
) -> None:
    """All methods in turn: bytes on disk, test accuracy and time of each; a report, pictures, plans, the best file.

    Fails where no compressed form is within the limit.
    """
    from benchmarks.experiments import compression_methods

    out = out or Path("runs") / f"compress-{model}"
    with bar() as add:
        result = compression_methods.run(model, out, steps, evaluations, limit, seed, add)
    _show(result["rows"], model, as_json)
    if result["best"] is None:
        raise ValueError(f"no method brings {model} under {limit:,} bytes; see {out}/report.md")
    if not as_json:
        console.print(f"smallest within half a point on validation, and the limit: [bold]{result['best']}[/]")
        console.print(
            f"[green]saved[/] {out}/report.md, results.json, pareto.png, heatmap.png, plans/, best.safetensors"
        )


@compress_app.command("apply")
def _apply(
    plan: Annotated[Path, typer.Argument(exists=True, dir_okay=False, help="A plan of `run`, `plan` or `Plan.save`.")],
    checkpoint: Annotated[Path, typer.Argument(exists=True, dir_okay=False, help="A reference model's safetensors.")],
    out: Annotated[Path, typer.Option(help="The compressed model.")] = Path("compressed.safetensors"),
    steps: Annotated[int, typer.Option(min=0, help="Of fine-tuning under the plan, 0 for none.")] = 0,
    limit: Limit = LIMIT,
    as_json: AsJson = False,
) -> None:
    """Apply a plan to a checkpoint; fails where the file would be larger than the limit."""
    from benchmarks.experiments import compression_methods

    result = compression_methods.apply(plan, checkpoint, out, steps, limit)
    _show(result["rows"], str(checkpoint), as_json)
    if not as_json:
        console.print(f"[green]saved[/] {out}")


@compress_app.command("plan")
def _plan(
    policy: Annotated[
        Path, typer.Argument(exists=True, help="Our PPO of MoECompression-v0: RUN_DIR/best of moe-train.")
    ],
    model: Model = "fashion-mnist-conv",
    budget: Annotated[int, typer.Option(min=1, help="Bytes of the compressed file.")] = 200_000,
    out: Annotated[Path, typer.Option(help="The plan, for `moe-compress apply`.")] = Path("plan.json"),
) -> None:
    """The plan that a learned policy gives a model, from the sensitivities of its matrices alone."""
    from agents.deploy.compression import plan_of
    from agents.ppo import PPO

    found = plan_of(PPO.load(policy), model, budget)
    if found.bytes > budget:
        raise ValueError(f"the plan takes {found.bytes:,} bytes, more than the budget of {budget:,}")
    found.save(out)
    console.print(f"[green]saved[/] {out}: {found.bytes:,} bytes of {budget:,}")


@compress_app.command("export")
def _export(model: Model = "fashion-mnist-conv", out: Path = Path("model.safetensors")) -> None:
    """Write a reference model as a checkpoint, for `moe-compress apply`."""
    from experts import reference_models

    reference_models.save(reference_models.load(model), model, out)
    console.print(f"[green]saved[/] {out}")


@compress_app.command("tau")
def _tau(
    model: Annotated[list[str] | None, typer.Option(help="digits-mlp and fashion-mnist-conv by default.")] = None,
    json_file: Json = None,
) -> None:
    """Weights below tau times the largest of their matrix left out: share kept, accuracy, bytes, time."""
    from benchmarks.experiments import boundary_pruning

    with bar() as add:
        names = model or ["digits-mlp", "fashion-mnist-conv"]
        result = boundary_pruning.run(names, add("cutting at tau"))
    write(json_file, result)
    title = "medians of 5 runs, 64 inputs, one thread"
    table = Table("model", "tau", "kept", "accuracy", "bytes", "model", "linear", "sparse", title=title)
    for row in result["rows"]:
        times = (f"{1e6 * row[key]:.0f} us" for key in ("time_s", "linear_dense_s", "linear_sparse_s"))
        figures = f"{row['tau']:.2f}", f"{row['kept']:.1%}", f"{row['accuracy']:.2%}", f"{row['bytes']:,}"
        table.add_row(row["model"], *figures, *times)
    console.print(table)


@compress_app.command("experts")
def _experts(
    model: Model = "fashion-mnist-conv",
    jobs: Annotated[int, typer.Option(help="Processes side by side.")] = 2,
    out: Path = Path("runs/experts"),
    json_file: Json = None,
) -> None:
    """A shared core beside a low rank of each expert, for experts trained apart and for upcycled ones."""
    from benchmarks.experiments import shared_core

    with bar() as add:
        result = shared_core.run(model, out, jobs, add("fitting cores"))
    write(json_file, result)
    for kind, accuracy in result["accuracy"].items():
        table = Table(
            "", "rank", "parameters", "active", "error", "accuracy", title=f"{kind}, as they are {accuracy:.2%}"
        )
        for row in result["rows"]:
            if row["experts"] == kind:
                figures = (
                    f"{row['parameters']:,}",
                    f"{row['active']:,}",
                    f"{row['error']:.3f}",
                    f"{row['accuracy']:.2%}",
                )
                table.add_row(row["way"], str(row["rank"]), *figures)
        console.print(table)
    console.print("parameters of the experts' first matrices; active: of two experts; accuracy on test")


@compress_app.command("bound")
def _bound(
    model: Model = "digits-mlp",
    seeds: Annotated[int, typer.Option(min=2, help="Trainings of PPO, and runs of each search.")] = 5,
    timesteps: Annotated[int, typer.Option(min=1, help="Of PPO.")] = 150_000,
    evaluations: Annotated[int, typer.Option(min=2, help="Of each search, for each budget.")] = 400,
    jobs: Annotated[int, typer.Option(help="Processes side by side.")] = 2,
    out: Path = Path("runs/compression-bound"),
) -> None:
    """Searches and PPO beside the best of all plans, on a small model whose experts share their levels."""
    from benchmarks.experiments import compression_bound

    with bar() as add:
        result = compression_bound.run(model, seeds, timesteps, evaluations, jobs, out, add)
    table = Table("budget", "policy", "behind the best", "at most", "points on test", "runs",
                  title=f"{model}, best of {result['plans']:,} plans")  # fmt: skip
    for row in result["rows"]:
        figures = f"{row['behind']:.3f}", f"{row['most']:.3f}", f"{row['points']:+.2f}", str(row["runs"])
        table.add_row(f"{row['budget']:,}", row["policy"], *figures, style="bold red" if row["policy"] == "PPO" else "")
    console.print(table)
    say_reused(result)
    console.print(f"behind: of 10 * accuracy - 3 * loss; searches evaluate {evaluations} plans")
    console.print(f"[green]saved[/] {out}/results.json, bound.png, policies/")


@benchmark_app.command("compression")
def _compression(
    model: Annotated[list[str] | None, typer.Option(help="That PPO trains on; three by default.")] = None,
    held_out: Annotated[list[str] | None, typer.Option(help="That it never sees; two by default.")] = None,
    seeds: Annotated[int, typer.Option(min=2, help="Trainings of PPO.")] = 5,
    timesteps: Annotated[int | None, typer.Option(min=1, help="Of PPO, instead of the tuned number.")] = None,
    evaluations: Annotated[int, typer.Option(min=2, help="Of each search, for each model and budget.")] = 400,
    searches: Annotated[int, typer.Option(min=1, help="Runs of each search, for each model and budget.")] = 3,
    ablations: Annotated[int, typer.Option(min=0, help="Trainings without warm start, and without masks.")] = 2,
    jobs: Annotated[int, typer.Option(help="Processes side by side.")] = 2,
    out: Path = Path("runs/compression"),
) -> None:
    """PPO beside searches at equal bytes: points of test accuracy lost, on known and on held-out models."""
    from benchmarks.experiments import compression
    from experts import reference_models

    kind = reference_models.recipe_of(model[0])[0] if model else "fashion-mnist-conv"
    known = [reference_models.full_name(each) for each in model or [f"{kind}-{seed}" for seed in (0, 1, 2)]]
    unseen = [reference_models.full_name(each) for each in held_out or [f"{kind}-{seed}" for seed in (3, 4)]]
    if len({*known, *unseen}) < len(known) + len(unseen):
        raise ValueError(f"a model is named twice among {', '.join(known + unseen)}")
    if len({reference_models.recipe_of(each)[0] for each in known + unseen}) > 1:
        raise ValueError(f"{', '.join(known + unseen)} are of several recipes; one policy is for one")
    with bar() as add:
        result = compression.run(known, unseen, seeds, timesteps, evaluations, searches, ablations, jobs, out, add)
    for kind in ("known", "held out"):
        for budget in sorted({row["budget"] for row in result["rows"]}):
            columns = ("", "points", "95 %", "ahead of the search", "95 %", "evaluations")
            table = Table(*columns, title=f"models {kind}, {budget:,} bytes")
            rows = [row for row in result["rows"] if (row["kind"], row["budget"]) == (kind, budget)]
            for row in sorted(rows, key=lambda row: -row["points"]):
                points, ahead = (
                    "" if row[key] is None else "{:+.2f} .. {:+.2f}".format(*row[key]) for key in ("ci95", "ahead_ci95")
                )
                difference = f"{row['ahead']:+.2f}" + (" tie" if row["tie"] else "")
                figures = f"{row['points']:+.2f}", points, difference, ahead, str(row["evaluations"])
                table.add_row(row["policy"], *figures, style="bold red" if row["policy"].startswith("PPO") else "")
            console.print(table)
    say_reused(result)
    console.print(f"the search: exact allocation, then local search; differences below {result['tie']} points are ties")
    console.print(f"[green]saved[/] {out}/results.json, plans.csv, points.png, policies/")


def _show(rows: list[dict[str, Any]], title: str, as_json: bool) -> None:
    if as_json:
        typer.echo(json.dumps({"rows": [{key: row[key] for key in ROW} for row in rows]}))
        return
    table = Table("method", "bytes", "accuracy", "points", "us", "trained", title=f"{title}, test images")
    for row in rows:
        points = 100 * (row["accuracy"] - rows[0]["accuracy"])
        figures = f"{row['bytes']:,}", f"{row['accuracy']:.2%}", f"{points:+.2f}", f"{1e6 * row['time_s']:.0f}"
        table.add_row(row["method"], *figures, "yes" if row["finetuned"] else "")
    console.print(table)
