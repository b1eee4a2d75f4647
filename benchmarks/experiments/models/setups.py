"""Models under evaluation: one classifier with different training, routing and compression per seed.

Results shared by several runs, such as a trained model, are created once in a folder by the first run.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, model_validator

from cost.files import locked

if TYPE_CHECKING:
    import torch

    from experts.model import MoEClassifier

CONCERNS = {  # fields that each kind depends on, besides the data
    "top-k": ("k",),
    "graph": ("k",),
    "adamw": ("k",),
    "metaopt": ("k", "timesteps"),
    "compressed": ("k", "level", "gate_level"),
    "rl-router": ("cost_weight", "timesteps"),
}
ALL, CHOSEN = "all experts", "chosen experts"
DECISIONS = 30  # decisions per training, as in MoEMetaOpt-v0
Classify = Callable[["torch.Tensor"], "torch.Tensor"]  # inputs [B, D] -> class logits [B, C]


class ModelSetup(BaseModel):
    """Fields of a setup in a matrix; fields that do not apply to its kind are ignored.

    `top-k`: the gate selects `k` experts. `graph`: top-k with an expert graph. `adamw`: trained with AdamW. `metaopt`:
    trained with AdamW, rates set by a policy of MoEMetaOpt-v0, which sees validation. `compressed`: stored at `level`,
    with the gate at `gate_level`, names of `experts.compression.LEVELS`. `rl-router`: routed by PPO, trained in
    MoERouting-v0 with `cost_weight`. Policies use labels that other kinds do not see: those of `rl_train`, and for
    `metaopt` also those of validation.
    """

    model_config = ConfigDict(extra="forbid")

    kind: Literal["top-k", "graph", "adamw", "metaopt", "compressed", "rl-router"] = "top-k"
    data: Literal["fashion-mnist", "digits"] = "fashion-mnist"
    k: int = Field(default=2, ge=1, le=8)
    level: str = "int4"
    gate_level: str = "int8"
    cost_weight: float = Field(default=0.1, ge=0)
    timesteps: int | None = Field(default=None, ge=1)  # of the policy training; default: the tuned number

    @model_validator(mode="after")
    def _of_its_kind(self) -> ModelSetup:
        """Reset fields that have no effect, so that equal rows compare equal; validate level names."""
        for name, field in type(self).model_fields.items():
            if name not in ("kind", "data", *CONCERNS[self.kind]):
                setattr(self, name, field.default)
        if self.kind == "compressed":
            _number(self.level), _number(self.gate_level)
        return self


SETTINGS: dict[str, dict[str, Any]] = {
    "top-2": {"kind": "top-k", "k": 2},
    "top-1": {"kind": "top-k", "k": 1},
    "graph": {"kind": "graph"},
    "AdamW": {"kind": "adamw"},
    "MetaOpt-trained": {"kind": "metaopt"},
    "int4, gate int8": {"kind": "compressed", "level": "int4"},
    "int2, gate int8": {"kind": "compressed", "level": "int2"},
    "RL router": {"kind": "rl-router"},
}


class Subject(NamedTuple):
    """Model to evaluate: functions for its logits (running all experts or only the selected ones), experts per input
    `[B]`, and storage size."""

    ways: dict[str, Classify]
    experts_per_input: Callable[[torch.Tensor], torch.Tensor]
    parameters: int
    bytes: int

    def classify(self, x: torch.Tensor) -> torch.Tensor:
        """Class logits `[B, C]`; all functions agree up to rounding."""
        return next(iter(self.ways.values()))(x)


def make(setup: ModelSetup, seed: int, folder: Path) -> Subject:
    """Create the model of a setup."""
    if setup.kind == "rl-router":
        return _routed(setup, seed, folder)
    if setup.kind == "compressed":
        return _compressed(setup, seed, folder)
    trainings = {"top-k": _train, "graph": _train_graph, "adamw": _train_adamw, "metaopt": _train_by_policy}
    model = _kept(setup, seed, folder, trainings[setup.kind])
    return _subject(model, setup.k)


def _number(level: str) -> int:
    """Number of a compression level; raises `ValueError` if unknown."""
    from experts.compression import LEVELS

    names = [each.name for each in LEVELS]
    if level not in names:
        raise ValueError(f"no level {level!r}; there are {'; '.join(names)}")
    return names.index(level)


def _subject(model: MoEClassifier, k: int, stored: int | None = None) -> Subject:
    from experts.model import combine, run_chosen
    from experts.routers import TopK

    parameters = sum(weights.numel() for weights in model.parameters())
    experts, classes = list(model.experts), model.experts.bias_EC.shape[1]

    def chosen(x: torch.Tensor) -> torch.Tensor:
        h = model.trunk(x)
        weights, members, _ = TopK(k)(model.gate(h))
        outputs = run_chosen(experts, h, members, classes)
        return combine(outputs, weights, members, model.graph)

    ways: dict[str, Classify] = {ALL: lambda x: model(x, k), CHOSEN: chosen}
    return Subject(ways, lambda x: x.new_full((len(x),), k), parameters, stored or 4 * parameters)


def _compressed(setup: ModelSetup, seed: int, folder: Path) -> Subject:
    from experts.compression.plan import Plan

    model = _kept(setup, seed, folder, _train)
    plan = Plan.of(model, _number(setup.level))
    levels = plan.levels | {"gate": _number(setup.gate_level)}
    raw, restored = Plan.of(model, levels).compress(model)
    return _subject(restored, setup.k, len(raw))  # type: ignore[arg-type]


def _routed(setup: ModelSetup, seed: int, folder: Path) -> Subject:
    """Model of the top-2 setup routed by PPO, with costs of the shipped bundle of the same size."""
    from agents import runs
    from agents.deploy.routing import RoutedMoE
    from experts import bundle, data, zoo
    from experts.reference_bundles import Shipped
    from experts.routers import Decided

    model = _kept(setup, seed, folder, _train)
    place = folder / "routers" / _name(setup, seed, "cost_weight", "timesteps")
    content = data.load(setup.data)
    with locked(place):
        if not (place / "bundle").exists():
            profile = Shipped(zoo.ASSETS / setup.data / bundle.PROFILE)
            bundle.build(
                "bundle", content.inputs, content.labels, model, splits=content.splits, folder=place, progress=False,
                profile=lambda model, inputs: profile,
            )  # fmt: skip
        env_kwargs = {"bundle": str(place / "bundle"), "cost_weight": setup.cost_weight, "stream": "iid"}
        if not (place / "run" / runs.SETTINGS).exists():
            more = {"total_timesteps": setup.timesteps} if setup.timesteps else {}
            runs.train("moe_envs:MoERouting-v0", "ppo", seed, place / "run", env_kwargs, more, backend="own",
                       overwrite=True)  # fmt: skip
        policy: Any = runs.load(place / "run")[0]
    routed = RoutedMoE(bundle.load(place / "bundle"), policy, env_kwargs)
    numbers = sum(each.numel() for each in routed.state_dict().values())

    def experts_per_input(x: torch.Tensor) -> torch.Tensor:
        return routed.route(x, routed.gate(routed.trunk(x))).sum(1)

    def all_experts(x: torch.Tensor) -> torch.Tensor:
        return model(x, router=Decided(lambda gate: routed.route(x, gate)))

    ways: dict[str, Classify] = {CHOSEN: routed, ALL: all_experts}
    return Subject(ways, experts_per_input, numbers, 4 * numbers)


def _train(setup: ModelSetup, seed: int, folder: Path, graph: dict[str, Any] | None = None) -> MoEClassifier:
    from experts import data, training
    from experts.reference_bundles import SETTINGS as REFERENCE

    settings = replace(REFERENCE[setup.data], seed=seed, graph=graph)
    return training.train(*data.load(setup.data)["train"], settings, progress=False)


def _train_graph(setup: ModelSetup, seed: int, folder: Path) -> MoEClassifier:
    return _train(setup, seed, folder, graph={"mode": "weighted"})


def _train_adamw(setup: ModelSetup, seed: int, folder: Path) -> MoEClassifier:
    """Train with the initial optimizer of `_train_by_policy` at constant rates."""
    from experts import data, training
    from experts.reference_bundles import SETTINGS as REFERENCE

    settings = replace(REFERENCE[setup.data], seed=seed)

    def drive(model: MoEClassifier) -> tuple[torch.optim.Optimizer, Callable[[int, float], None]]:
        return _adamw(model, settings.learning_rate), lambda step, loss: None

    return training.train(*data.load(setup.data)["train"], settings, progress=False, drive=drive)


def _adamw(model: MoEClassifier, rate: float) -> torch.optim.Optimizer:
    """AdamW with one parameter group for the gate and one for the experts."""
    import torch

    groups = [{"params": part.parameters()} for part in (model.gate, model.experts)]
    return torch.optim.AdamW(groups, lr=rate, weight_decay=0.01)


def _train_by_policy(setup: ModelSetup, seed: int, folder: Path) -> MoEClassifier:
    """Train with AdamW and 30 rate changes by a policy; the target is the result of top-k."""
    import torch

    from agents.deploy.metaopt import PolicyMetaOptimizer, gate_metrics
    from benchmarks.runner.kept import policy_of
    from benchmarks.torch_training import validate
    from experts import data, training
    from experts.reference_bundles import SETTINGS as REFERENCE

    place = folder / "meta-optimizers" / _name(setup, seed, "timesteps")
    policy = policy_of(place, "moe_envs:MoEMetaOpt-v0", {"task": setup.data}, seed, setup.timesteps)
    settings = replace(REFERENCE[setup.data], seed=seed)
    content = data.load(setup.data)
    x, y = map(torch.from_numpy, content["validation"])
    assert settings.epochs is not None  # of the reference bundles
    every = settings.epochs * -(-len(content.splits["train"]) // settings.batch_size) // DECISIONS
    target = validate(_kept(setup, seed, folder, _train), x, y)["validation_accuracy"]

    def drive(model: MoEClassifier) -> tuple[torch.optim.Optimizer, Callable[[int, float], None]]:
        parts = {"gate": model.gate, "experts": model.experts}
        optimizer = _adamw(model, settings.learning_rate)
        meta = PolicyMetaOptimizer(optimizer, policy, parts, target=target, max_actions=DECISIONS)
        losses: list[float] = []

        def after_step(step: int, loss: float) -> None:
            losses.append(loss)
            if step % every == 0 and meta.decisions < DECISIONS:
                with torch.no_grad():
                    found = validate(model, x, y) | gate_metrics(model.gate(x))
                meta.update_hparams({**found, "train_losses": losses[-every:]}, step)

        return optimizer, after_step

    return training.train(*content["train"], settings, progress=False, drive=drive)


def _kept(
    setup: ModelSetup, seed: int, folder: Path, train: Callable[[ModelSetup, int, Path], MoEClassifier]
) -> MoEClassifier:
    """Trained model, loaded from the folder if it exists."""
    from experts.checkpoints import load_model, save_model
    from experts.model import MoEClassifier

    means = ("timesteps",) if train is _train_by_policy else ()
    path = folder / "models" / f"{train.__name__.strip('_')}-{_name(setup, seed, *means)}.safetensors"
    with locked(path):
        if not path.exists():
            save_model(train(setup, seed, folder), path)
    return load_model(path, MoEClassifier)


def _name(setup: ModelSetup, seed: int, *fields: str) -> str:
    """File name derived from the data, the seed and these fields."""
    said = json.dumps([getattr(setup, field) for field in ("data", *fields)])
    return f"{setup.data}-{seed}-{hashlib.sha256(said.encode()).hexdigest()[:8]}"
