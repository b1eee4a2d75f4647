"""What is shipped, bundles and models to compress, and how it is made from the data."""

from pathlib import Path

from cost.profile import measure_experts
from experts import bundle, data, reference_models
from experts.bundle import Bundle
from experts.compression import sensitivity
from experts.compression.evaluation import accuracy
from experts.compression.execution import products
from experts.compression.pieces import importance
from experts.compression.sensitivity import GRANULARITIES, SHIPPED
from experts.compression.structured import smaller_experts
from experts.training import TrainingSettings

SETTINGS = {
    "digits": TrainingSettings(widths=(2, 2, 4, 4, 8, 8, 16, 16), epochs=60, batch_size=32),
    "fashion-mnist": TrainingSettings(widths=(4, 4, 8, 8, 16, 16, 32, 64), epochs=5, batch_size=128),
    "fashion-mnist-graph": TrainingSettings(widths=(4, 4, 8, 8, 16, 16, 32, 64), epochs=5, batch_size=128, graph={}),
}


def rebuild(name: str, folder: Path) -> Bundle:
    """Train, tabulate and profile a reference model on this machine into `folder` / name, replacing what is there."""
    if name not in SETTINGS:
        raise ValueError(f"{name!r} is not a reference bundle; there are {', '.join(SETTINGS)}")
    source = data.load(name.removesuffix("-graph"))
    return bundle.build(
        name,
        source.inputs,
        source.labels,
        splits=source.splits,
        settings=SETTINGS[name],
        profile=measure_experts,
        data={"name": source.name, "sha256": source.sha256},
        folder=folder,
        overwrite=True,
    )


def ship_models() -> dict[str, float]:
    """Train seed 0 of each recipe into the package, with its examples, profile and sensitivities; test accuracies."""
    from moe_envs.compression_tables import ModelTables

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
    import torch

    from moe_envs import profiles

    calibration = torch.from_numpy(reference_models.examples(name).calibration)
    smaller = smaller_experts(model, 0.5, importance(model, calibration))  # what `moe-compress run` tries as well
    found = products(model, calibration[:64]), products(smaller, calibration[:64])
    both = {f"{number} {key}": product for number, each in enumerate(found) for key, product in each.items()}
    profiles.measure_products(both, progress=True).save(profiles.products_profile(name))
