"""The subcommands of `moe-benchmark` about matrices of runs: run, report, validate."""

from __future__ import annotations

import json
from collections.abc import Collection
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from benchmarks.cli.benchmark import benchmark_app
from benchmarks.cli.terminal import Json, bar, console, write

if TYPE_CHECKING:
    from benchmarks.runner.matrix import Matrix

Out = Annotated[Path, typer.Option(help="Folder of the rows and of the report.")]


@benchmark_app.command("run")
def _run(
    matrix: Annotated[str, typer.Argument(help="A YAML or JSON file, models, or an id of a leaderboard")],
    out: Out,
    jobs: Annotated[int, typer.Option(min=1, help="Processes side by side.")] = 1,
    only: Annotated[list[str] | None, typer.Option(help="Names of setups; all by default.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be run.")] = False,
    part: Annotated[str, typer.Option(help="I/N: the I-th of N parts, from 0 on, for several machines.")] = "0/1",
    slurm: Annotated[Path | None, typer.Option(help="Write a Slurm script of --jobs tasks, and run nothing.")] = None,
) -> None:
    """Setups x seeds x splits, each run once; then the report. What is there already is not run again.

    Example: moe-benchmark run models --out runs/models --jobs 2
    """
    from benchmarks.runner import runner
    from benchmarks.runner.matrix import jobs_of, named

    wanted = named(matrix)
    number, _, parts = part.partition("/")
    if not (number.isdigit() and parts.isdigit() and int(number) < int(parts)):
        raise ValueError(f"--part {part}: I/N with I from 0 to N - 1")
    if slurm:
        if only or dry_run or part != "0/1":
            raise ValueError("--slurm writes a script of the whole matrix: without --only, --part and --dry-run")
        _write_slurm(slurm, wanted, out, jobs)
        return
    place = int(number), int(parts)
    if dry_run:
        every, todo = jobs_of(wanted), runner.left(wanted, out, place, only or ())
        table = Table("setup", "seeds", "splits", "runs", "to do", title=f"{wanted.experiment}, nothing is run")
        for name in dict.fromkeys(job.setup for job in every):
            own, left = ([job for job in jobs if job.setup == name] for jobs in (every, todo))
            seeds, splits = ({getattr(job, what) for job in own} for what in ("seed", "split"))
            table.add_row(name, ", ".join(map(str, sorted(seeds))), str(len(splits)), str(len(own)), str(len(left)))
        console.print(table, f"{len(todo)} of {len(every)} runs to do")
        return
    _make(wanted, out, jobs, place, only or ())


def _make(matrix: Matrix, out: Path, jobs: int, part: tuple[int, int] = (0, 1), only: Collection[str] = ()) -> None:
    from benchmarks.runner import runner
    from benchmarks.runner.matrix import FailedRuns, RunnerError
    from benchmarks.runner.rows import RAW

    with bar() as add:
        try:
            made = runner.run(matrix, out, jobs, part, only, add(f"runs of {matrix.experiment}"))
        except FailedRuns:
            with suppress(RunnerError):  # where all failed
                runner.rebuild(out)
            raise
    if part[1] > 1:
        console.print(f"{made} runs; when all parts are through: moe-benchmark report {out}")
    elif runner.rebuild(out) or made:
        console.print(f"[green]saved[/] {out}/{RAW}, {out}/{runner.REPORT}, {out}/{runner.RESULTS}")
    else:
        console.print("nothing to do")


def _write_slurm(path: Path, matrix: Matrix, out: Path, parts: int) -> None:
    from benchmarks.runner import runner
    from cost.files import write_text

    runner.prepare(matrix, out)
    write_text(path, runner.slurm(out / runner.MATRIX, out, parts))
    console.print(f"[green]saved[/] {path}    start it: sbatch {path}")


@benchmark_app.command("leaderboard")
def _leaderboard(
    env_id: Annotated[str, typer.Argument(help="MoERouting-v0, MoEMetaOpt-v0 or MoECompression-v0")],
    out: Out,
    quick: Annotated[
        bool,
        typer.Option("--quick", help="Three seeds instead of ten, one or two splits, on MoEMetaOpt-v0 our PPO alone."),
    ] = False,
    jobs: Annotated[int, typer.Option(min=1, help="Processes side by side.")] = 2,
    timesteps: Annotated[int | None, typer.Option(min=1, help="Of each training, instead of the tuned number.")] = None,
    episodes: Annotated[int | None, typer.Option(min=2, help="Of each judgement, instead of the usual number.")] = None,
) -> None:
    """Learners beside every baseline and the bound of an environment, on test data; the same as `run ENV_ID`."""
    from benchmarks.runner.matrix import EXPERIMENTS, SEEDS, Matrix, experiment_of

    name = env_id.removeprefix("moe_envs:")
    boards = [each for each in EXPERIMENTS if each != "models"]
    if name not in boards:
        raise ValueError(f"no leaderboard of {env_id!r}; there are {', '.join(boards)}")
    settings = {"timesteps": timesteps, "episodes": episodes}
    given = {key: value for key, value in settings.items() if value is not None}
    matrix = Matrix(experiment=name, settings=given)
    if quick:
        board = experiment_of(name)
        matrix.seeds, matrix.splits, matrix.setups = list(SEEDS), list(board.quick), board.quick_setups
    _make(matrix, out, jobs)


@benchmark_app.command("report")
def _report(folder: Annotated[Path, typer.Argument(help="A folder of moe-benchmark run.")]) -> None:
    """Rebuild tables and pictures from the rows."""
    from benchmarks.runner import runner

    done = runner.rebuild(folder)
    console.print(f"[green]saved[/] {folder}/{runner.REPORT}" if done else f"{folder}/{runner.REPORT} is of these rows")


@benchmark_app.command("validate")
def _validate(
    file: Annotated[Path, typer.Argument(help="Rows of moe-benchmark run: a raw.jsonl.")],
    rows: Annotated[int, typer.Option(min=1, help="How many to run again, drawn with --seed.")] = 3,
    seed: int = 0,
    tolerance: Annotated[float, typer.Option(min=0, help="Of each metric, relative and absolute.")] = 1e-6,
    json_file: Json = None,
) -> None:
    """Run rows of a submitted result again and compare their metrics; exit code 1 where one differs."""
    from benchmarks.runner.validate import validate

    with bar() as add:
        found = validate(file, rows, seed, tolerance, add(f"up to {rows} rows again"))
    write(json_file, found)
    table = Table("setup", "seed", "split", "metric", "submitted", "here")
    for each in found:
        shown = each["differing"] or [{"metric": f"all {each['metrics']} the same", "submitted": "", "here": ""}]
        for metric in shown:
            cells = (json.dumps(metric[key])[:40] if metric[key] != "" else "" for key in ("submitted", "here"))
            table.add_row(each["setup"], str(each["seed"]), each["split"], metric["metric"], *cells)
    console.print(table)
    if unlike := sorted({name for each in found for name in each["made_with_other"]}):
        why = ": other processors round otherwise" if "fingerprint" in unlike else ""
        console.print(f"[yellow]made with another {', '.join(unlike)}{why}[/]")
    if any(each["differing"] for each in found):
        raise typer.Exit(1)
