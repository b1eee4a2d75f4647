"""The commands `moe-train`, `moe-eval`, `moe-compare`, `moe-profile`, `moe-bundle` and `moe-benchmark`."""

from __future__ import annotations

import difflib
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

console = Console()
errors = Console(stderr=True)

EnvKwargs = Annotated[list[str], typer.Option("--env-kwarg", "-k", help="name=value, passed to gymnasium.make.")]
Json = Annotated[Path | None, typer.Option("--json", help="Write the result to this file as JSON.")]
benchmark_app = typer.Typer(no_args_is_help=True, add_completion=False, help="Experiments and benchmarks.")
bundle_app = typer.Typer(no_args_is_help=True, add_completion=False, help="Bundles: list, check, rebuild.")


def train() -> None:
    """Entry point of `moe-train`."""
    _run(_train)


def evaluate() -> None:
    """Entry point of `moe-eval`."""
    _run(_evaluate)


def profile() -> None:
    """Entry point of `moe-profile`."""
    from benchmarks.profiling import app

    _guarded(app)


def compare() -> None:
    """Entry point of `moe-compare`."""
    from benchmarks.compare import app

    _guarded(app)


def bundle() -> None:
    """Entry point of `moe-bundle`."""
    _guarded(bundle_app)


def benchmark() -> None:
    """Entry point of `moe-benchmark`."""
    _guarded(benchmark_app)


def _train(
    context: typer.Context,
    env: Annotated[str, typer.Option(help="Environment id, with or without 'moe_envs:'.")] = "MoERouting-v0",
    algo: Annotated[
        str,
        typer.Option(help="own: ppo, reinforce; sb3: ppo, a2c, dqn, qrdqn, ppo_lstm, ppo_mask (with action masks)."),
    ] = "ppo",
    backend: Annotated[str, typer.Option(help="own, several times faster, or sb3, Stable-Baselines3.")] = "own",
    seed: int = 0,
    timesteps: Annotated[int | None, typer.Option(min=1, help="Instead of the tuned number.")] = None,
    out: Annotated[Path | None, typer.Option(help="Run folder; default runs/ENV-ALGO-seedSEED.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Delete the run that is there first.")] = False,
    resume: Annotated[Path | None, typer.Option(help="Go on with this interrupted run of backend own.")] = None,
    tune: Annotated[int, typer.Option(min=0, help="Search settings on validation by so many trainings first.")] = 0,
    env_kwarg: EnvKwargs = [],  # noqa: B006
    json_file: Json = None,
) -> None:
    """Train an agent on the split rl_train, keep the weights best on validation, save a run folder.

    Example: moe-train --env MoERouting-v0 --algo ppo --seed 0 -k cost_weight=0.4
    """
    from benchmarks import runs

    env_id, env_kwargs = _environment(env), _parse(env_kwarg)
    name = algo if backend == "sb3" else f"{backend}-{algo}"
    folder = resume or out or Path("runs") / f"{env_id.split(':')[-1]}-{name}-seed{seed}"
    overrides: dict[str, Any] = {} if timesteps is None else {"total_timesteps": timesteps}
    if resume:
        _only(context, "resume", "json_file")
    else:
        runs.require_free(folder, env_kwargs, overwrite)
    with _bar() as add:
        if tune:
            report = add(f"{tune} trials of settings")
            arguments = {"env_id": env_id, "algo": algo, "backend": backend, "env_kwargs": env_kwargs, "seed": seed}
            overrides |= _search(tune, folder, **arguments, timesteps=timesteps, report=report)
        report = add(f"resuming {folder}" if resume else f"training {algo} on {env_id}")
        try:
            if resume:
                runs.resume(folder, report)
            else:
                runs.train(env_id, algo, seed, folder, env_kwargs, overrides, report, backend, overwrite)
        except KeyboardInterrupt:
            saved = resume or backend == "own"
            hint = f"go on: moe-train --resume {folder}" if saved else "nothing was saved"
            errors.print(f"stopped; {hint}", soft_wrap=True)
            raise typer.Exit(130) from None
    result = runs.load_config(folder)
    _write(json_file, result)
    console.print(f"[green]saved[/] {folder}    evaluate: moe-eval {folder}    curves: tensorboard --logdir {folder}")


def _only(context: typer.Context, *names: str) -> None:
    """Refuse options that were given beside these, which they would have no effect on."""
    for name in context.params:
        source = context.get_parameter_source(name)
        if name not in names and source is not None and source.name == "COMMANDLINE":
            raise ValueError(f"--{name.replace('_', '-')} beside --{names[0]}: the run goes on as it began")


def _search(trials: int, folder: Path, **arguments: Any) -> dict[str, Any]:
    from benchmarks.tune import search

    try:
        return search(trials=trials, folder=folder, **arguments)
    except KeyboardInterrupt:
        errors.print(f"stopped; the same command goes on with the trials in {folder}", soft_wrap=True)
        raise typer.Exit(130) from None


def _evaluate(
    run_dir: Annotated[Path, typer.Argument(help="A run folder of moe-train.")],
    split: Annotated[str, typer.Option(help="rl_train, validation or test.")] = "test",
    episodes: Annotated[int, typer.Option(min=2)] = 1000,
    seed: int = 0,
    yardsticks: Annotated[bool, typer.Option("--yardsticks", help="Tune and show all yardsticks beside it.")] = False,
    json_file: Json = None,
) -> None:
    """Evaluate a trained policy: return, quality and cost with 95 % intervals, on inputs it never saw.

    Example: moe-eval runs/MoERouting-v0-ppo-seed0 --split test --json result.json
    """
    from agents.evaluate import evaluate as play
    from benchmarks import report, runs

    model, config = runs.load(run_dir)
    policies: dict[str, Any] = {config["algo"]: model}
    if yardsticks:
        from agents.yardsticks.routing import yardsticks as tune

        with console.status("tuning the yardsticks on validation"):
            policies |= tune(config["env"], **config["env_kwargs"])
    arguments = {**config["env_kwargs"], "cost_weight": config["cost_weight"], "split": split}
    rows = []
    for name, policy in policies.items():
        frame = play(policy, config["env"], episodes, seed, **arguments)
        kind = getattr(policy, "kind", "learned")
        rows.append(report.row(frame, config["env"], name, kind, seed=config["seed"], **arguments))
    _write(json_file, {"rows": rows, "run": str(run_dir), "episodes": episodes, **runs.provenance()})
    console.print(report.table(rows, f"{config['env']}, {split}, {episodes} episodes"))


@bundle_app.command("list")
def _list_bundles() -> None:
    """All bundles, shipped and your own, with the accuracy of their top-2 gate."""
    from experts import bundle as bundles
    from experts import zoo
    from experts.bundle import BundleError

    table = Table("bundle", "experts", "top-2 accuracy on test", "folder")
    for name in zoo.names():
        try:
            loaded = bundles.load(name)
        except BundleError as error:
            table.add_row(name, "-", "-", Text(str(error), "red"))
            continue
        table.add_row(
            name, str(loaded.num_experts), f"{loaded.metadata['accuracy']['test/top-2']:.4f}", str(loaded.path)
        )
    console.print(table)


@bundle_app.command("check")
def _check_bundle(name: str) -> None:
    """Verify every byte of a bundle."""
    from experts import bundle as bundles

    console.print(f"[green]whole[/] {bundles.load(name).path}")


@bundle_app.command("rebuild")
def _rebuild_bundles(
    names: Annotated[list[str], typer.Argument(help="digits, fashion-mnist")],
    folder: Annotated[Path | None, typer.Option(help="Default: the package's own assets.")] = None,
) -> None:
    """Train the reference models from their data, profile them on this machine and replace the shipped bundles."""
    from benchmarks.references import rebuild
    from experts import zoo

    for name in names:
        built = rebuild(name, folder or zoo.ASSETS)
        console.print(f"[green]built[/] {built.path}  accuracy {json.dumps(built.metadata['accuracy'])}")


@bundle_app.command("tasks")
def _tasks() -> None:
    """Make the shipped tasks of MoEMetaOpt-v0 from their data, and profile their trainings on this machine."""
    from experts import tasks
    from moe_envs import profiles

    for path in tasks.ship():
        console.print(f"[green]made[/] {path}")
    for name in tasks.SHIPPED:
        profiles.measure_training(tasks.load(name), progress=True).save(profiles.task_profile(name))
        console.print(f"[green]profiled[/] {profiles.task_profile(name)}")


@benchmark_app.command("demo")
def _demo(
    out: Path = Path("runs/demo"),
    costs: Annotated[str, typer.Option(help="reference or machine")] = "reference",
    jobs: Annotated[int, typer.Option(help="Processes side by side.")] = 2,
    timesteps: Annotated[int | None, typer.Option(help="Of each training, instead of the tuned number.")] = None,
) -> None:
    """Train PPO on MoERouting-v0 for four cost weights; compare it with all yardsticks and the bound on test data."""
    _compare([0.05, 0.1, 0.2, 0.4], [0], "fashion-mnist", costs, jobs, timesteps, out)


@benchmark_app.command("routing")
def _routing(
    cost_weights: Annotated[str, typer.Option(help="Separated by commas.")] = "0.2,0.4",
    seeds: Annotated[int, typer.Option(min=1, help="Trainings for each cost weight.")] = 5,
    bundle: str = "fashion-mnist",
    costs: Annotated[str, typer.Option(help="reference or machine")] = "reference",
    jobs: Annotated[int, typer.Option(help="Processes side by side.")] = 2,
    timesteps: Annotated[int | None, typer.Option(help="Of each training, instead of the tuned number.")] = None,
    out: Path = Path("runs/routing"),
) -> None:
    """The same with several training seeds and intervals over seeds and episodes."""
    _compare([float(part) for part in cost_weights.split(",")], list(range(seeds)), bundle, costs, jobs, timesteps, out)


@benchmark_app.command("live")
def _live(
    cost_weight: float = 0.2,
    seeds: Annotated[int, typer.Option(min=1, help="Trainings.")] = 5,
    bundle: str = "fashion-mnist",
    jobs: Annotated[int, typer.Option(help="Processes side by side, for the training.")] = 2,
    timesteps: Annotated[int | None, typer.Option(help="Of each training, instead of the tuned number.")] = None,
    out: Path = Path("runs/live"),
) -> None:
    """What PPO trained on this machine's profile, and all yardsticks, are worth when the experts are run and timed."""
    from benchmarks.experiments import live

    with _bar() as add:
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
    from benchmarks import report
    from benchmarks.experiments import cost, cost_report

    if logs is None:
        with _bar() as add:
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

    with _bar() as add:
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


@benchmark_app.command("metaopt")
def _metaopt(
    task: Annotated[str, typer.Option(help="digits, fashion-mnist or fashion-mnist-14")] = "digits",
    seeds: Annotated[int, typer.Option(min=2, help="Trainings of PPO.")] = 5,
    contexts: Annotated[int, typer.Option(min=2, help="Held-out trainings that each policy is judged by.")] = 256,
    timesteps: Annotated[int | None, typer.Option(min=1, help="Of PPO, instead of the tuned number.")] = None,
    jobs: Annotated[int, typer.Option(help="Processes side by side.")] = 2,
    out: Path = Path("runs/metaopt"),
) -> None:
    """Decisions until the target accuracy: PPO beside schedules, from random and from tuned learning rates."""
    from benchmarks import report
    from benchmarks.experiments import metaopt

    with _bar() as add:
        result = metaopt.run(task, seeds, contexts, timesteps, jobs, out, add)
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
                style = report.STYLES["learned" if row["policy"] == "PPO" else "yardstick"]
                table.add_row(row["policy"], *figures, style=style)
        console.print(table)
    console.print(f"[green]saved[/] {out}/results.json, {out}/trainings.csv, {out}/steps.png")


@benchmark_app.command("race")
def _race(
    seeds: Annotated[int, typer.Option(min=2)] = 5,
    jobs: Annotated[int, typer.Option(help="Processes side by side.")] = 2,
    out: Path = Path("runs/race"),
) -> None:
    """CPU seconds until PPO, ours and SB3's, beats the best yardstick of MoERouting-v0 on validation."""
    import pandas as pd

    from benchmarks.experiments import race

    with _bar() as add:
        result = race.run(seeds, out, jobs, add(f"{2 * seeds} trainings"))
    table = Table("backend", "seeds", "that beat it", "CPU s, median", "all", "steps, median")
    for backend, group in pd.DataFrame(result["rows"]).groupby("backend"):
        beaten = group.dropna().sort_values("seconds")
        every = ", ".join(f"{value:.1f}" for value in beaten["seconds"])
        medians = f"{beaten['seconds'].median():.1f}", every, f"{beaten['steps'].median():,.0f}"
        table.add_row(str(backend), str(len(group)), str(len(beaten)), *medians)
    console.print(f"to beat: {result['yardstick']}, {result['target']:.4f} on validation", table)
    console.print(f"[green]saved[/] {out}/race.json")


@benchmark_app.command("jax")
def _jax(json_file: Json = None) -> None:
    """Our PPO beside one written in JAX as a single jitted training, on MoERouting-v0; needs the extra bench."""
    from benchmarks import runs

    if find_spec("jax") is None:
        raise ValueError("jax is not installed: pip install 'moe-envs[bench]'")
    from benchmarks.experiments import jax_ppo

    with _bar() as add:
        rows = jax_ppo.compare(add("ours and JAX by turns"))
    _write(json_file, {"rows": rows, **runs.provenance()})
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
    from benchmarks import report
    from benchmarks.experiments import hybrid
    from experts.hybrid import HybridSettings

    settings = HybridSettings(alpha=alpha, cost_weight=cost_weight, straight_through=straight_through, epochs=epochs)
    with _bar() as add:
        result = hybrid.run(data, seeds, settings, out, add(f"{seeds} seeds of both gates"))
    table = report.plain_table(
        f"{data}, test, cost weight {cost_weight:g}", "gate", "return", "95 %", "accuracy", "cost"
    )
    for row in hybrid.summary(result).to_dict("records"):
        interval = f"{row['low']:.4f} .. {row['high']:.4f}"
        table.add_row(
            str(row["gate"]), f"{row['return']:.4f}", interval, f"{row['accuracy']:.4f}", f"{row['cost']:.4f}"
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
    from benchmarks import runs
    from benchmarks.experiments import deploy

    result = deploy.run(run_dir, episodes)
    _write(json_file, result | runs.provenance())
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
    """Steps per second of CPU time beside CartPole's, in one run, on one thread."""
    from benchmarks.speed import measure

    rows = measure()
    _write(json_file, rows)
    table = Table("rows", "CartPole-v1", "MoERouting-v0", "ratio", "floor", title="steps/s of CPU time, medians")
    for row in rows:
        floor = "-" if row["floor"] is None else f"{row['floor']:.2f}"
        table.add_row(
            str(row["rows"]), f"{row['cartpole']:,.0f}", f"{row['routing']:,.0f}", f"{row['ratio']:.2f}", floor
        )
    console.print(table)


def _compare(
    weights: list[float], seeds: list[int], bundle: str, costs: str, jobs: int, timesteps: int | None, out: Path
) -> None:
    from benchmarks.experiments import routing

    with _bar() as add:
        result = routing.run(
            weights, seeds, out, bundle=bundle, costs=costs, jobs=jobs, timesteps=timesteps, add_task=add
        )
    for renderable in routing.tables(result):
        console.print(renderable)
    console.print(f"[green]saved[/] {out}/results.json, {out}/pareto.png    curves: tensorboard --logdir {out}")


def _environment(env: str) -> str:
    """The prefixed id; an unknown one is a `ValueError` that names what was probably meant."""
    from moe_envs import ENVIRONMENTS

    name = env.removeprefix("moe_envs:")
    if name not in ENVIRONMENTS:
        close = difflib.get_close_matches(name, ENVIRONMENTS, n=1, cutoff=0.3)
        hint = f"; did you mean {close[0]}?" if close else "."
        raise ValueError(f"no environment {env!r}{hint} There are {', '.join(ENVIRONMENTS)}")
    return f"moe_envs:{name}"


def _parse(pairs: list[str]) -> dict[str, Any]:
    parsed: dict[str, Any] = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not equals:
            raise ValueError(f"--env-kwarg {pair!r}: expected name=value")
        try:
            parsed[name] = json.loads(value)
        except ValueError:
            parsed[name] = value
    return parsed


@contextmanager
def _bar() -> Iterator[Callable[[str], Callable[[float], None]]]:
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=errors) as progress:

        def add(description: str) -> Callable[[float], None]:
            task = progress.add_task(description, total=1.0)
            return lambda share: progress.update(task, completed=share)

        yield add


def _write(path: Path | None, result: Any) -> None:
    if path is not None:
        from cost.files import write_text

        write_text(path, json.dumps(result, indent=1))


def _run(command: Callable[..., None]) -> None:
    app = typer.Typer(add_completion=False)
    app.command()(command)
    _guarded(app)


def _guarded(app: typer.Typer) -> None:
    """Run a command; what a user can mend is one line on stderr and exit code 1, not a traceback."""
    from cost.energy import MeterError
    from cost.normalize import NormalizerError
    from cost.profile import ProfileError
    from experts.bundle import BundleError
    from experts.data import DataError

    try:
        _require_our_agents()
        from agents.checkpoints import CheckpointError
        from agents.rollouts import NotFiniteError
        from benchmarks.runs import RunError

        app()
    except (
        ValueError,
        TypeError,
        OSError,
        BundleError,
        DataError,
        CheckpointError,
        MeterError,
        NormalizerError,
        NotFiniteError,
        ProfileError,
        RunError,
    ) as error:
        errors.print(Text.assemble(("error: ", "red"), str(error)), soft_wrap=True)
        sys.exit(1)


def _require_our_agents() -> None:
    import agents

    if getattr(agents, "DISTRIBUTION", None) != "moe-envs":
        raise ValueError(
            f"the package 'agents' found is {agents.__file__}, not moe-envs': openai-agents has the same import name; "
            "install moe-envs into a virtual environment of its own"
        )
