"""Specification of an environment, used by registration, tests, training, baselines and leaderboards."""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import Any

import gymnasium
from gymnasium.envs.registration import registry

SPECS: dict[str, Spec] = {}


@dataclass(frozen=True, kw_only=True)
class Spec:
    """Specification of an environment, defined at the end of its module.

    `entry_point` is the `SingleEnv`, as "package.module:NameEnv"; its vector face is "package.module:NameVectorEnv"
    unless `vector_entry_point` says otherwise. `baselines` names the module with `baselines` and `bound`.
    """

    id: str
    entry_point: str
    baselines: str
    reference_point: tuple[float, float]  # (cost, quality) of the hypervolume
    vector_entry_point: str = ""
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    nondeterministic: bool = False
    splits: tuple[str, ...] = ("validation", "test")  # for selection and reports; () without argument `split`
    validation_episodes: int = 1000  # on which a training is validated, each time
    boards: Mapping[str, Mapping[str, Any]] = field(
        default_factory=lambda: {"default": {}}
    )  # arguments of the leaderboard splits
    small: Mapping[str, Any] = field(default_factory=dict)  # arguments for fast tests
    short: Mapping[str, Any] = field(default_factory=dict)  # with `small`, episodes of four steps
    variants: tuple[Mapping[str, Any], ...] = ({},)  # further arguments for tests, added to `small`

    @property
    def multi_objective_id(self) -> str:
        """The id of the environment whose reward is a vector: "mo-moe-routing-v0"."""
        return "mo-" + self.id.replace("MoE", "moe-").lower()


def register(spec: Spec) -> None:
    """Register an environment with Gymnasium and, if installed, its multi-objective version with MO-Gymnasium."""
    SPECS[spec.id] = spec
    if spec.id not in registry:
        vector = spec.vector_entry_point or f"{spec.entry_point.removesuffix('Env')}VectorEnv"
        gymnasium.register(
            spec.id,
            entry_point=spec.entry_point,
            vector_entry_point=vector,
            nondeterministic=spec.nondeterministic,
            kwargs=dict(spec.kwargs),
        )
    if spec.multi_objective_id not in registry and find_spec("mo_gymnasium") is not None:
        gymnasium.register(
            spec.multi_objective_id,
            entry_point="moe_envs.core.multi_objective:MultiObjectiveEnv",
            nondeterministic=spec.nondeterministic,
            kwargs={"env_id": spec.id},
        )


def find(env_id: str) -> Spec:
    """The spec of a registered id; the package of "package:Id-v0" is imported first.

    Raises `ValueError` naming the known ids.
    """
    module, _, name = env_id.rpartition(":")
    if module:
        try:
            importlib.import_module(module)
        except ImportError as error:
            raise ValueError(f"environment {env_id!r}: the package {module!r} cannot be imported: {error}") from error
    if name not in SPECS:
        close = difflib.get_close_matches(name, SPECS, n=1, cutoff=0.8)
        hint = f"; did you mean {close[0]}?" if close else "."
        raise ValueError(
            f"no environment {env_id!r}{hint} There are {', '.join(SPECS)}; write one of your own as package:Id-v0"
        )
    return SPECS[name]


def full_id(env_id: str) -> str:
    """The id that works in any process: "MoERouting-v0" is "moe_envs:MoERouting-v0", others stay as they are."""
    spec = find(env_id)
    ours = spec.entry_point.startswith("moe_envs.")
    return f"moe_envs:{spec.id}" if ours else env_id
