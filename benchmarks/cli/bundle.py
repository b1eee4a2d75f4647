"""The command `moe-bundle`: list, check and rebuild bundles, tasks and reference models."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table
from rich.text import Text

from benchmarks.cli.terminal import bar, console_of, group

if TYPE_CHECKING:
    from experts import reference_models
    from experts.bundle import Bundle

app = group("List, check and rebuild bundles, tasks and reference models.")


@app.command("list")
def _list_bundles() -> None:
    """List shipped and user bundles with the test accuracy of their top-2 gate."""
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
    console_of(None).print(table)


@app.command("check")
def _check_bundle(name: str) -> None:
    """Verify the checksums of a bundle."""
    from experts import bundle as bundles

    console_of(None).print(f"[green]whole[/] {bundles.load(name).path}")


@app.command("rebuild")
def _rebuild_bundles(
    names: Annotated[
        list[str], typer.Argument(help="To rebuild: digits, fashion-mnist, or language (an hour on two cores).")
    ],
    folder: Annotated[Path | None, typer.Option(help="Output folder; default: the assets of the package.")] = None,
) -> None:
    """Retrain the reference models, profile them on this machine and replace the shipped bundles."""
    for name in names:
        if name == "language":
            _rebuild_language(folder)
            continue
        built = rebuild(name, folder)
        console_of(None).print(f"[green]built[/] {built.path}  accuracy {json.dumps(built.metadata['accuracy'])}")


def _rebuild_language(folder: Path | None) -> None:
    from experts.language import reference

    with bar() as add:
        show = add("the language model")
        built = reference.build(folder and folder / reference.NAME, report=lambda share, line: show(share))
    console_of(None).print(f"[green]built[/] {built}  in {folder or 'the package'}")


@app.command("models")
def _models() -> None:
    """Retrain the models of MoECompression-v0 (minutes), profile their matrix products, measure sensitivities."""
    for name, right in ship_models().items():
        console_of(None).print(f"[green]made[/] {name}  accuracy on test {right:.4f}")


@app.command("tasks")
def _tasks() -> None:
    """Rebuild the tasks of MoEMetaOpt-v0 from their data sets and profile their training on this machine."""
    from experts import profiles, tasks

    for path in tasks.ship():
        console_of(None).print(f"[green]made[/] {path}")
    for name in tasks.SHIPPED:
        profiles.measure_training(tasks.load(name), progress=True).save(profiles.task_profile(name))
        console_of(None).print(f"[green]profiled[/] {profiles.task_profile(name)}")


@app.command("autorate")
def _autorate() -> None:
    """Rebuild the references and the estimator of MoEAutoRate-v0 (40 minutes)."""
    from benchmarks import shipped

    shipped.ship(lambda line: console_of(None).print(f"[green]made[/] {line}"))


def rebuild(name: str, folder: Path | None = None) -> Bundle:
    """Train, tabulate and profile a reference bundle on this machine and write it to `folder` / name.

    Without `folder`, a shipped bundle is replaced in the package; for other bundles only the profile is.
    """
    from cost.files import write_bytes
    from cost.profile import measure_experts
    from experts import reference_bundles, zoo
    from experts.bundle import PROFILE

    made = name in zoo.MADE
    built = reference_bundles.build(name, folder or (zoo.user_folder() if made else zoo.ASSETS), measure_experts)
    if made and folder is None:
        write_bytes(reference_bundles.profile_path(name), built.members[PROFILE])
    return built


def ship_models() -> dict[str, float]:
    """Train seed 0 of each recipe and ship it with examples, profile and sensitivities; returns test accuracies."""
    from experts import data, reference_models
    from experts.compression import sensitivity
    from experts.compression.evaluation import accuracy
    from experts.compression.sensitivity import GRANULARITIES, SHIPPED
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
    """Profile the matrix products of a reference model, with all and with half of its experts' neurons."""
    import torch

    from experts import profiles, reference_models
    from experts.compression.execution import products
    from experts.compression.pieces import importance
    from experts.compression.structured import smaller_experts

    calibration = torch.from_numpy(reference_models.examples(name).calibration)
    smaller = smaller_experts(model, 0.5, importance(model, calibration))  # also used by `moe-benchmark run methods`
    found = products(model, calibration[:64]), products(smaller, calibration[:64])
    both = {f"{number} {key}": product for number, each in enumerate(found) for key, product in each.items()}
    profiles.measure_products(both, progress=True).save(profiles.products_profile(name))
