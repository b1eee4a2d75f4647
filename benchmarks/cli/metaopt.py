"""The subcommands of `moe-benchmark` about MoEMetaOpt-v0."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from benchmarks.cli.benchmark import benchmark_app
from benchmarks.cli.terminal import Json, bar, console, say_reused, write


@benchmark_app.command("metaopt")
def _metaopt(
    task: Annotated[str, typer.Option(help="digits, fashion-mnist, fashion-mnist-14 or breast-cancer")] = "digits",
    seeds: Annotated[int, typer.Option(min=2, help="Trainings of PPO.")] = 5,
    contexts: Annotated[int, typer.Option(min=2, help="Held-out trainings that each policy is judged by.")] = 256,
    timesteps: Annotated[int | None, typer.Option(min=1, help="Of PPO, instead of the tuned number.")] = None,
    by_group: Annotated[bool, typer.Option(help="Search rates and decays of gate and experts apart as well.")] = True,
    jobs: Annotated[int, typer.Option(help="Processes side by side.")] = 2,
    out: Path = Path("runs/metaopt"),
) -> None:
    """Decisions until the target accuracy: PPO beside schedules, from random and from tuned learning rates."""
    from benchmarks.experiments import metaopt
    from benchmarks.results import tables as report

    with bar() as add:
        result = metaopt.run(task, seeds, contexts, timesteps, by_group, jobs, out, add)
    for start in dict.fromkeys(row["start"] for row in result["rows"]):
        title = f"{task}, from the {start}, {contexts} test contexts"
        table = report.plain_table(title, "policy", "steps", "95 %", "arrive", "PPO's less, 95 %")
        for row in sorted(result["rows"], key=lambda row: row["steps"]):
            if row["start"] == start:
                low, high = row["ci95"]
                less = ""
                if "share" in row:
                    bounds = [bound / row["steps"] for bound in row["ppo_less_ci95"]]
                    less = f"{row['share']:+.0%} ({bounds[0]:+.0%} .. {bounds[1]:+.0%})"
                figures = f"{row['steps']:.2f}", f"{low:.2f} .. {high:.2f}", f"{row['arrived']:.0%}", less
                style = report.STYLES["learned" if row["policy"] == "PPO" else "baseline"]
                table.add_row(row["policy"], *figures, style=style)
        console.print(table)
    say_reused(result)
    for start, row in result["searched"].items():
        console.print(
            f"from the {start}, {row['contexts']} contexts: PPO {row['ppo']:.2f}, searched with the future known "
            f"{row['searched']:.2f}"
        )
    console.print(f"[green]saved[/] {out}/results.json, trainings.csv, timelines.csv, steps.png, timelines.png")


@benchmark_app.command("transfer")
def _transfer(
    seeds: Annotated[int, typer.Option(min=2, help="Trainings of PPO on each mixture.")] = 3,
    contexts: Annotated[int, typer.Option(min=16, help="Held-out trainings that each policy is judged by.")] = 256,
    timesteps: Annotated[int | None, typer.Option(min=1, help="Of PPO, instead of the tuned number.")] = None,
    jobs: Annotated[int, typer.Option(help="Processes side by side.")] = 2,
    out: Path = Path("runs/transfer"),
) -> None:
    """A policy of MoEMetaOpt-v0 on unseen data, on wider models and under other optimisers, beside schedules."""
    if find_spec("pytorch_optimizer") is None:
        raise ValueError("pytorch_optimizer is not installed: pip install 'moe-envs[bench]'")
    from benchmarks.experiments import transfer

    with bar() as add:
        result = transfer.run(seeds, contexts, timesteps, jobs, out, add)
    title = "decisions until the target; trained elsewhere, judged here"
    table = Table("", "judged on", "trained on", "start", "PPO", "arrive", "best schedule", "arrive", title=title)
    cases: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    for row in result["rows"]:
        cases.setdefault(tuple(row[key] for key in ("kind", "judged_on", "trained_on", "start")), []).append(row)
    for case, rows in cases.items():
        learned = next(row for row in rows if row["policy"] == "PPO")
        best = min((row for row in rows if row is not learned), key=lambda row: row["steps"])
        low, high = best["ppo_less_ci95"]
        ours = f"{learned['steps']:.2f}", f"{learned['arrived']:.0%}"
        theirs = f"{best['policy']} {best['steps']:.2f} ({low:+.1f} .. {high:+.1f})", f"{best['arrived']:.0%}"
        table.add_row(*case, *ours, *theirs)
    say_reused(result)
    console.print(table, "in brackets: PPO's decisions less the schedule's, 95 %")
    console.print(f"[green]saved[/] {out}/results.json, trainings.csv, policies/")


@benchmark_app.command("loop")
def _loop(
    policies: Annotated[list[Path], typer.Argument(exists=True, help="Folders of PPO trained on MoEMetaOpt-v0.")],
    seeds: Annotated[int, typer.Option(min=2)] = 10,
    pairs: Annotated[int, typer.Option(min=2, help="Windows with a decision and without, for its overhead.")] = 100,
    jobs: Annotated[int, typer.Option(help="Processes side by side.")] = 2,
    out: Path = Path("runs/loop"),
) -> None:
    """Learned policies drive a plain torch training on all of Fashion-MNIST, beside torch's schedulers."""
    from benchmarks.experiments import torch_loop

    with bar() as add:
        result = torch_loop.run(policies, seeds, pairs, jobs, out, add)
    for start in dict.fromkeys(row["start"] for row in result["rows"]):
        columns = ("", "epochs", "CPU s", "decisions", "arrive", "PPO's less, 95 %")
        table = Table(*columns, title=f"from the {start}, {seeds} seeds")
        for row in sorted(result["rows"], key=lambda row: row["steps"]):
            if row["start"] == start:
                less = ""
                if "share" in row:
                    low, high = (bound / row["steps"] for bound in row["ppo_less_ci95"])
                    less = f"{row['share']:+.0%} ({low:+.0%} .. {high:+.0%})"
                figures = (
                    f"{row['epochs']:.2f}",
                    f"{row['seconds']:.1f}",
                    f"{row['steps']:.2f}",
                    f"{row['arrived']:.0%}",
                )
                table.add_row(row["policy"], *figures, less)
        console.print(table)
    found = result["overhead"]
    low, high = found["ci95"]
    console.print(f"a decision makes its window slower by {found['overhead']:+.2%} ({low:+.2%} .. {high:+.2%})")
    console.print(f"[green]saved[/] {out}/results.json, trainings.csv, timelines.csv, curves.png")


@benchmark_app.command("dacbench")
def _dacbench(
    python: Annotated[Path, typer.Argument(exists=True, help="An interpreter with dacbench and torchvision.")],
    json_file: Json = None,
) -> None:
    """Our trainings beside DACBench's SGDEnv, which runs in an environment of its own."""
    from benchmarks.speed import dacbench as sgd_env

    with bar() as add:
        result = sgd_env.compare(str(python), add("ours and DACBench by turns"))
    write(json_file, result | provenance())
    title = "optimiser steps/s of CPU time, medians, one thread"
    table = Table(
        "steps between validations", "DACBench gets", "SGDEnv", "ours", "64 of ours", "ratio", "of 64", title=title
    )
    for row in result["rows"]:
        numbers = f"{row['dacbench']:,.0f}", f"{row['ours_single']:,.0f}", f"{row['ours']:,.0f}"
        ratios = f"{row['ratio_single']:.1f}", f"{row['ratio']:.1f}"
        table.add_row(str(row["steps"]), "images" if row["images"] else "tensors", *numbers, *ratios)
    console.print(table)
    first, second = result["weights_of_one_seed"]
    console.print(f"norm of SGDEnv's last weights, twice from seed 0: {first:.6f}, {second:.6f}")
