"""The command `moe-compress`: plans applied to checkpoints, a policy's plan, reference models as checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from benchmarks.cli.terminal import Json, console_of, group, write

LIMIT = 2**20
app = group("Compress Mixture-of-Experts models. All methods side by side: moe-benchmark run methods.")
Model = Annotated[str, typer.Option(help="fashion-mnist-conv or digits-mlp; -1, -2, ... for other seeds.")]


@app.command("apply")
def _apply(
    plan: Annotated[Path, typer.Argument(exists=True, dir_okay=False, help="A plan of `plan` or `Plan.save`.")],
    checkpoint: Annotated[Path, typer.Argument(exists=True, dir_okay=False, help="A reference model's safetensors.")],
    out: Annotated[Path, typer.Option(help="The compressed model.")] = Path("compressed.safetensors"),
    steps: Annotated[int, typer.Option(min=0, help="Of fine-tuning under the plan, 0 for none.")] = 0,
    limit: Annotated[int, typer.Option(min=1, help="Bytes that the file may have.")] = LIMIT,
    json_file: Json = None,
) -> None:
    """Apply a plan to a checkpoint; fails where the file would be larger than the limit.

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
        Path, typer.Argument(exists=True, help="Our PPO of MoECompression-v0: RUN_DIR/best of moe-train.")
    ],
    model: Model = "fashion-mnist-conv",
    budget: Annotated[int, typer.Option(min=1, help="Bytes of the compressed file.")] = 200_000,
    out: Annotated[Path, typer.Option(help="The plan, for `moe-compress apply`.")] = Path("plan.json"),
) -> None:
    """Write the plan that a learned policy gives a model, from the sensitivities of its matrices alone.

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
    """Write a reference model as a checkpoint, for `moe-compress apply`.

    Example: moe-compress export --model digits-mlp --out model.safetensors
    """
    from experts import reference_models

    reference_models.save(reference_models.load(model), model, out)
    console_of(None).print(f"[green]saved[/] {out}")
