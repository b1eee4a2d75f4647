"""What is shipped, bundles and models to compress, and how it is made from the data."""

from pathlib import Path

from cost.files import write_bytes
from cost.profile import measure_experts
from experts import data, reference_bundles, reference_models, zoo
from experts.bundle import PROFILE, Bundle
from experts.compression import sensitivity
from experts.compression.evaluation import accuracy
from experts.compression.execution import products
from experts.compression.pieces import importance
from experts.compression.sensitivity import GRANULARITIES, SHIPPED
from experts.compression.structured import smaller_experts


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
    import torch

    from experts import profiles

    calibration = torch.from_numpy(reference_models.examples(name).calibration)
    smaller = smaller_experts(model, 0.5, importance(model, calibration))  # what `moe-compress run` tries as well
    found = products(model, calibration[:64]), products(smaller, calibration[:64])
    both = {f"{number} {key}": product for number, each in enumerate(found) for key, product in each.items()}
    profiles.measure_products(both, progress=True).save(profiles.products_profile(name))
