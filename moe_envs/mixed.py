"""Vector environments side by side as one: one policy for several problems that look alike."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from gymnasium.vector import VectorEnv
from gymnasium.vector.utils import batch_space

from moe_envs.metaopt import MoEMetaOptVectorEnv

Vector = VectorEnv[np.ndarray, np.ndarray, np.ndarray]


class MixedVectorEnv(VectorEnv[np.ndarray, np.ndarray, np.ndarray]):
    """The rows of several vector environments, whose spaces and autoreset modes must be equal, one after the other.

    `reset(seed=s)` seeds row i with s + i. An entry of `info` that only some environments have is 0 in the others'
    rows.
    """

    def __init__(self, envs: Sequence[Vector]) -> None:
        first = envs[0]
        for env in envs:
            if (env.single_observation_space, env.single_action_space) != (
                first.single_observation_space,
                first.single_action_space,
            ):
                raise ValueError("the environments' spaces differ")
            if env.metadata["autoreset_mode"] is not first.metadata["autoreset_mode"]:
                raise ValueError("the environments' autoreset modes differ")
        self.envs, self.metadata = list(envs), first.metadata
        self.num_envs = sum(env.num_envs for env in envs)
        self._observations: list[np.ndarray] = [np.zeros(0)] * len(envs)
        self._ends = np.cumsum([env.num_envs for env in envs])
        self.single_observation_space, self.single_action_space = (
            first.single_observation_space,
            first.single_action_space,
        )
        self.observation_space = batch_space(self.single_observation_space, self.num_envs)
        self.action_space = batch_space(self.single_action_space, self.num_envs)

    def reset(
        self, *, seed: int | Sequence[int | None] | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        """Start episodes in all rows, or in those of `options["reset_mask"]`."""
        seeds = list(seed) if isinstance(seed, Sequence) else self._seeds(seed)
        mask = (options or {}).get("reset_mask")
        infos: list[dict[str, Any]] = []
        for place, (env, end) in enumerate(zip(self.envs, self._ends, strict=True)):
            rows = slice(end - env.num_envs, end)
            if mask is not None and not mask[rows].any():
                infos.append({})
                continue
            given = options if mask is None else {**(options or {}), "reset_mask": mask[rows]}
            observation, info = env.reset(seed=seeds[rows], options=given)  # type: ignore[arg-type]
            self._observations[place] = observation
            infos.append(info)
        return np.concatenate(self._observations), self._joined(infos)

    def _seeds(self, seed: int | None) -> list[int | None]:
        return [None if seed is None else seed + row for row in range(self.num_envs)]

    def step(self, actions: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, dict[str, Any]]:
        """One step in every row."""
        parts = np.split(np.asarray(actions), self._ends[:-1])
        found = [env.step(part) for env, part in zip(self.envs, parts, strict=True)]
        self._observations = [each[0] for each in found]
        arrays = [np.concatenate(part) for part in zip(*(each[:4] for each in found), strict=True)]
        return arrays[0], arrays[1], arrays[2], arrays[3], self._joined([each[4] for each in found])

    def close_extras(self, **kwargs: Any) -> None:
        """Close them all."""
        for env in self.envs:
            env.close(**kwargs)

    def _joined(self, infos: list[dict[str, Any]]) -> dict[str, Any]:
        joined: dict[str, Any] = {}
        for key in {key: None for info in infos for key in info}:
            present = [info.get(key) for info in infos]
            if any(isinstance(each, dict) for each in present):
                joined[key] = self._joined([each or {} for each in present])
                continue
            like = next(each for each in present if each is not None)
            joined[key] = np.concatenate([
                np.zeros((env.num_envs, *like.shape[1:]), like.dtype) if each is None else each
                for env, each in zip(self.envs, present, strict=True)
            ])  # fmt: skip
        return joined


def metaopt(num_envs: int = 1, *, task: str | Sequence[str] = "digits", **arguments: Any) -> Vector:
    """MoEMetaOpt-v0's vector face: `num_envs` trainings of a task, or of several tasks in equal shares."""
    if isinstance(task, str):
        return MoEMetaOptVectorEnv(num_envs, task=task, **arguments)
    if not 0 < len(task) <= num_envs:
        raise ValueError(f"task={task!r}: {len(task)} tasks for {num_envs} rows")
    shares = [len(part) for part in np.array_split(np.arange(num_envs), len(task))]
    return MixedVectorEnv(
        [MoEMetaOptVectorEnv(share, task=each, **arguments) for share, each in zip(shares, task, strict=True)]
    )
