"""The command `moe-compress`: apply compression plans, create plans from policies, export reference models."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from benchmarks.cli.terminal import Json, console_of, group, write

LIMIT = 2**20
app = group("Compress Mixture-of-Experts models. To compare methods: moe-benchmark run methods.")
Model = Annotated[str, typer.Option(help="fashion-mnist-conv or digits-mlp; append -1, -2, ... for another seed.")]


@app.command("apply")
def _apply(
    plan: Annotated[
        Path, typer.Argument(exists=True, dir_okay=False, help="Plan written by `moe-compress plan` or `Plan.save`.")
    ],
    checkpoint: Annotated[
        Path, typer.Argument(exists=True, dir_okay=False, help="Safetensors file of a reference model.")
    ],
    out: Annotated[Path, typer.Option(help="File for the compressed model.")] = Path("compressed.safetensors"),
    steps: Annotated[int, typer.Option(min=0, help="Fine-tuning steps with the plan applied; 0 disables it.")] = 0,
    limit: Annotated[int, typer.Option(min=1, help="Maximum file size in bytes.")] = LIMIT,
    json_file: Json = None,
) -> None:
    """Apply a compression plan to a checkpoint. Fails if the file would exceed the limit.

    Example: moe-compress apply plan.json model.safetensors --out compressed.safetensors
    """
    from benchmarks.results.tables import terminal
    from experts.compression.workbench import apply

    result = apply(plan, checkpoint, out, steps, limit)
    write(json_file, result)
    base, rows = result["rows"][0], list[dict[str, Any]]()
    for row in result["rows"]:
        points = 100 * (row["accuracy"] - base["accuracy"])
        rows.append({"method": row["method"], "bytes": row["bytes"], "accuracy": f"{row['accuracy']:.2%}",
                     "points": points, "a batch, µs": 1e6 * row["time_s"], "trained": row["finetuned"]})  # fmt: skip
    console = console_of(json_file)
    console.print(terminal(f"{checkpoint}, test images", rows))
    console.print(f"[green]saved[/] {out}")


@app.command("plan")
def _plan(
    policy: Annotated[
        Path, typer.Argument(exists=True, help="PPO policy for MoECompression-v0: RUN_DIR/best of moe-train.")
    ],
    model: Model = "fashion-mnist-conv",
    budget: Annotated[int, typer.Option(min=1, help="Maximum size of the compressed file in bytes.")] = 200_000,
    out: Annotated[Path, typer.Option(help="File for the plan, for use with `moe-compress apply`.")] = Path(
        "plan.json"
    ),
) -> None:
    """Write the compression plan that a trained policy selects for a model.

    Example: moe-compress plan runs/compression/best --model fashion-mnist-conv --budget 150000
    """
    from agents.deploy.compression import plan_of
    from agents.ppo import PPO

    found = plan_of(PPO.load(policy), model, budget)
    if found.bytes > budget:
        raise ValueError(f"the plan takes {found.bytes:,} bytes, more than the budget of {budget:,}")
    found.save(out)
    console_of(None).print(f"[green]saved[/] {out}: {found.bytes:,} bytes of {budget:,}")


@app.command("export")
def _export(model: Model = "fashion-mnist-conv", out: Path = Path("model.safetensors")) -> None:
    """Write a reference model as a checkpoint for `moe-compress apply`.

    Example: moe-compress export --model digits-mlp --out model.safetensors
    """
    from experts import reference_models

    reference_models.save(reference_models.load(model), model, out)
    console_of(None).print(f"[green]saved[/] {out}")
