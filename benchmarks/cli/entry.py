"""The commands `moe-train`, `moe-eval`, `moe-compare`, `moe-profile`, `moe-bundle` and `moe-benchmark`."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table
from rich.text import Text

from benchmarks.cli.terminal import Json, bar, console, errors, write

EnvKwargs = Annotated[list[str], typer.Option("--env-kwarg", "-k", help="name=value, passed to gymnasium.make.")]
bundle_app = typer.Typer(no_args_is_help=True, add_completion=False, help="Bundles: list, check, rebuild.")


def train() -> None:
    """Entry point of `moe-train`."""
    _run(_train)


def evaluate() -> None:
    """Entry point of `moe-eval`."""
    _run(_evaluate)


def profile() -> None:
    """Entry point of `moe-profile`."""
    from benchmarks.cli.profile import app

    _guarded(app)


def compare() -> None:
    """Entry point of `moe-compare`."""
    from benchmarks.cli.compare import app

    _guarded(app)


def bundle() -> None:
    """Entry point of `moe-bundle`."""
    _guarded(bundle_app)


def benchmark() -> None:
    """Entry point of `moe-benchmark`."""
    from benchmarks.cli import compress, metaopt, run  # noqa: F401
    from benchmarks.cli.benchmark import benchmark_app

    _guarded(benchmark_app)


def compress() -> None:
    """Entry point of `moe-compress`."""
    from benchmarks.cli.compress import compress_app

    _guarded(compress_app)


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
    out: Annotated[Path | None, typer.Option(help="Run folder; default runs/ENV-BACKEND-ALGO-seedSEED.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Delete the run that is there first.")] = False,
    resume: Annotated[Path | None, typer.Option(help="Go on with this interrupted run of backend own.")] = None,
    tune: Annotated[int, typer.Option(min=0, help="Search settings on validation by so many trainings first.")] = 0,
    env_kwarg: EnvKwargs = [],  # noqa: B006
    json_file: Json = None,
) -> None:
    """Train an agent on the split rl_train, keep the weights best on validation, save a run folder.

    Example: moe-train --env MoERouting-v0 --algo ppo --seed 0 -k cost_weight=0.4
    """
    import moe_envs
    from agents import runs

    env_id, env_kwargs = moe_envs.full_id(env), _parse(env_kwarg)
    name = algo if backend == "sb3" else f"{backend}-{algo}"
    folder = resume or out or Path("runs") / f"{env_id.split(':')[-1]}-{name}-seed{seed}"
    overrides: dict[str, Any] = {} if timesteps is None else {"total_timesteps": timesteps}
    if resume:
        _only(context, "resume", "json_file")
    else:
        runs.require_free(folder, env_kwargs, overwrite)
    with bar() as add:
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
    write(json_file, result)
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
    split: Annotated[str, typer.Option(help="validation or test, or what it was trained on.")] = "test",
    episodes: Annotated[int, typer.Option(min=2)] = 1000,
    seed: int = 0,
    baselines: Annotated[bool, typer.Option("--baselines", help="Tune and show all baselines beside it.")] = False,
    json_file: Json = None,
) -> None:
    """Evaluate a trained policy: return, quality and cost with 95 % intervals, on inputs it never saw.

    Example: moe-eval runs/MoERouting-v0-own-ppo-seed0 --split test --json result.json
    """
    from agents import runs
    from agents.evaluate import evaluate as play
    from benchmarks.results import tables as report

    model, config = runs.load(run_dir)
    policies: dict[str, Any] = {config["algo"]: model}
    if baselines and "Routing" not in config["env"]:
        raise ValueError(
            f"--baselines is for MoERouting; {config['env']} has its own: moe-benchmark metaopt, compression"
        )
    if baselines:
        from agents.baselines.routing import baselines as tune

        with console.status("tuning the baselines on validation"):
            policies |= tune(config["env"], **config["env_kwargs"])
    arguments = {**config["env_kwargs"], "cost_weight": config["cost_weight"], "split": split}
    rows = []
    for name, policy in policies.items():
        frame = play(policy, config["env"], episodes, seed, **arguments)
        kind = getattr(policy, "kind", "learned")
        rows.append(report.row(frame, config["env"], name, kind, seed=config["seed"], **arguments))
    write(json_file, {"rows": rows, "run": str(run_dir), "episodes": episodes, **provenance()})
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

    for name in names:
        built = rebuild(name, folder)
        console.print(f"[green]built[/] {built.path}  accuracy {json.dumps(built.metadata['accuracy'])}")


@bundle_app.command("models")
def _models() -> None:
    """Train the shipped models of MoECompression-v0 (minutes), profile their products, measure their sensitivities."""
    from benchmarks.references import ship_models

    for name, accuracy in ship_models().items():
        console.print(f"[green]made[/] {name}  accuracy on test {accuracy:.4f}")


@bundle_app.command("tasks")
def _tasks() -> None:
    """Make the shipped tasks of MoEMetaOpt-v0 from their data, and profile their trainings on this machine."""
    from experts import profiles, tasks

    for path in tasks.ship():
        console.print(f"[green]made[/] {path}")
    for name in tasks.SHIPPED:
        profiles.measure_training(tasks.load(name), progress=True).save(profiles.task_profile(name))
        console.print(f"[green]profiled[/] {profiles.task_profile(name)}")


def _parse(pairs: list[str]) -> dict[str, Any]:
    parsed: dict[str, Any] = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not equals:
            raise ValueError(f"--env-kwarg {pair!r}: expected name=value")
        try:
            parsed[name] = json.loads(value)
        except ValueError:
            parsed[name] = {"True": True, "False": False, "None": None}.get(value, value)
    return parsed


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
        from agents.runs import RunError
        from benchmarks.runner.matrix import RunnerError

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
        RunnerError,
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
