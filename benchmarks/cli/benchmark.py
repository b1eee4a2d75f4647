"""The subcommands of `moe-benchmark`."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from benchmarks.cli.terminal import Json, bar, console, write

benchmark_app = typer.Typer(no_args_is_help=True, add_completion=False, help="Experiments and benchmarks.")


@benchmark_app.command("demo")
def _demo(
    out: Path = Path("runs/demo"),
    costs: Annotated[str, typer.Option(help="reference or machine")] = "reference",
    jobs: Annotated[int, typer.Option(help="Processes side by side.")] = 2,
    timesteps: Annotated[int | None, typer.Option(help="Of each training, instead of the tuned number.")] = None,
) -> None:
    """Train PPO on MoERouting-v0 for four cost weights; compare it with all baselines and the bound on test data."""
    _compare([0.05, 0.1, 0.2, 0.4], [0], "fashion-mnist", costs, jobs, timesteps, out)


@benchmark_app.command("routing")
def _routing(
    cost_weights: Annotated[str, typer.Option(help="Separated by commas.")] = "0.2,0.4",
    seeds: Annotated[int, typer.Option(min=1, help="Trainings for each cost weight.")] = 5,
    bundle: str = "fashion-mnist",
    costs: Annotated[str, typer.Option(help="reference or machine")] = "reference",
    action: Annotated[str, typer.Option(help="Of PPO: expert, subset or top-m.")] = "expert",
    jobs: Annotated[int, typer.Option(help="Processes side by side.")] = 2,
    timesteps: Annotated[int | None, typer.Option(help="Of each training, instead of the tuned number.")] = None,
    out: Path = Path("runs/routing"),
) -> None:
    """The same with several training seeds and intervals over seeds and episodes."""
    weights = [float(part) for part in cost_weights.split(",")]
    _compare(weights, list(range(seeds)), bundle, costs, jobs, timesteps, out, action)


@benchmark_app.command("live")
def _live(
    cost_weight: float = 0.2,
    seeds: Annotated[int, typer.Option(min=1, help="Trainings.")] = 5,
    bundle: str = "fashion-mnist",
    jobs: Annotated[int, typer.Option(help="Processes side by side, for the training.")] = 2,
    timesteps: Annotated[int | None, typer.Option(help="Of each training, instead of the tuned number.")] = None,
    out: Path = Path("runs/live"),
) -> None:
    """What PPO trained on this machine's profile, and all baselines, are worth when the experts are run and timed."""
    from benchmarks.experiments import live

    with bar() as add:
        result = live.run(
            cost_weight, list(range(seeds)), out, bundle=bundle, jobs=jobs, timesteps=timesteps, add_task=add
        )
    for renderable in live.tables(result):
        console.print(renderable)
    console.print(f"[green]saved[/] {out}/live.json, {out}/live.png")


@benchmark_app.command("cost")
def _cost(
    data: Annotated[str, typer.Option(help="fashion-mnist or digits")] = "fashion-mnist",
    epochs: Annotated[int, typer.Option(min=1)] = 20,
    pairs: Annotated[int, typer.Option(min=0, help="Epochs with the monitor, each beside one without.")] = 100,
    batch_size: Annotated[int, typer.Option(min=1)] = 256,
    logs: Annotated[Path | None, typer.Option(help="Report this folder of a Monitor; train nothing.")] = None,
    out: Path = Path("runs/cost"),
) -> None:
    """Report what a training costs by epoch, against accuracy, normalised; and what the monitor costs it."""
    from benchmarks.experiments import cost, cost_report
    from benchmarks.results import tables as report

    if logs is None:
        with bar() as add:
            result = cost.run(data, epochs, pairs, out, batch_size=batch_size, add_task=add)
    else:
        result = cost.write(logs, out, {})
    for title, frame in cost_report.frames(result).items():
        table = report.plain_table(title, *map(str, frame.columns))
        for row in frame.itertuples(index=False):
            table.add_row(*(f"{cell:.3g}" if isinstance(cell, float) else str(cell) for cell in row))
        console.print(table)
    for alert in result["alerts"]:
        console.print(f"[yellow]alert:[/] {alert}")
    console.print(f"[green]saved[/] {out}/report.md, results.json and pictures")


@benchmark_app.command("learners")
def _learners(
    seeds: Annotated[int, typer.Option(min=2)] = 10,
    environments: Annotated[str, typer.Option(help="Separated by commas; empty: speed only.")] = ",".join(
        ("CartPole-v1", "Acrobot-v1", "moe_envs:MoERouting-v0")
    ),
    jobs: Annotated[int, typer.Option(help="Processes side by side.")] = 2,
    out: Path = Path("runs/learners"),
) -> None:
    """Our PPO beside SB3's with the same settings: returns of final policies, CPU seconds, steps per second."""
    from benchmarks.experiments import learners

    with bar() as add:
        result = learners.run(seeds, out, jobs, [name for name in environments.split(",") if name], add)
    table = Table("environment", "seeds", "own", "SB3", "difference, 95 %", "CPU s", title="returns of final policies")
    for row in result["learning"]:
        low, high = row["ci95"]
        difference = f"{row['difference']:+.4g} ({low:+.4g} .. {high:+.4g})"
        seconds = f"{row['own_seconds']:.1f}, {row['sb3_seconds']:.1f}"
        table.add_row(row["env"], str(row["seeds"]), f"{row['own']:.4f}", f"{row['sb3']:.4f}", difference, seconds)
    rates = Table("environment", "rows", "minibatch", "own", "SB3", "ratio", title="steps/s of CPU time, medians")
    for row in result["speed"]:
        numbers = f"{row['own']:,.0f}", f"{row['sb3']:,.0f}", f"{row['ratio']:.2f}"
        rates.add_row(row["env"], str(row["rows"]), str(row["batch_size"]), *numbers)
    console.print(table, rates)
    console.print(f"[green]saved[/] {out}/raw.jsonl, {out}/results.json")


@benchmark_app.command("race")
def _race(
    seeds: Annotated[int, typer.Option(min=2)] = 5,
    jobs: Annotated[int, typer.Option(help="Processes side by side.")] = 2,
    out: Path = Path("runs/race"),
) -> None:
    """CPU seconds until PPO, ours and SB3's, beats the best baseline of MoERouting-v0 on validation."""
    import pandas as pd

    from benchmarks.experiments import race

    with bar() as add:
        result = race.run(seeds, out, jobs, add(f"{2 * seeds} trainings"))
    table = Table("backend", "seeds", "that beat it", "CPU s, median", "all", "steps, median")
    for backend, group in pd.DataFrame(result["rows"]).groupby("backend"):
        beaten = group.dropna().sort_values("seconds")
        every = ", ".join(f"{value:.1f}" for value in beaten["seconds"])
        medians = f"{beaten['seconds'].median():.1f}", every, f"{beaten['steps'].median():,.0f}"
        table.add_row(str(backend), str(len(group)), str(len(beaten)), *medians)
    console.print(f"to beat: {result['baseline']}, {result['target']:.4f} on validation", table)
    console.print(f"[green]saved[/] {out}/race.json")


@benchmark_app.command("jax")
def _jax(json_file: Json = None) -> None:
    """Our PPO beside one written in JAX as a single jitted training, on MoERouting-v0; needs the extra bench."""

    if find_spec("jax") is None:
        raise ValueError("jax is not installed: pip install 'moe-envs[bench]'")
    from benchmarks.speed import jax_ppo

    with bar() as add:
        rows = jax_ppo.compare(add("ours and JAX by turns"))
    write(json_file, {"rows": rows, **provenance()})
    table = Table("rows", "minibatch", "own", "JAX", "ratio", title="steps/s of CPU time, medians, one thread")
    for row in rows:
        numbers = f"{row['own']:,.0f}", f"{row['jax']:,.0f}", f"{row['ratio']:.2f}"
        table.add_row(str(row["rows"]), str(row["batch_size"]), *numbers)
    console.print(table)


@benchmark_app.command("hybrid")
def _hybrid(
    data: Annotated[str, typer.Option(help="digits or fashion-mnist")] = "fashion-mnist",
    seeds: Annotated[int, typer.Option(min=2)] = 3,
    epochs: Annotated[int, typer.Option(min=2)] = 8,
    alpha: Annotated[float, typer.Option(help="Weight of the policy gradient.")] = 1.0,
    cost_weight: float = 0.2,
    straight_through: Annotated[
        bool, typer.Option("--straight-through", help="Let CE's gradient reach the gate.")
    ] = False,
    out: Path = Path("runs/hybrid"),
) -> None:
    """Train experts by cross-entropy and the gate by policy gradient, beside a gate that learns by cross-entropy."""
    from benchmarks.experiments import hybrid
    from benchmarks.results import tables as report
    from experts.hybrid import HybridSettings

    settings = HybridSettings(alpha=alpha, cost_weight=cost_weight, straight_through=straight_through, epochs=epochs)
    with bar() as add:
        result = hybrid.run(data, seeds, settings, out, add(f"{seeds} seeds of both gates"))
    table = report.plain_table(
        f"{data}, test, cost weight {cost_weight:g}", "gate", "return", "95 %", "accuracy", "cost", "experts a batch"
    )
    for row in hybrid.summary(result).to_dict("records"):
        interval = f"{row['low']:.4f} .. {row['high']:.4f}"
        table.add_row(
            str(row["gate"]),
            f"{row['return']:.4f}",
            interval,
            f"{row['accuracy']:.4f}",
            f"{row['cost']:.4f}",
            f"{row['experts']:.2f}",
        )
    console.print(table)
    for row in result["trends"]:
        console.print(f"seed {row['seed']}: reward {row['reward']:+.4f} an epoch, cost {row['cost']:+.4f} an epoch")
    console.print(f"[green]saved[/] {out}/hybrid.json, {out}/hybrid.png")


@benchmark_app.command("deploy")
def _deploy(
    run_dir: Annotated[Path, typer.Argument(help="A run folder of moe-train.")],
    episodes: Annotated[int, typer.Option(min=1)] = 500,
    json_file: Json = None,
) -> None:
    """Put a learned policy into the real model as its router: accuracy, cost and wall time beside the top-2 gate's."""
    from benchmarks.experiments import deploy

    result = deploy.run(run_dir, episodes)
    write(json_file, result | provenance())
    table = Table("", "accuracy", "cost", "return", title=f"{episodes} test batches; cost 1 is the top-2 gate's")
    for row in result["rows"]:
        table.add_row(row["case"], *(f"{row[name]:.4f}" for name in ("accuracy", "cost", "return")))
    times = Table("batch", "top-2, ms", "routed, ms", "of that the router, ms", title="wall time, medians, one thread")
    for row in result["times"]:
        times.add_row(str(row["batch_size"]), *(f"{row[case] * 1e3:.3f}" for case in ("top-2", "routed", "router")))
    console.print(table, times)
    console.print(f"decisions equal to the environment's: {result['decisions_equal']:.4%}")


@benchmark_app.command("speed")
def _speed(json_file: Json = None) -> None:
    """CPU time, one thread: MoERouting-v0 beside CartPole-v1, trainings beside torch's, plans beside decompression."""
    from benchmarks.speed.environments import measure, measure_plans, measure_trainings

    rows, trainings, plans = measure(), measure_trainings(), measure_plans()
    write(json_file, {"routing": rows, "trainings": trainings, "plans": plans})
    table = Table("rows", "CartPole-v1", "MoERouting-v0", "ratio", "floor", title="steps/s of CPU time, medians")
    for row in rows:
        floor = "-" if row["floor"] is None else f"{row['floor']:.2f}"
        table.add_row(
            str(row["rows"]), f"{row['cartpole']:,.0f}", f"{row['routing']:,.0f}", f"{row['ratio']:.2f}", floor
        )
    title = "optimiser steps/s of trainings on the digits"
    other = Table("side by side", "torch, one by one", "batched", "ratio", "MoEMetaOpt-v0", "slower by", title=title)
    for row in trainings:
        numbers = f"{row['torch']:,.0f}", f"{row['batched']:,.0f}", f"{row['ratio']:.1f}", f"{row['env']:,.0f}"
        other.add_row(str(row["trainings"]), *numbers, f"{row['env_overhead']:.0%}")
    title = "evaluation of a plan of fashion-mnist-conv on 5,000 images"
    third = Table("plans", "from caches", "decompress and run", "ratio", "losses differ by", title=title)
    for row in plans:
        both = f"{row['cached_s']:.3f} s", f"{row['decompressed_s']:.3f} s"
        third.add_row(row["plans"], *both, f"{row['ratio']:.0f}", f"{row['difference']:.0e}")
    console.print(table, other, third)


def _compare(
    weights: list[float], seeds: list[int], bundle: str, costs: str, jobs: int, timesteps: int | None, out: Path,
    action: str = "expert",
) -> None:  # fmt: skip
    from benchmarks.experiments import routing

    with bar() as add:
        result = routing.run(
            weights, seeds, out, bundle=bundle, costs=costs, action=action, jobs=jobs, timesteps=timesteps, add_task=add
        )
    for renderable in routing.tables(result):
        console.print(renderable)
    console.print(f"[green]saved[/] {out}/results.json, {out}/pareto.png    curves: tensorboard --logdir {out}")


@benchmark_app.command("layer")
def _layer(
    device: Annotated[str, typer.Option(help="cpu (CPU time, one thread) or cuda")] = "cpu", json_file: Json = None
) -> None:
    """Our MoE layer beside Hugging Face's Mixtral block, and beside its bare matrix products."""
    if device not in ("cpu", "cuda"):
        raise ValueError(f"--device {device}: cpu or cuda")
    if find_spec("transformers") is None:
        raise ValueError("transformers is not installed: pip install 'moe-envs[hf]'")
    from benchmarks.speed import layer as moe_layer

    with bar() as add:
        result = moe_layer.measure(device, add)
    write(json_file, result | provenance())
    columns = "tokens", "block", "ours", "our bf16", "products", "block / ours", "block / our bf16", "ours / products"
    table = Table(*columns, title=f"forward, ms on {device}, medians; 256 wide, 8 experts of 1,024, top-2")
    both = Table("tokens", "block", "ours", "products", "block / ours", "ours / products", title="with backward")
    for row in result["rows"]:
        times = (f"{row[f'{name}_ms']:.2f}" for name in ("block", "ours", "ours_bf16", "products"))
        ratios = (f"{row[name]:.2f}" for name in ("forward_ratio", "bf16_ratio", "over_products"))
        table.add_row(f"{row['tokens']:,}", *times, *ratios)
        times = (f"{row[f'{name}_backward_ms']:.2f}" for name in ("block", "ours", "products"))
        both.add_row(
            f"{row['tokens']:,}", *times, f"{row['backward_ratio']:.2f}", f"{row['backward_over_products']:.2f}"
        )
    console.print(table, both, f"largest difference of outputs {max(row['difference'] for row in result['rows']):.1e}")


@benchmark_app.command("cooperation")
def _cooperation(
    data: Annotated[str, typer.Option(help="digits or fashion-mnist")] = "digits",
    seeds: Annotated[int, typer.Option(min=2, help="Trainings of each network.")] = 5,
    epochs: Annotated[int | None, typer.Option(min=1, help="Instead of 30 on the digits, 8 on Fashion-MNIST.")] = None,
    only: Annotated[list[str] | None, typer.Option(help="Names of networks; all by default.")] = None,
    jobs: Annotated[int, typer.Option(help="Processes side by side.")] = 2,
    out: Annotated[Path | None, typer.Option(help="Default: runs/cooperation-DATA.")] = None,
) -> None:
    """Networks with and without an expert graph, under every router and regulariser: accuracy, diversity, time."""
    from benchmarks.experiments import cooperation

    if data not in cooperation.EPOCHS:
        raise ValueError(f"--data {data}: digits or fashion-mnist")
    if unknown := set(only or []) - set(cooperation.setups()):
        raise ValueError(f"--only {', '.join(sorted(unknown))}: there are {'; '.join(cooperation.setups())}")
    out = out or Path("runs") / f"cooperation-{data}"
    with bar() as add:
        result = cooperation.run(data, seeds, epochs, only or [], jobs, out, add)
    columns = "network", "accuracy", "points more than beside", "95 %", "utilisation", "diversity", "time"
    table = Table(*columns, title=f"{data}, {seeds} seeds")
    for row in result["rows"]:
        points, interval = "", ""
        if "points" in row:
            points, interval = f"{row['points']:+.2f}", "{:+.2f} .. {:+.2f}".format(*row["points_ci95"])
        figures = f"{min(row['utilisation']):.1%}", f"{row['diversity']:.2f}", f"{row['time']:.2f}"
        table.add_row(row["name"], f"{row['accuracy']:.2%}", points, interval, *figures)
    console.print(table)
    console.print(f"[green]saved[/] {out}/report.md, results.json, runs.csv, pictures, best.safetensors, networks/")
