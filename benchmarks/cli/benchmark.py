"""The command `moe-benchmark`: run experiments and leaderboards, report and validate results."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table
from typer.core import TyperCommand

from benchmarks.cli.terminal import Json, Out, bar, console_of, group, pairs, require_writable, write

if TYPE_CHECKING:
    from benchmarks.runner.matrix import Matrix
    from benchmarks.runner.processes import Executor

app = group("Run experiments and leaderboards, and report their results.")
Jobs = Annotated[int, typer.Option(min=1, help="Number of parallel processes, or of parallel Ray tasks with --ray.")]
Set = Annotated[
    list[str], typer.Option("--set", help="Override a field in all setups: name=value, with the value as JSON.")
]
RayAddress = Annotated[
    str | None,
    typer.Option(
        metavar="[ADDRESS]", help="Run on Ray, here or on the cluster at ADDRESS, which must share the output folder."
    ),
]
Seeds = Annotated[int | None, typer.Option(min=1, help="Use only the first N seeds of the experiment.")]
Splits = Annotated[list[str] | None, typer.Option(help="Splits to run; default: all.")]
Quick = Annotated[bool, typer.Option("--quick", help="Short version with few seeds and small sizes.")]
TrustOption = Annotated[
    list[str],
    typer.Option(
        help="Your own experiment, environment or policy that a file names; it is imported, which runs its code."
    ),
]
Again = Annotated[bool, typer.Option("--overwrite", help="Delete existing results first.")]


@app.command("list")
def _list(json_file: Json = None) -> None:
    """List all experiments and leaderboards with the question each one answers.

    Example: moe-benchmark list
    """
    from benchmarks.runner.experiments import listed

    found = [{"name": each.name, "kind": kind, "question": each.question} for each, kind in listed()]
    write(json_file, found)
    table = Table("name", "question", title="moe-benchmark run NAME --out DIR")
    for row in found:
        table.add_row(row["name"], row["question"])
    console_of(json_file).print(table)


class _RayCommand(TyperCommand):
    """Command whose option --ray needs no value: without one, Ray is started on this machine."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Give a bare --ray its value."""
        for place, word in reversed([*enumerate(args)]):
            if word == "--ray" and (place + 1 == len(args) or args[place + 1].startswith("-")):
                args.insert(place + 1, "local")
        return super().parse_args(ctx, args)


@app.command("run", cls=_RayCommand)
def _run(
    name: Annotated[str, typer.Argument(help="Experiment (see moe-benchmark list), environment id, or matrix file.")],
    out: Out,
    jobs: Jobs = 1,
    settings: Set = [],  # noqa: B006
    only: Annotated[list[str] | None, typer.Option(help="Setups to run; default: all.")] = None,
    seeds: Seeds = None,
    split: Splits = None,
    quick: Quick = False,
    overwrite: Again = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show the pending runs without running them.")] = False,
    part: Annotated[
        str, typer.Option(help="I/N: run part I of N, counted from 0, to share the work between machines.")
    ] = "0/1",
    ray: RayAddress = None,
    trust: TrustOption = [],  # noqa: B006
    slurm: Annotated[
        Path | None, typer.Option(help="Only write a Slurm script with --jobs tasks to this file.")
    ] = None,
    json_file: Json = None,
) -> None:
    """Run an experiment (setups x seeds x splits) and report it. Finished runs are skipped.

    Example: moe-benchmark run hybrid --out runs/hybrid --set data=digits --jobs 2
    """
    from benchmarks.runner import runner
    from benchmarks.runner.experiments import is_known
    from benchmarks.runner.matrix import is_file, jobs_of, named, require_trusted_runs

    typed = pairs(settings, "--set")
    wanted = named(name, quick)
    wanted.settings |= typed
    if is_file(name):
        require_trusted_runs(wanted, Path(name), {*trust, *map(str, typed.values())})
    _narrow(wanted, seeds, split)
    number, _, parts = part.partition("/")
    if not (number.isdigit() and parts.isdigit() and int(number) < int(parts)):
        raise ValueError(f"--part {part}: I/N with I from 0 to N - 1")
    if slurm:
        if only or dry_run or part != "0/1":
            raise ValueError("--slurm writes a script of the whole matrix: without --only, --part and --dry-run")
        own = [] if is_file(name) or is_known(name) else [name]
        _write_slurm(
            slurm, wanted, out, jobs, [*own, *trust, *(str(each) for each in typed.values() if ":" in str(each))]
        )
        return
    place = int(number), int(parts)
    if dry_run:
        every, todo = jobs_of(wanted), runner.left(wanted, out, place, only or ())
        _show_plan(wanted, every, todo, json_file)
        return
    _make(wanted, out, jobs, place, only or (), ray, overwrite, json_file)


@app.command("leaderboard", cls=_RayCommand)
def _leaderboard(
    env_id: Annotated[str, typer.Argument(help="Registered environment id; for your own environment, package:Id-v0.")],
    out: Out,
    policy: Annotated[
        list[str] | None, typer.Option(help="Your own policy to add: module:attribute of an object with predict.")
    ] = None,
    seeds: Seeds = None,
    split: Splits = None,
    quick: Quick = False,
    jobs: Jobs = 2,
    settings: Set = [],  # noqa: B006
    overwrite: Again = False,
    ray: RayAddress = None,
    json_file: Json = None,
) -> None:
    """Compare learners with all baselines and the bound of an environment on test data. Same as `run ENV_ID`.

    Example: moe-benchmark leaderboard MoERouting-v0 --out runs/board --quick
    """
    import moe_envs
    from benchmarks.runner.experiments import find
    from benchmarks.runner.matrix import named

    spec = moe_envs.find(env_id)
    name = spec.id if spec.entry_point.startswith("moe_envs.") else env_id
    wanted = named(name, quick)
    wanted.settings |= pairs(settings, "--set")
    if policy:
        setups = wanted.setups or {key: dict(each) for key, each in find(name).settings.items()}
        wanted.setups = setups | {each: {"policy": each} for each in policy}
    _narrow(wanted, seeds, split)
    _make(wanted, out, jobs, ray=ray, overwrite=overwrite, json_file=json_file)


@app.command("report")
def _report(
    folder: Annotated[Path, typer.Argument(help="Output folder of moe-benchmark run.")],
    trust: TrustOption = [],  # noqa: B006
    json_file: Json = None,
) -> None:
    """Rebuild the tables and plots of a result from its rows.

    Example: moe-benchmark report runs/hybrid
    """
    from benchmarks.runner import runner

    done = runner.rebuild(folder, trust)
    _show(folder, json_file, "saved" if done else "up to date")


@app.command("validate")
def _validate(
    file: Annotated[Path, typer.Argument(help="raw.jsonl written by moe-benchmark run.")],
    rows: Annotated[int, typer.Option(min=1, help="Number of rows to rerun, sampled with --seed.")] = 3,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the row sampling.")] = 0,
    tolerance: Annotated[float, typer.Option(min=0, help="Relative and absolute tolerance per metric.")] = 1e-6,
    trust: TrustOption = [],  # noqa: B006
    json_file: Json = None,
) -> None:
    """Rerun rows of a submitted result and compare the metrics. Exits with 1 if a metric differs.

    Example: moe-benchmark validate docs/leaderboards/MoERouting-v0/raw.jsonl --rows 1
    """
    from benchmarks.runner.validate import validate

    require_writable(json_file)
    with bar() as add:
        found = validate(file, rows, seed, tolerance, add(f"rerunning up to {rows} rows"), trust)
    write(json_file, found)
    table = Table("setup", "seed", "split", "metric", "submitted", "here")
    for each in found:
        shown = each["differing"] or [{"metric": f"all {each['metrics']} the same", "submitted": "", "here": ""}]
        for metric in shown:
            cells = (json.dumps(metric[key])[:40] if metric[key] != "" else "" for key in ("submitted", "here"))
            table.add_row(each["setup"], str(each["seed"]), each["split"], metric["metric"], *cells)
    console = console_of(json_file)
    console.print(table)
    if unlike := sorted({name for each in found for name in each["made_with_other"]}):
        why = ": rounding differs between processors" if "fingerprint" in unlike else ""
        console.print(f"[yellow]made with another {', '.join(unlike)}{why}[/]")
    if any(each["differing"] for each in found):
        raise typer.Exit(1)


def _narrow(wanted: Matrix, seeds: int | None, split: Sequence[str] | None) -> None:
    """Keep the first seeds and some splits only."""
    from benchmarks.runner.experiments import find

    wanted.splits = list(split or wanted.splits)
    if seeds is not None:
        wanted.seeds = (wanted.seeds or list(find(wanted.experiment).seeds))[:seeds]


def _executor(jobs: int, ray: str | None) -> Callable[[int], Executor] | None:
    from benchmarks.runner.processes import Ray

    return None if ray is None else lambda count: Ray("" if ray == "local" else ray, min(jobs, count))


def _make(
    matrix: Matrix, out: Path, jobs: int, part: tuple[int, int] = (0, 1), only: Collection[str] = (),
    ray: str | None = None, overwrite: bool = False, json_file: str | None = None,
) -> None:  # fmt: skip
    from benchmarks.runner import runner
    from benchmarks.runner.experiments import RunnerError

    require_writable(json_file)
    if overwrite:
        runner.clear(out)
    console = console_of(json_file)
    with bar() as add:
        try:
            report = add(f"runs of {matrix.experiment}")
            made = runner.run(matrix, out, jobs, part, only, report, console.print, _executor(jobs, ray))
        except runner.FailedRuns:
            with suppress(RunnerError):  # raised if all runs failed
                runner.rebuild(out, trust=True)
            raise
    if part[1] > 1:
        console.print(f"{made} runs; when all parts are through: moe-benchmark report {out} (--trust as here)")
        return
    done = runner.rebuild(out, trust=True) or made  # it has just been run
    _show(out, json_file, "saved" if done else "nothing to do:")


def _show(out: Path, json_file: str | None, word: str) -> None:
    """Print the result tables of a folder."""
    from benchmarks.results.tables import terminal
    from benchmarks.runner import runner
    from benchmarks.runner.experiments import RunnerError
    from cost.files import load_json

    result = load_json(out / runner.RESULTS, RunnerError, f"moe-benchmark report {out}")
    console = console_of(json_file)
    write(json_file, result)
    for title, rows in result.get("tables", {}).items():
        console.print(terminal(title, rows))
    for note in result.get("notes", []):
        console.print(note)
    console.print(f"[green]{word}[/] {out}/{runner.REPORT}, {runner.RESULTS}, raw.jsonl", soft_wrap=True)


def _show_plan(matrix: Matrix, every: list[Any], todo: list[Any], json_file: str | None) -> None:
    rows = []
    for name in dict.fromkeys(job.setup for job in every):
        own, left = ([job for job in jobs if job.setup == name] for jobs in (every, todo))
        seeds, splits = (sorted({getattr(job, what) for job in own}) for what in ("seed", "split"))
        rows.append({"setup": name, "seeds": seeds, "splits": len(splits), "runs": len(own), "to do": len(left)})
    write(json_file, rows)
    table = Table("setup", "seeds", "splits", "runs", "to do", title=f"{matrix.experiment} (dry run)")
    for row in rows:
        table.add_row(*(str(each).strip("[]") for each in row.values()))
    console_of(json_file).print(table, f"{len(todo)} of {len(every)} runs to do")


def _write_slurm(path: Path, matrix: Matrix, out: Path, parts: int, trust: Collection[str]) -> None:
    from benchmarks.runner import runner
    from cost.files import write_text

    runner.prepare(matrix, out)
    write_text(path, runner.slurm(out / runner.MATRIX, out, parts, trust))
    console_of(None).print(f"[green]saved[/] {path}    start it: sbatch {path}")
