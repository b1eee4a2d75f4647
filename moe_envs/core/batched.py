"""Base classes: a problem is implemented once for `num_envs` rows and used via `BatchedEnv` or `SingleEnv`.

A problem has three hooks: `_begin(rows)` starts episodes in those rows, `_advance(actions)` makes one step in all rows,
`_observe()` returns the observations of all rows. Ended rows may be advanced once more before their reset; the
result is discarded.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import deepcopy
from inspect import signature
from typing import Annotated, Any, ClassVar, NamedTuple, Self, TypedDict

import gymnasium
import numpy as np
from annotated_types import Ge, Le
from gymnasium import logger, spaces
from gymnasium.error import InvalidAction, ResetNeeded
from gymnasium.utils import seeding
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space

from cost.arguments import Count, choose, validated
from moe_envs.core.rendering import Picture
from moe_envs.core.reward import Reward
from moe_envs.core.spaces import Layout, box, check_actions

State = dict[str, Any]
Rows = Annotated[int, Ge(1), Le(2**20)]


class Face(TypedDict, total=False):
    """Arguments of all vector environments."""

    autoreset_mode: str | AutoresetMode
    max_episode_steps: Count | None
    render_mode: Any


class Outcome(NamedTuple):
    """One step of n rows: `quality [n]`, `cost [n, 3]` in s, B and J, `terminated [n]`, further arrays for `info`.

    `priced` has relative costs `[n]` and vector rewards `[n, 4]` if the problem has already looked them up.
    """

    quality: np.ndarray
    cost: np.ndarray
    terminated: np.ndarray
    details: dict[str, np.ndarray]
    priced: tuple[np.ndarray, np.ndarray] | None = None


class BatchedEnv(VectorEnv[np.ndarray, np.ndarray, np.ndarray]):
    """Vector environment: seeding per row, autoreset in Gymnasium's three modes, time limit, reward and `info`.

    Row i of `reset(seed=s)` equals the single environment of `reset(seed=s + i)`, bit for bit.
    """

    metadata: dict[str, Any] = {"render_modes": [], "autoreset_mode": AutoresetMode.NEXT_STEP}
    # rates actions by parts of the observation: of one number an action times a weight, or by a map [size, actions]
    advice: Mapping[str, float | np.ndarray] = {}
    STATE: ClassVar[tuple[str, ...]] = ()  # names of the state attributes, one array [n, ...] each
    INNER: ClassVar[tuple[str, ...]] = ()  # names of attributes with `state()`, `fits(state)` and `restore(state)`

    def __init_subclass__(cls, **arguments: Any) -> None:
        """Validate the arguments of a problem by the annotations of its `__init__`."""
        super().__init_subclass__(**arguments)
        if "__init__" in vars(cls):
            cls.__init__ = validated(cls.__init__)  # type: ignore[method-assign]

    def __new__(cls, *_: Any, **arguments: Any) -> Self:
        """Reject unknown arguments with a suggestion."""
        named = [name for name, each in signature(cls.__init__).parameters.items() if each.kind is each.KEYWORD_ONLY]
        for argument in arguments:
            if argument not in ("num_envs", *Face.__annotations__):
                choose("argument", argument, named)
        return super().__new__(cls)

    @validated
    def __init__(
        self,
        num_envs: Rows,
        observation_layout: Layout,
        action_space: spaces.Space[Any],
        reward: Reward,
        autoreset_mode: str | AutoresetMode = AutoresetMode.NEXT_STEP,
        max_episode_steps: Count | None = None,
        render_mode: Any = None,
    ) -> None:
        if render_mode is not None:
            raise ValueError(f"render_mode={render_mode!r}: a vector environment does not render, a single one does")
        self.num_envs = num_envs
        self.observation_layout = observation_layout
        self.single_observation_space = box(observation_layout)
        self.single_action_space = action_space
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self.action_space = batch_space(action_space, num_envs)
        self._limit = np.uint64(action_space.n if isinstance(action_space, spaces.Discrete) else 0)
        self.reward = reward
        self.autoreset_mode = AutoresetMode(
            choose(
                "autoreset_mode",
                getattr(autoreset_mode, "value", autoreset_mode),
                [each.value for each in AutoresetMode],
            )
        )
        self.metadata = {**self.metadata, "autoreset_mode": self.autoreset_mode}
        self.max_episode_steps = max_episode_steps
        self.generators: list[np.random.Generator] = []
        self._elapsed = np.zeros(num_envs, dtype=np.int64)
        self._done = np.zeros(num_envs, dtype=np.bool_)
        self._any_done = False
        self._everywhere = np.ones(num_envs, dtype=np.bool_)
        self._rows = np.arange(num_envs)
        self._masks: list[str] = []
        self._draws = np.zeros((num_envs, 0), dtype=np.int64)
        self._drawn = np.zeros(num_envs, dtype=np.int64)

    def _begin(self, rows: np.ndarray) -> None:
        raise NotImplementedError

    def _advance(self, actions: np.ndarray) -> Outcome:
        raise NotImplementedError

    def _observe(self) -> np.ndarray:
        raise NotImplementedError

    def reset(
        self, *, seed: int | Sequence[int | None] | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        """Start episodes in all rows, or those in `options["reset_mask"]`; row i is seeded with seed + i."""
        rows = self._reset_rows((options or {}).get("reset_mask"))
        self._seed(rows, seed)
        self._restart(rows)
        return self._observe(), {}

    def step(self, actions: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, dict[str, Any]]:
        """One step in every row; raises `InvalidAction` and changes nothing if an action is outside the space."""
        if not self.generators:
            raise ResetNeeded("call reset before step")
        actions = self._checked(actions)
        ended = self._done if self._any_done else None
        if ended is not None and self.autoreset_mode is AutoresetMode.DISABLED:
            raise ResetNeeded(f"rows {ended.nonzero()[0].tolist()} have ended: reset them by options['reset_mask']")
        if ended is not None and np.count_nonzero(ended) == self.num_envs:
            return self._restart_all()
        outcome = self._advance(actions)
        terms, terminated = self._terms(outcome), outcome.terminated
        reward = self.reward(terms["reward/quality"], terms["reward/cost"])
        truncated, live = self._out_of_time(), None
        if ended is not None:
            live = ~ended
            reward, terminated, truncated = np.where(live, reward, 0.0), terminated & live, truncated & live
            self._restart(ended.nonzero()[0])
        self._done = terminated | truncated
        self._any_done = bool(np.count_nonzero(self._done))
        observation = self._observe()
        if self._any_done and self.autoreset_mode is AutoresetMode.SAME_STEP:
            observation, infos = self._reset_in_step(observation, terms)
        else:
            infos = self._vector_info(terms, live)
        return observation, reward, terminated, truncated, infos

    def state(self) -> State:
        """Copy of the full state, for forks, undo and checkpoints."""
        if not self.generators:
            raise ResetNeeded("call reset before state")
        arrays = {name: getattr(self, name) for name in self._state_names()}
        found = deepcopy({"arrays": arrays, "generators": [g.bit_generator.state for g in self.generators]})
        return found | {name: getattr(self, name).state() for name in self.INNER}

    def restore(self, state: State) -> np.ndarray:
        """Restore a `state()` of an environment with the same arguments; returns its observations."""
        self.check_state(state)
        for name in self.INNER:
            getattr(self, name).restore(state[name])
        arrays, generators = deepcopy(state["arrays"]), deepcopy(state["generators"])
        for name, array in arrays.items():
            setattr(self, name, array)
        self.generators = [np.random.Generator(np.random.PCG64()) for _ in generators]
        for generator, saved in zip(self.generators, generators, strict=True):
            generator.bit_generator.state = saved
        self._any_done = bool(self._done.any())
        return self._observe()

    def check_state(self, state: Any, parts: tuple[str, ...] = ()) -> None:
        """Raise `ValueError` for what is no state of this class with as many rows, and with these further parts."""
        try:
            fits = set(state) >= {*parts, *self.INNER} and set(state["arrays"]) == set(self._state_names())
            for name, array in state["arrays"].items():
                mine = getattr(self, name)
                fits = fits and array.dtype == mine.dtype and (array.shape == mine.shape or name == "_draws")
                fits = fits and array.ndim == mine.ndim and (name != "_draws" or len(array) == self.num_envs)
            fits = fits and len(state["generators"]) == self.num_envs
            fits = fits and all(getattr(self, name).fits(state[name]) for name in self.INNER)
            for saved in state["generators"]:
                np.random.PCG64().state = saved
        except (TypeError, KeyError, ValueError, AttributeError, IndexError, OverflowError):
            fits = False
        if not fits:
            raise ValueError(f"restore: not a state of {type(self).__name__} with {self.num_envs} rows")

    def _state_names(self) -> tuple[str, ...]:
        return ("_elapsed", "_done", "_draws", "_drawn", *self.STATE)

    def _draw(self, rows: np.ndarray, high: int, block: int = 256) -> np.ndarray:
        """One random integer below `high` per row from the row's own generator, drawn in blocks of `block`."""
        if self._draws.shape[1] != block:
            self._draws, self._drawn[:] = np.zeros((self.num_envs, block), dtype=np.int64), block
        drawn = self._drawn.take(rows)
        if np.count_nonzero(drawn == block):
            for row in rows[drawn == block]:
                self._draws[row], self._drawn[row] = self.generators[row].integers(high, size=block), 0
            drawn = self._drawn.take(rows)
        self._drawn[rows] = drawn + 1
        return self._draws.take(rows * block + drawn)

    def draw_one(self, row: int, high: int, block: int = 256) -> int:
        """Version of `_draw` for one row without arrays."""
        drawn = self._drawn.item(row)
        if drawn >= self._draws.shape[1]:
            return int(self._draw(np.array([row]), high, block)[0])
        self._drawn[row] = drawn + 1
        return self._draws.item(row, drawn)

    def _reset_rows(self, mask: np.ndarray | None) -> np.ndarray:
        if mask is None:
            return np.arange(self.num_envs)
        self.check_mask(mask, self.num_envs)
        if not self.generators:
            raise ResetNeeded("the first reset must be of all rows, without a reset_mask")
        return mask.nonzero()[0]

    @staticmethod
    def check_mask(mask: Any, rows: int) -> None:
        """Raise `ValueError` for an invalid `reset_mask`."""
        if not isinstance(mask, np.ndarray) or mask.dtype != np.bool_ or mask.shape != (rows,) or not mask.any():
            raise ValueError(f"reset_mask must be a boolean array [{rows}] with a True, got {mask!r}")

    def _seed(self, rows: np.ndarray, seed: int | Sequence[int | None] | None) -> None:
        if isinstance(seed, (int, np.integer)):
            seeds: Sequence[int | None] = [int(seed) + row for row in range(self.num_envs)]
        else:
            seeds = [None] * self.num_envs if seed is None else list(seed)
        if len(seeds) != self.num_envs:
            raise ValueError(f"{len(seeds)} seeds for {self.num_envs} rows")
        if not self.generators:
            self.generators = [seeding.np_random(value)[0] for value in seeds]
            return
        for row in rows:
            if seeds[row] is not None:
                self.use_generator(row, seeding.np_random(seeds[row])[0])

    def use_generator(self, row: int, generator: np.random.Generator) -> None:
        """Set the random generator of a row."""
        if not self.generators:
            self.generators = [np.random.default_rng() for _ in range(self.num_envs)]
        if self.generators[row] is not generator:
            self.generators[row] = generator
            self._drawn[row] = self._draws.shape[1]

    def _restart(self, rows: np.ndarray) -> None:
        self._elapsed[rows] = 0
        self._done[rows] = False
        self._any_done = bool(np.count_nonzero(self._done))
        self._begin(rows)

    def _checked(self, actions: object) -> np.ndarray:
        """`check_actions` with a fast path for integers below a common limit."""
        array = np.asarray(actions)
        if not self._limit or array.dtype != np.int64 or array.shape != self._done.shape:
            return check_actions(self.action_space, array)
        if np.count_nonzero(array.view(np.uint64) >= self._limit):  # negative values become huge
            raise InvalidAction(f"action {actions!r} is not in {self.action_space}")
        return array

    def _out_of_time(self) -> np.ndarray:
        if self.max_episode_steps is None:
            return np.zeros(self.num_envs, dtype=np.bool_)
        self._elapsed += 1
        return self._elapsed >= self.max_episode_steps

    def ended(self) -> bool:
        """Whether a row has ended and was not reset."""
        return self._any_done

    def _restart_all(self) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, dict[str, Any]]:
        self._restart(self._rows)
        running = np.zeros((2, self.num_envs), dtype=np.bool_)
        return self._observe(), np.zeros(self.num_envs), running[0], running[1], {}

    def _reset_in_step(self, final: np.ndarray, terms: dict[str, np.ndarray]) -> tuple[np.ndarray, dict[str, Any]]:
        ended = self._done.copy()
        final_obs = np.full(self.num_envs, None, dtype=object)
        for row in ended.nonzero()[0]:
            final_obs[row] = final[row]
        infos = self._vector_info(terms, ~ended)
        infos |= {"final_obs": final_obs, "_final_obs": ended}
        infos |= {"final_info": self._vector_info(terms, ended), "_final_info": ended.copy()}
        self._restart(ended.nonzero()[0])
        return self._observe(), infos

    def _terms(self, outcome: Outcome) -> dict[str, np.ndarray]:
        """Entries of `info` for a step."""
        if outcome.priced is None:
            relative, costs = self.reward.price(outcome.cost)
            vector = np.column_stack([outcome.quality, costs])
        else:
            relative, vector = outcome.priced
        terms = {
            "reward/quality": outcome.quality,
            "reward/cost": relative,
            "cost/time": outcome.cost[:, 0],
            "cost/memory": outcome.cost[:, 1],
            "cost/energy": outcome.cost[:, 2],
            "vector_reward": vector,
            **outcome.details,
        }
        if self.reward.normalizer is not None:
            terms["reward/normalized_cost"] = self.reward.normalized(relative)
        return terms

    def _vector_info(self, terms: dict[str, np.ndarray], valid: np.ndarray | None) -> dict[str, Any]:
        """Convert to Gymnasium's vector info: an array per key, 0 in rows without it, and the mask under `_key`."""
        if valid is None:
            valid = self._everywhere.copy()
        elif valid.any():
            rows = {1: valid, 2: valid[:, None]}
            terms = {key: np.where(rows[array.ndim], array, 0) for key, array in terms.items()}
        else:
            return {}
        if not self._masks:
            self._masks = [f"_{key}" for key in terms]
        terms.update(dict.fromkeys(self._masks, valid))
        return terms


class SingleEnv(gymnasium.Env[np.ndarray, Any]):
    """Single environment of a `BatchedEnv` class with Gymnasium's `Env` API."""

    vector_class: ClassVar[type[BatchedEnv]]
    PARTS: ClassVar[tuple[str, ...]] = ()  # lists that `state()` has beside the vector's, attributes with a _
    observation_layout: Layout
    metadata: dict[str, Any] = {"render_modes": ["rgb_array", "ansi"], "render_fps": 4}

    def __init__(self, *, render_mode: str | None = None, **arguments: Any) -> None:
        if render_mode is not None:
            choose("render_mode", render_mode, self.metadata["render_modes"])
        if "max_episode_steps" in arguments:
            raise ValueError(
                "max_episode_steps is an argument of gymnasium.make, which wraps the environment in a limit"
            )
        self.render_mode = render_mode
        self.vector = self.vector_class(num_envs=1, autoreset_mode=AutoresetMode.DISABLED, **arguments)
        self.observation_layout = self.vector.observation_layout
        self.observation_space = self.vector.single_observation_space
        self.action_space = self.vector.single_action_space

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        """Start an episode."""
        self._seed(seed)
        observation, _ = self.vector.reset()
        return observation[0], {}

    def _seed(self, seed: int | None) -> None:
        super().reset(seed=seed)
        self.vector.use_generator(0, self.np_random)

    def step(self, action: Any) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        """One step; raises `InvalidAction` and changes nothing if the action is outside the space."""
        if not self.vector.generators:
            raise ResetNeeded("call reset before step")
        if self.vector.ended():
            raise ResetNeeded("the episode has ended: call reset before step")
        check_actions(self.action_space, action)
        observation, reward, terminated, _, infos = self.vector.step(np.asarray(action)[None])
        info = {key: value[0] if value.ndim > 1 else value[0].item() for key, value in infos.items() if key[0] != "_"}
        return observation[0], reward[0].item(), terminated[0].item(), False, info

    def state(self) -> State:
        """Copy of the full state, for forks, undo and checkpoints."""
        return self.vector.state() | {name: list(getattr(self, f"_{name}")) for name in self.PARTS}

    def restore(self, state: State) -> np.ndarray:
        """Restore a `state()` of an environment with the same arguments; returns its observation."""
        self.vector.check_state(state, self.PARTS)
        observation = self.vector.restore(state)[0]
        self.np_random = self.vector.generators[0]
        for name in self.PARTS:
            setattr(self, f"_{name}", list(state[name]))
        return observation

    def render(self) -> Any:
        """Render the episode so far, `[height, width, 3]` uint8 or text; without a mode, warn and return None."""
        if self.render_mode is None:
            logger.warn(
                "You are calling render method without specifying any render mode. You can specify the render_mode at "
                f'initialization, e.g. gym.make("{self.spec.id if self.spec else type(self).__name__}", '
                'render_mode="rgb_array")'
            )
            return None
        picture = self._picture()
        return picture.rgb_array() if self.render_mode == "rgb_array" else picture.ansi()

    def _picture(self) -> Picture:
        raise NotImplementedError
