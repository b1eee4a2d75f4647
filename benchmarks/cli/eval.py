"""The command `moe-eval`: evaluate a trained policy."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from benchmarks.cli.terminal import EnvKwargs, Json, _version, bar, console_of, pairs, require_writable, write

app = typer.Typer(pretty_exceptions_enable=False)


@app.command()
def evaluate(
    run: Annotated[Path, typer.Argument(help="Run folder of moe-train, or an SB3 zip file with --trust.")],
    split: Annotated[str, typer.Option(help="Split to evaluate on: validation, test or the training split.")] = "test",
    episodes: Annotated[int, typer.Option(min=2, help="Number of episodes, identical for all policies.")] = 1000,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the first episode.")] = 0,
    baselines: Annotated[
        bool, typer.Option("--baselines", help="Also evaluate the baselines, tuned on validation, and the bound.")
    ] = False,
    trust: Annotated[
        bool,
        typer.Option(
            "--trust",
            help="Load an SB3 zip file, or a run of an environment of another package. Both can execute code: use only "
            "your own files.",
        ),
    ] = False,
    env: Annotated[str | None, typer.Option(help="Environment id of the SB3 zip file.")] = None,
    algo: Annotated[str, typer.Option(help="Algorithm of the SB3 zip file.")] = "ppo",
    env_kwarg: EnvKwargs = [],  # noqa: B006
    json_file: Json = None,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Evaluate a trained policy on unseen inputs: return, quality and cost, with 95 % intervals.

    Example: moe-eval runs/MoERouting-v0-ppo-seed0 --split test --baselines
    """
    from agents import runs
    from agents.baselines import find, on_split
    from agents.evaluate import evaluate as play
    from benchmarks.results import tables
    from cost.machine import provenance

    policy: Any
    require_writable(json_file)
    if run.suffix == ".zip":
        policy, config = runs.load_zip(run, env, algo, pairs(env_kwarg, "--env-kwarg"), trust)
    else:
        policy, config = runs.load(run, trust)
    env_id, kwargs = config["env"], config["env_kwargs"]
    policies: dict[str, Any] = {config["algo"]: policy}
    arguments = on_split(env_id, kwargs, split)
    with bar() as add:
        if baselines:
            rules = find(env_id)
            policies |= rules.baselines(env_id, report=add("tuning the baselines on validation"), **kwargs)
            bound = rules.bound(env_id, **arguments)
            policies |= {} if bound is None else {"bound": bound}
        report, rows = add("evaluating"), []
        for number, (name, each) in enumerate(policies.items()):
            frame = play(each, env_id, episodes, seed, **arguments)
            kind = getattr(each, "kind", "learned")
            shown = {"split": split, **arguments, "cost_weight": config["cost_weight"]}
            rows.append(tables.row(frame, env_id, name, kind, seed=config["seed"], **shown))
            report((number + 1) / len(policies))
    write(json_file, {"rows": rows, "run": str(run), "episodes": episodes, **provenance()})
    console_of(json_file).print(tables.policies(rows, f"{env_id}, {split}, {episodes} episodes"))
