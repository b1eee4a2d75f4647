"""Combine vector environments into one, to train one policy on several similar problems."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from gymnasium import spaces
from gymnasium.vector import VectorEnv
from gymnasium.vector.utils import batch_space

from moe_envs.core.batched import BatchedEnv, State
from moe_envs.core.spaces import check_actions


class MixedVectorEnv(VectorEnv[np.ndarray, np.ndarray, np.ndarray]):
    """Concatenates the rows of several environments with equal autoreset modes and spaces; bounds of observations may
    differ, then the widest count.

    `reset(seed=s)` seeds row i with s + i. Entries of `info` that an environment lacks are 0 in its rows.
    """

    def __init__(self, envs: Sequence[BatchedEnv]) -> None:
        self.envs, first = list(envs), envs[0]  # before anything fails: gymnasium closes what is deleted
        both = [(env.single_observation_space, env.single_action_space) for env in envs]
        joint = _joint([each for each, _ in both])
        if joint is None or any(each != both[0][1] for _, each in both):
            raise ValueError("the environments' spaces differ")
        if any(env.autoreset_mode is not first.autoreset_mode for env in envs):
            raise ValueError("the environments' autoreset modes differ")
        self.metadata = first.metadata
        self.observation_layout, self.reward, self.advice = first.observation_layout, first.reward, first.advice
        self.num_envs = sum(env.num_envs for env in envs)
        self._ends = np.cumsum([env.num_envs for env in envs]).tolist()
        self._rows = [slice(end - env.num_envs, end) for env, end in zip(envs, self._ends, strict=True)]
        self._observations: list[np.ndarray] = [np.zeros(0)] * len(envs)
        self.single_observation_space, self.single_action_space = joint, both[0][1]
        self.observation_space = batch_space(self.single_observation_space, self.num_envs)
        self.action_space = batch_space(self.single_action_space, self.num_envs)

    def reset(
        self, *, seed: int | Sequence[int | None] | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        """Start episodes in all rows, or in those of `options["reset_mask"]`."""
        if seed is None or isinstance(seed, int | np.integer):
            seeds: list[int | None] = [None if seed is None else int(seed) + row for row in range(self.num_envs)]
        else:
            seeds = list(seed)
        if len(seeds) != self.num_envs:
            raise ValueError(f"{len(seeds)} seeds for {self.num_envs} rows")
        mask = (options or {}).get("reset_mask")
        if mask is not None:
            self.envs[0].check_mask(mask, self.num_envs)
        infos: list[dict[str, Any]] = [{} for _ in self.envs]
        for place, (env, rows) in enumerate(zip(self.envs, self._rows, strict=True)):
            if mask is None or mask[rows].any():
                given = options if mask is None else {**(options or {}), "reset_mask": mask[rows]}
                self._observations[place], infos[place] = env.reset(seed=seeds[rows], options=given)
        return np.concatenate(self._observations), self._joined(infos)

    def step(self, actions: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, dict[str, Any]]:
        """One step in every row; raises `InvalidAction`, and changes nothing, where an action is outside the space."""
        parts = np.split(check_actions(self.action_space, actions), self._ends[:-1])
        found = [env.step(part) for env, part in zip(self.envs, parts, strict=True)]
        self._observations = [each[0] for each in found]
        arrays = [np.concatenate(part) for part in zip(*(each[:4] for each in found), strict=True)]
        return arrays[0], arrays[1], arrays[2], arrays[3], self._joined([each[4] for each in found])

    def state(self) -> State:
        """A copy of everything that the next steps depend on."""
        return {"mixed": [env.state() for env in self.envs]}

    def restore(self, state: State) -> np.ndarray:
        """Go back to a `state()` of an environment with the same arguments; returns the observations there."""
        if len(state.get("mixed", ())) != len(self.envs):
            raise ValueError(f"not a state of {len(self.envs)} environments side by side")
        self._observations = [env.restore(each) for env, each in zip(self.envs, state["mixed"], strict=True)]
        return np.concatenate(self._observations)

    def close_extras(self, **kwargs: Any) -> None:
        """Close them all."""
        for env in self.envs:
            env.close(**kwargs)

    def _joined(self, infos: list[dict[str, Any]]) -> dict[str, Any]:
        joined: dict[str, Any] = {}
        for key in {key: None for info in infos for key in info}:
            present = [info.get(key) for info in infos]
            like = next(each for each in present if each is not None)
            if isinstance(like, dict):
                joined[key] = self._joined([each or {} for each in present])
                continue
            joined[key] = np.concatenate([
                np.zeros((env.num_envs, *like.shape[1:]), like.dtype) if each is None else each
                for env, each in zip(self.envs, present, strict=True)
            ])  # fmt: skip
        return joined


def _joint(found: Sequence[spaces.Space[Any]]) -> spaces.Space[Any] | None:
    """The space of all observations; None if they differ in more than their bounds."""
    first = found[0]
    if all(each == first for each in found):
        return first
    boxes = [each for each in found if isinstance(each, spaces.Box)]
    if len(boxes) < len(found) or any((each.shape, each.dtype) != (first.shape, first.dtype) for each in boxes):
        return None
    low, high = np.min([each.low for each in boxes], axis=0), np.max([each.high for each in boxes], axis=0)
    return spaces.Box(low, high, dtype=boxes[0].dtype.type)
