"""The command `moe-bundle`: list, check and rebuild what is shipped."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.table import Table
from rich.text import Text

from benchmarks.cli.terminal import console_of, group
from cost.files import write_bytes
from cost.profile import measure_experts
from experts import bundle as bundles
from experts import data, profiles, reference_bundles, reference_models, tasks, zoo
from experts.bundle import PROFILE, Bundle, BundleError
from experts.compression import sensitivity
from experts.compression.evaluation import accuracy
from experts.compression.execution import products
from experts.compression.pieces import importance
from experts.compression.sensitivity import GRANULARITIES, SHIPPED
from experts.compression.structured import smaller_experts

app = group("Bundles, tasks and reference models: list, check, rebuild.")


@app.command("list")
def _list_bundles() -> None:
    """All bundles, shipped and your own, with the accuracy of their top-2 gate."""
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
    console_of(None).print(table)


@app.command("check")
def _check_bundle(name: str) -> None:
    """Verify every byte of a bundle."""
    console_of(None).print(f"[green]whole[/] {bundles.load(name).path}")


@app.command("rebuild")
def _rebuild_bundles(
    names: Annotated[list[str], typer.Argument(help="digits, fashion-mnist")],
    folder: Annotated[Path | None, typer.Option(help="Default: the package's own assets.")] = None,
) -> None:
    """Train the reference models from their data, profile them on this machine and replace the shipped bundles."""
    for name in names:
        built = rebuild(name, folder)
        console_of(None).print(f"[green]built[/] {built.path}  accuracy {json.dumps(built.metadata['accuracy'])}")


@app.command("models")
def _models() -> None:
    """Train the shipped models of MoECompression-v0 (minutes), profile their products, measure their sensitivities."""
    for name, right in ship_models().items():
        console_of(None).print(f"[green]made[/] {name}  accuracy on test {right:.4f}")


@app.command("tasks")
def _tasks() -> None:
    """Make the shipped tasks of MoEMetaOpt-v0 from their data, and profile their trainings on this machine."""
    for path in tasks.ship():
        console_of(None).print(f"[green]made[/] {path}")
    for name in tasks.SHIPPED:
        profiles.measure_training(tasks.load(name), progress=True).save(profiles.task_profile(name))
        console_of(None).print(f"[green]profiled[/] {profiles.task_profile(name)}")


def rebuild(name: str, folder: Path | None = None) -> Bundle:
    """Train, tabulate and profile a reference bundle on this machine into `folder` / name, replacing what is there;
    without a folder into the package, of one that is not shipped its profile alone."""
    made = name in zoo.MADE
    built = reference_bundles.build(name, folder or (zoo.user_folder() if made else zoo.ASSETS), measure_experts)
    if made and folder is None:
        write_bytes(reference_bundles.profile_path(name), built.members[PROFILE])
    return built


def ship_models() -> dict[str, float]:
    """Train seed 0 of each recipe into the package, with its examples, profile and sensitivities; test accuracies."""
    from moe_envs.compression.tables import ModelTables

    for path in SHIPPED.glob("sensitivity-*"):
        path.unlink()
    accuracies = {}
    for name, recipe in reference_models.RECIPES.items():
        model = reference_models.train(name)
        reference_models.save(model, name, SHIPPED / f"{name}-0.safetensors")
        reference_models.ship_examples(name)
        profile_products(name, model)
        for granularity in GRANULARITIES:
            tables = ModelTables(name, "train", granularity, "reference")
            sensitivity.write(tables.sensitivity, SHIPPED, tables.evaluator, tables.parts, tables.importance)
        accuracies[name] = accuracy(model, *data.load(recipe.source)["test"])
    return accuracies


def profile_products(name: str, model: reference_models.Model) -> None:
    """Measure the products of a reference model, and of it with half its experts' neurons, into the package."""
    calibration = torch.from_numpy(reference_models.examples(name).calibration)
    smaller = smaller_experts(
        model, 0.5, importance(model, calibration)
    )  # what `moe-benchmark run methods` tries as well
    found = products(model, calibration[:64]), products(smaller, calibration[:64])
    both = {f"{number} {key}": product for number, each in enumerate(found) for key, product in each.items()}
    profiles.measure_products(both, progress=True).save(profiles.products_profile(name))
