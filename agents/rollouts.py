"""Vectorised rows of any Gymnasium environment, and rollouts of a policy."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import gymnasium
import numpy as np
from gymnasium.spaces import Box
from gymnasium.vector import AsyncVectorEnv, AutoresetMode, SyncVectorEnv, VectorEnv

from agents.evaluate import spec_of

# Flat observations, the policy's state, masks or None: actions and the next state.
Act = Callable[[np.ndarray, np.ndarray, np.ndarray | None], tuple[np.ndarray, np.ndarray]]


class NotFiniteError(ArithmeticError):
    """A reward, observation, action or loss is NaN or infinite; the message names it."""


class Step(NamedTuple):
    """`observations` to act on next; `finals`, those at the end of the step; the rest `[n]`, `starts` is True where the
    next observation is an episode's first."""

    observations: np.ndarray
    finals: np.ndarray
    reward: np.ndarray
    terminated: np.ndarray
    truncated: np.ndarray
    starts: np.ndarray
    infos: dict[str, Any]


class Rows:
    """Vector environment with autoreset in any autoreset mode.

    In mode NEXT_STEP, an ended row uses one step for its reset; `resetting` marks rows that reset in the next step.
    """

    def __init__(self, env: VectorEnv[Any, Any, Any]) -> None:
        self.env, self.count = env, env.num_envs
        self.name = env.spec.id if env.spec else type(env.unwrapped).__name__
        self.mode = env.metadata.get("autoreset_mode", AutoresetMode.NEXT_STEP)
        self.observation_space, self.action_space = env.single_observation_space, env.single_action_space
        self.resetting = np.zeros(self.count, dtype=np.bool_)
        self.has_state = env is env.unwrapped and hasattr(env, "state") and hasattr(env, "restore")
        self.has_masks = hasattr(env.unwrapped, "action_masks") or _singles_have_masks(env.unwrapped)

    def reset(self, seed: int, group_size: int = 1) -> np.ndarray:
        """Begin episodes in all rows; those of a group have the same seed."""
        self.resetting = np.zeros(self.count, dtype=np.bool_)
        seeds: Any = seed if group_size == 1 else [seed + row // group_size for row in range(self.count)]
        observations, _ = self.env.reset(seed=seeds)
        return np.asarray(observations)

    def masks(self) -> np.ndarray:
        """Masks `[n, size]` of allowed actions; all True in a row that is about to be reset."""
        env: Any = self.env.unwrapped
        found = env.action_masks() if hasattr(env, "action_masks") else env.call("action_masks")
        return np.asarray(found, dtype=np.bool_).reshape(self.count, -1) | self.resetting[:, None]

    def clip(self, actions: np.ndarray) -> np.ndarray:
        """Clip actions to a Box."""
        space = self.action_space
        return np.clip(actions, space.low, space.high).astype(space.dtype) if isinstance(space, Box) else actions

    def step(self, actions: np.ndarray) -> Step:
        """One step in every row; values outside a Box are clipped."""
        observations, reward, terminated, truncated, infos = self.env.step(self.clip(actions))
        finals, done = observations, terminated | truncated
        starts = done
        if self.mode is AutoresetMode.NEXT_STEP:
            starts, self.resetting = self.resetting, done
        elif done.any():
            if self.mode is AutoresetMode.DISABLED:
                finals = observations.copy()
                observations, _ = self.env.reset(options={"reset_mask": done})
            else:
                finals = observations.copy()
                for row in done.nonzero()[0]:
                    finals[row] = infos["final_obs"][row]
                infos = _with_finals(infos, done)
        return Step(observations, finals, reward, terminated, truncated, starts, infos)


class Rollout(NamedTuple):
    """Steps `[time, rows, ...]` of a policy in all rows; observations are flat."""

    observations: np.ndarray
    actions: np.ndarray
    masks: np.ndarray | None
    rewards: np.ndarray
    terminated: np.ndarray
    truncated: np.ndarray
    starts: np.ndarray  # an episode's first step
    valid: np.ndarray  # False for reset steps
    discount: np.ndarray | None  # `info["discount"]`, where steps take different times
    infos: dict[str, np.ndarray]
    state: np.ndarray  # `[rows, ...]`, the policy's before the first step
    cut_steps: np.ndarray  # where episodes were truncated: their steps, rows, last observations, states of the policy
    cut_rows: np.ndarray
    cut_observations: np.ndarray
    cut_states: np.ndarray


class Collector:
    """Collects rollouts of a policy, continuing from the last step."""

    def __init__(
        self, rows: Rows, flatten: Callable[[np.ndarray], np.ndarray], begin: np.ndarray, group_size: int = 1
    ) -> None:
        self.rows, self._flatten, self.group_size = rows, flatten, group_size
        self.observations: np.ndarray | None = None  # to act on next, flat
        self.starts, self.policy_state, self._seed = np.ones(rows.count, dtype=np.bool_), begin, 0

    def state(self) -> dict[str, Any]:
        """State for `restore`; the seed for an environment without state."""
        env: Any = self.rows.env
        return {
            "observations": self.observations,
            "starts": self.starts,
            "policy": self.policy_state,
            "seed": self._seed,
            "resetting": self.rows.resetting,
            "env": env.state() if self.rows.has_state and self.observations is not None else None,
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Restore a `state()`; an environment without state starts the episodes of its seed."""
        if state["env"] is not None:
            env: Any = self.rows.env
            env.reset(seed=0)
            env.restore(state["env"])
            self.observations, self.starts, self.policy_state = state["observations"], state["starts"], state["policy"]
            self.rows.resetting = state["resetting"]
        elif state["observations"] is not None:
            self.begin(state["seed"])

    def begin(self, seed: int) -> None:
        """Begin episodes in all rows."""
        self.observations, self._seed = self._flatten(self.rows.reset(seed, self.group_size)), seed
        self.starts = np.ones(self.rows.count, dtype=np.bool_)
        self.policy_state = np.zeros_like(self.policy_state)

    def collect(self, steps: int, act: Act) -> Rollout:
        """Collect steps; raises `NotFiniteError` if a reward, observation or action is not finite."""
        flat, starts, state, rows = self.observations, self.starts, self.policy_state, self.rows
        assert flat is not None
        observations = np.empty((steps, *flat.shape), dtype=np.float32)
        rewards, discount = np.zeros((steps, rows.count)), None
        terminated, truncated, begins, valid = np.empty((4, steps, rows.count), dtype=np.bool_)
        masks: list[np.ndarray] = []
        actions: list[np.ndarray] = []
        infos: dict[str, np.ndarray] = {}
        cuts: list[tuple[np.ndarray, ...]] = []
        before, step = state, -1
        try:
            for step in range(steps):
                observations[step], begins[step] = flat, starts
                np.logical_not(rows.resetting, out=valid[step])
                if state.size:
                    state = state * ~starts[:, None]
                if rows.has_masks:
                    masks.append(rows.masks())
                chosen, state = act(flat, state, masks[-1] if masks else None)
                actions.append(chosen)
                made = rows.step(chosen)
                rewards[step], terminated[step], truncated[step] = made.reward, made.terminated, made.truncated
                if "discount" in made.infos or "discount" in made.infos.get("final_info", {}):
                    discount = np.ones_like(rewards) if discount is None else discount
                    discount[step] = _discount(made.infos, rows.count)
                for key, value in scalars(made.infos, rows.count).items():
                    infos.setdefault(key, np.zeros((steps, rows.count)))[step] = value
                if made.truncated.any() and (early := made.truncated & ~made.terminated).any():
                    places = early.nonzero()[0]
                    cuts.append((np.full(len(places), step), places, self._flatten(made.finals[places]), state[places]))
                flat, starts = self._flatten(made.observations), made.starts
        except Exception:
            self.observations = None  # restart if the training continues
            self._check(observations[: step + 1], actions, rewards[:step])
            raise
        self._check(observations, actions, rewards, flat)
        self.observations, self.starts, self.policy_state = flat, starts, state
        empty = (np.zeros(0, np.int64), np.zeros(0, np.int64), flat[:0], state[:0])
        cut = [np.concatenate(part) for part in zip(empty, *cuts, strict=True)]
        mask = np.array(masks) if masks else None
        return Rollout(
            observations,
            np.array(actions),
            mask,
            rewards,
            terminated,
            truncated,
            begins,
            valid,
            discount,
            infos,
            before,
            *cut,
        )

    def _check(
        self, observations: np.ndarray, actions: list[np.ndarray], rewards: np.ndarray, last: np.ndarray | None = None
    ) -> None:
        fields = {"reward": rewards, "observation": observations, "action": np.array(actions)}
        fields["observation after"] = np.zeros(0) if last is None else last[None]
        for field, values in fields.items():
            if values.dtype.kind == "f" and not np.isfinite(values).all():
                step, row = np.argwhere(~np.isfinite(values))[0][:2].tolist()
                step += (len(observations) - 1) * (field == "observation after")
                raise NotFiniteError(
                    f"{self.rows.name}: the {field} of row {row} at step {step} of this rollout is not finite; the "
                    "weights are those before it, the environment is where to look"
                )


def make_rows(
    env: str | gymnasium.Env[Any, Any] | VectorEnv[Any, Any, Any], count: int, kwargs: dict[str, Any]
) -> Rows:
    """Create rows from an id, natively vectorised if possible, or from an existing environment."""
    if isinstance(env, VectorEnv):
        return Rows(env)
    if isinstance(env, gymnasium.Env):
        return Rows(SyncVectorEnv([lambda: env], autoreset_mode=AutoresetMode.DISABLED))
    if spec_of(env).vector_entry_point is None:
        mode = {"autoreset_mode": AutoresetMode.DISABLED}
        made: Any = gymnasium.make_vec(env, count, vectorization_mode="sync", vector_kwargs=mode, **kwargs)
        if made.envs[0].has_wrapper_attr("reward_space"):
            raise ValueError(f"{env} has a vector of rewards, as MO-Gymnasium's: a learner needs one number")
        return Rows(made)
    native: dict[str, Any] = {"num_envs": count, "vectorization_mode": "vector_entry_point", **kwargs}
    try:
        return Rows(gymnasium.make_vec(env, autoreset_mode=AutoresetMode.DISABLED.value, **native))
    except TypeError:  # environments with a single autoreset mode
        return Rows(gymnasium.make_vec(env, **native))


def _singles_have_masks(env: Any) -> bool:
    """Whether each environment of a SyncVectorEnv or AsyncVectorEnv has action masks."""
    if isinstance(env, SyncVectorEnv):
        return all(each.has_wrapper_attr("action_masks") for each in env.envs)
    if isinstance(env, AsyncVectorEnv):  # the environments are in other processes: look at one more of them
        single = env.env_fns[0]()
        found = single.has_wrapper_attr("action_masks")
        single.close()
        return found
    return False


def scalars(infos: dict[str, Any], count: int) -> dict[str, np.ndarray]:
    """Scalars `[count]` in a vector info whose names have a slash, such as `cost/time`."""
    return {
        key: value
        for key, value in infos.items()
        if "/" in key
        and key[0] != "_"
        and isinstance(value, np.ndarray)
        and value.shape == (count,)
        and value.dtype.kind in "biuf"
    }


def _discount(infos: dict[str, Any], count: int) -> np.ndarray:
    """`info["discount"]` of each row, at the end of an episode that in `final_info`; 1 where there is none."""
    found = np.ones(count)
    for given in (infos, infos.get("final_info", {})):
        if "discount" in given:
            there = given.get("_discount", np.ones(count, dtype=np.bool_))
            found = np.where(there, given["discount"], found)
    return found


def _with_finals(infos: dict[str, Any], done: np.ndarray) -> dict[str, Any]:
    final = scalars(infos.get("final_info", {}), len(done))
    return infos | {key: np.where(done, value, infos.get(key, 0)) for key, value in final.items()}
