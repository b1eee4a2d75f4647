"""Selection of cost profiles: the reference profile of a bundle or this machine's profile."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from filelock import FileLock

from cost import profile as profiles
from cost.model import TERMS
from cost.operations import Operation, Work
from cost.profile import Profile, ProfileError
from experts import bundle as bundles
from experts import tasks, zoo
from experts.bundle import PROFILE, Bundle
from experts.tasks import Task

if TYPE_CHECKING:
    from experts.compression.execution import Product
    from experts.language import LanguageModel
    from experts.offload.store import Weights

ROWS = (1, 4, 16, 64, 256, 512)  # of a language model's batch
LOADS = "loads.json"  # in a language model's folder
TRAINED_WIDTHS = (8, 16, 32, 64, 128)
log = logging.getLogger("moe_envs")


def machine_path(bundle: Bundle) -> Path:
    """Cache path of this machine's profile of a bundle."""
    return zoo.cache_folder() / "profiles" / f"{bundle.path.name}-{bundle.sha256[:12]}.json"


def select(bundle: Bundle, costs: str) -> Profile:
    """The profile for `costs="reference"`, or this machine's for `"machine"` and `"live"`.

    A bundle that was built without a profile has this machine as its reference. The machine's profile is measured when
    it is first asked for, cached, and refused with a `ProfileError` once the machine or its libraries have changed.
    """
    if costs == "reference" and bundle.profile is not None:
        return profiles.parse(bundle.profile, str(bundle.path / PROFILE))
    path = machine_path(bundle)
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{path}.lock"):  # one process measures, the others wait and read
        if not path.exists():
            log.warning("measuring the costs of bundle %r on this machine into %s", bundle.path.name, path)
            measure(bundle)
    return Profile.load(path)


def measure(bundle: Bundle, repeats: int = 200, progress: bool = False) -> Profile:
    """Measure a bundle's experts on this machine and cache the profile."""
    profile = profiles.measure_experts(bundle.model(), bundle.examples, repeats, progress)
    profile.save(machine_path(bundle))
    return profile


def prepare(bundle: str, costs: str) -> None:
    """Measure missing profiles once before several processes need them."""
    select(bundles.load(bundle), costs)


def of_training(task: Task, costs: str, widths: np.ndarray, steps: int, batch_size: int) -> np.ndarray:
    """What `steps` of the optimiser and one validation cost in s, B and J, `[widths, 3]`; widths between those that
    were measured are interpolated."""
    profile = _of_task(task, costs)
    table = np.array(
        [
            [
                [getattr(profile.cost(f"{operation}, width {width}", n), term) for term in TERMS]
                for operation, n in (("step", batch_size), ("validation", len(task.validation_labels)))
            ]
            for width in TRAINED_WIDTHS
        ]
    )
    total = steps * table[:, 0] + table[:, 1]
    total[:, 1] = table[:, :, 1].max(1)  # memory is held, not spent
    return np.stack([np.interp(widths, TRAINED_WIDTHS, column) for column in total.T], axis=1)


def _of_task(task: Task, costs: str) -> Profile:
    path = task_profile(task.name) if task.name in tasks.SHIPPED else None
    name = task.name if task.name in tasks.RECIPES else f"{task.name}-{task.sha256[:12]}"
    return shipped_or_measured(f"task-{name}", "trainings", path, costs, lambda: measure_training(task))


def of_products(recipe: str, found: Mapping[str, Product], costs: str) -> Profile:
    """The matrix products of a reference model, in every way that a level has."""
    path = products_profile(recipe)
    profile = shipped_or_measured(f"model-{recipe}", "matrix products", path, costs, lambda: measure_products(found))
    if all(name in profile.operations for name in _product_operations(found)):
        return profile
    return measure_products(found)  # of other shapes than the recipe's


def shipped_or_measured(
    name: str, what: str, shipped: Path | None, costs: str, measured: Callable[[], Profile]
) -> Profile:
    """The profile in the file `shipped` for `costs="reference"`, if there is one; else this machine's, which is
    measured when it is first asked for and kept in the user's cache as `name`."""
    if costs == "reference" and shipped is not None and shipped.exists():
        return Profile.load(shipped, any_machine=True)
    path = zoo.cache_folder() / "profiles" / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{path}.lock"):
        if not path.exists():
            log.warning("measuring the costs of %s of %r on this machine into %s", what, name.partition("-")[2], path)
            measured().save(path)
    try:
        return Profile.load(path)
    except ProfileError as error:
        raise ProfileError(f"{error}; or delete {path}, and it is measured anew") from error


def products_profile(recipe: str) -> Path:
    """Path of the reference profile of a reference model's products."""
    return zoo.ASSETS / "_models" / f"{recipe}.profile.json"


def measure_products(found: Mapping[str, Product], repeats: int = 50, progress: bool = False) -> Profile:
    """Measure a model's matrix products, of each shape once, in every way that a level has."""
    return profiles.measure(_product_operations(found), sizes=(1, 4, 16, 64), repeats=repeats, progress=progress)


def _product_operations(found: Mapping[str, Product]) -> dict[str, Work]:
    from experts.compression.execution import all_ways, name_of, operation

    return {name_of(product, way): operation(product, way) for product in found.values() for way in all_ways(product)}


def of_language(model: LanguageModel, folder: Path, costs: str, rows: int) -> np.ndarray:
    """What a token costs in a layer of a language model with 0 to k experts, `[L, k + 1, 3]` in s, B and J: a row's
    share in a batch of so many rows. The last layer has the output layer, too."""
    name = f"layers-{model.sha256[:12]}"
    profile = shipped_or_measured(name, "layers", folder / PROFILE, costs, lambda: measure_language(model))
    attention, *experts, head = (_share(operation, rows) for operation in profile.operations.values())
    found = np.tile(attention + np.stack(experts), (model.settings.layers, 1, 1))
    found[-1] += head
    return found


def of_loads(model: LanguageModel, folder: Path, costs: str, weights: Weights, size: int) -> np.ndarray:
    """What loading 0 to k experts of `size` bytes at once costs, `[k + 1, 3]` in s, B and J."""
    from experts.offload.loads import SLOW, load_costs, measure_loads

    most, name = model.settings.k, f"loads-{model.sha256[:12]}"
    if costs in SLOW:
        return load_costs(SLOW[costs], size, most)
    profile = shipped_or_measured(name, "loads", folder / LOADS, costs, lambda: measure_loads(model, most))
    return load_costs(profile.operations[f"load {weights}"], size, most)


def _share(operation: Operation, rows: int) -> np.ndarray:
    """A row's share of time, memory and energy in a batch; times between those measured are interpolated."""
    seconds = np.interp(rows, operation.sizes, operation.median)
    others = [fit.fixed + fit.slope * rows for fit in (operation.memory, operation.energy)]
    return np.array([seconds, *others]) / rows


def measure_language(model: LanguageModel, progress: bool = False) -> Profile:
    """Measure the parts of a layer while a language model writes: attention to 32 tokens, 0 to k experts, and the
    output layer; on 1 to 512 rows."""
    from experts.language.layer_costs import operations

    return profiles.measure(operations(model), sizes=ROWS, progress=progress)


def task_profile(name: str) -> Path:
    """Path of the reference profile of a shipped task."""
    return tasks.FOLDER / f"{name}.profile.json"


def measure_training(task: Task, progress: bool = False) -> Profile:
    """Measure a step of AdamW and a validation of the environment's classifier, in torch, for several widths."""
    import torch
    import torch.nn.functional as F

    from experts.model import MoEClassifier

    operations: dict[str, Work] = {}
    for width in TRAINED_WIDTHS:
        model = MoEClassifier(task.inputs.shape[1], task.num_classes, widths=(width,) * 4)
        optimizer = torch.optim.AdamW(model.parameters())

        def step(
            n: int, model: MoEClassifier = model, optimizer: torch.optim.AdamW = optimizer
        ) -> Callable[[], object]:
            x, y = torch.from_numpy(task.inputs[:n].copy()), torch.from_numpy(task.labels[:n].copy())

            def run() -> None:
                optimizer.zero_grad()
                F.cross_entropy(model(x), y).backward()
                optimizer.step()

            return run

        def validation(n: int, model: MoEClassifier = model) -> Callable[[], object]:
            x = torch.from_numpy(task.inputs[:n].copy())

            def run() -> None:
                with torch.inference_mode():
                    model(x).argmax(1)

            return run

        operations |= {f"step, width {width}": step, f"validation, width {width}": validation}
    return profiles.measure(operations, sizes=(32, 64, 128, 256, 512), progress=progress)
