"""The command `moe-train`: train an agent."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Annotated, Any

import typer

from benchmarks.cli.terminal import EnvKwargs, Json, _version, bar, console_of, errors, pairs, require_writable, write

app = typer.Typer(pretty_exceptions_enable=False)


@app.command()
def train(
    context: typer.Context,
    env: Annotated[
        str, typer.Option(help="Environment id; for your own environment, package:Id-v0.")
    ] = "MoERouting-v0",
    algo: Annotated[
        str,
        typer.Option(help="own: ppo, reinforce; sb3: ppo, a2c, dqn, qrdqn, ppo_lstm, ppo_mask (with action masks)."),
    ] = "ppo",
    backend: Annotated[str, typer.Option(help="own (several times faster) or sb3 (Stable-Baselines3).")] = "own",
    seed: Annotated[int, typer.Option(min=0, max=2**32 - 1, help="Seed of weights, exploration and environment.")] = 0,
    timesteps: Annotated[
        int | None, typer.Option(min=1, help="Number of timesteps; default: the tuned number.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Run folder; default: runs/ENV-ALGO-ARGUMENTS-seedSEED.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Delete an existing run first.")] = False,
    resume: Annotated[Path | None, typer.Option(help="Resume this interrupted run of backend own.")] = None,
    tune: Annotated[int, typer.Option(min=0, help="Tune hyperparameters on validation first, with N trials.")] = 0,
    baselines: Annotated[
        bool, typer.Option(help="Compare with the best baseline on validation; tuning the baselines takes a while.")
    ] = True,
    trust: Annotated[
        bool,
        typer.Option("--trust", help="With --resume: the run's environment may be imported, which runs its code."),
    ] = False,
    sb3_zip: Annotated[bool, typer.Option("--sb3-zip", help="Also save an SB3 zip file (backend sb3).")] = False,
    env_kwarg: EnvKwargs = [],  # noqa: B006
    json_file: Json = None,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Train an agent and save a run folder with the weights that score best on validation.

    Example: moe-train --env MoERouting-v0 --algo ppo --seed 0 -k cost_weight=0.4
    """
    import moe_envs
    from agents import runs, training
    from cost.files import alone

    require_writable(json_file)
    env_id, env_kwargs = moe_envs.full_id(env), pairs(env_kwarg, "--env-kwarg")
    if sb3_zip and backend != "sb3":
        raise ValueError("--sb3-zip is for --backend sb3: our learners save folders without pickle")
    folder = resume or out or Path("runs") / runs.default_name(env_id, algo, backend, env_kwargs, seed)
    overrides: dict[str, Any] = {} if timesteps is None else {"total_timesteps": timesteps}
    if resume:
        _only(context, "resume", "json_file", "baselines", "trust")
    else:
        runs.require_free(folder, env_kwargs, overwrite)
    with alone(folder, runs.RunError) if tune else nullcontext(), bar() as add:
        if tune:
            report = add(f"tuning: {tune} trials")
            arguments = {"env_id": env_id, "algo": algo, "backend": backend, "env_kwargs": env_kwargs, "seed": seed}
            overrides |= _search(tune, folder, **arguments, timesteps=timesteps, report=report)
        report = add(f"resuming {folder}" if resume else f"training {algo} on {env_id}")
        try:
            if resume:
                policy = runs.resume(folder, report, trust)
            else:
                policy = runs.train(env_id, algo, seed, folder, env_kwargs, overrides, report, backend, overwrite)
        except KeyboardInterrupt:
            saved = resume or backend == "own"
            hint = f"resume: moe-train --resume {folder}" if saved else "nothing was saved"
            errors.print(f"stopped; {hint}", soft_wrap=True)
            raise typer.Exit(130) from None
        if sb3_zip:
            trained: Any = policy
            trained.save(folder / "sb3.zip")
        result = runs.load_config(folder)
        write(json_file, result)
        console = console_of(json_file)
        console.print(
            f"[green]saved[/] {folder}    evaluate: moe-eval {folder}    curves: tensorboard --logdir {folder}",
            soft_wrap=True,
        )
        if (folder / training.CURVE).exists() and (said := training.parting(training.load_curve(folder))):
            console.print(f"[yellow]note[/] {said}", soft_wrap=True)
        if baselines:
            console.print(_beside(policy, result, add("tuning the baselines")), soft_wrap=True)


def _beside(policy: Any, config: dict[str, Any], report: Any) -> str:
    """Compare the mean return on validation with that of the best baseline."""
    from agents.baselines import find, on_split
    from agents.evaluate import evaluate

    kwargs = on_split(config["env"], config["env_kwargs"], "validation")

    def score(each: Any) -> float:
        return float(evaluate(each, config["env"], 1000, **kwargs)["return"].mean())

    rules = find(config["env"]).baselines(config["env"], report=report, **config["env_kwargs"])
    scores = {name: score(rule) for name, rule in rules.items()}
    best = max(scores, key=scores.__getitem__)
    return f"mean return on validation: {config['algo']} {score(policy):.4f}, best baseline {scores[best]:.4f} ({best})"


def _only(context: typer.Context, *names: str) -> None:
    """Raise `ValueError` for command-line options other than `names`, since they would have no effect."""
    for name in context.params:
        source = context.get_parameter_source(name)
        if name not in names and source is not None and source.name == "COMMANDLINE":
            raise ValueError(f"--{name.replace('_', '-')} beside --{names[0]}: a resumed run keeps its settings")


def _search(trials: int, folder: Path, **arguments: Any) -> dict[str, Any]:
    from agents.tuning import search

    try:
        return search(trials=trials, folder=folder, **arguments)
    except KeyboardInterrupt:
        errors.print(f"stopped; rerun the same command to resume the trials in {folder}", soft_wrap=True)
        raise typer.Exit(130) from None
