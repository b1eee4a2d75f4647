"""Vector environments side by side as one: one policy for several problems that look alike."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space

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
        if first.metadata["autoreset_mode"] is AutoresetMode.DISABLED:
            raise ValueError("environments that do not reset themselves cannot be mixed")
        self.envs, self.metadata = list(envs), first.metadata
        self.num_envs = sum(env.num_envs for env in envs)
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
        """Start episodes in all rows."""
        seeds = (
            [None if seed is None else seed + row for row in range(self.num_envs)]
            if isinstance(seed, int | None)
            else list(seed)
        )
        found = [
            env.reset(seed=seeds[end - env.num_envs : end], options=options)  # type: ignore[arg-type]
            for env, end in zip(self.envs, self._ends, strict=True)
        ]
        return np.concatenate([observation for observation, _ in found]), self._joined([info for _, info in found])

    def step(self, actions: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, dict[str, Any]]:
        """One step in every row."""
        parts = np.split(np.asarray(actions), self._ends[:-1])
        found = [env.step(part) for env, part in zip(self.envs, parts, strict=True)]
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
