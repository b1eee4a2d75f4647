"""Arguments of every registered environment, of the learners and of states: each junk value is named or harmless."""

import math
import operator
from collections.abc import Sequence
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

import annotated_types
import gymnasium
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agents.ppo import PPO, PPOSettings
from agents.reinforce import REINFORCE, ReinforceSettings
from cost.arguments import adapters_of, check
from moe_envs import SPECS
from tests.attack.conftest import SCALE, Outcomes, arguments_of, some

JUNK: dict[str, Any] = {
    "nan": math.nan, "inf": math.inf, "-inf": -math.inf, "complex": 1j, "huge": 10**400, "1e308": 1e308, "-1": -1,
    "0": 0, "1": 1, "2.5": 2.5, "-0.5": -0.5, "1e11": 10**11, "True": True, "False": False, "no": "no", "empty": "",
    "text": "x" * 300,
    "bytes": b"x", "none": None, "list": [], "list of none": [None], "nested": [[[1]]], "list of nan": [math.nan,
    1.0], "tuple": (1, 2, 3),
    "falling": (2.0, 1.0), "dict": {}, "set": {1}, "object": object(), "type": int, "function": len,
    "float32": np.float32(0.5),
    "int64": np.int64(3), "bool_": np.bool_(True), "array": np.arange(2.0), "empty array": np.zeros(0),
    "nan array": np.array([np.nan]),
    "0-d": np.array(0.25), "strings": np.array(["a"]), "datetime": np.datetime64("2020"), "path": "/", "nul": "a\0b",
    "surrogate": "\ud800",
}  # fmt: skip
SEVERAL = ("bundle", "cost_weight", "task")  # of which the vector face takes several
BOUNDS: dict[type, Any] = {annotated_types.Ge: operator.ge, annotated_types.Gt: operator.gt}
BOUNDS |= {annotated_types.Le: operator.le, annotated_types.Lt: operator.lt}


def fits(hint: Any, value: Any) -> bool:
    """Whether a value is of an annotation: the attack's own reading of it."""
    origin, parts = get_origin(hint), get_args(hint)
    if isinstance(value, np.generic | np.ndarray):
        value = value.tolist()
    if origin is Annotated:
        return fits(parts[0], value) and all(
            BOUNDS[type(each)](value, bound_of(each)) for each in parts[1:] if not isinstance(each, str)
        )
    if origin in (Union, UnionType):
        return any(fits(part, value) for part in parts)
    if origin is Literal:
        return value in parts
    if origin is tuple:
        return isinstance(value, list | tuple) and len(value) == len(parts) and all(map(fits, parts, value))
    if origin is Sequence:
        return isinstance(value, list | tuple) and all(fits(parts[0], each) for each in value)
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 2 * 10**308
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return hint is Any or isinstance(value, {None: NoneType}.get(hint, origin or hint))


def bound_of(bound: Any) -> float:
    return float(next(getattr(bound, name) for name in ("ge", "gt", "le", "lt") if hasattr(bound, name)))


def play(env: Any) -> str | None:
    """What is wrong with what an environment returns, if anything."""
    observation, _ = env.reset(seed=0)
    for _ in range(3):
        observation, reward, terminated, _, info = env.step(env.action_space.sample())
        if not np.isfinite(observation).all() or not np.isfinite(reward).all():
            return f"not finite: {reward}"
        if not all(np.isfinite(value).all() for key, value in info.items() if "/" in key):
            return f"not finite: {info}"
        if np.any(terminated):
            break
    return None


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("env_id", list(SPECS))
@pytest.mark.parametrize("face", ["single", "vector"])
def test_arguments_of_environments(env_id: str, face: str, attack: Outcomes) -> None:
    small = dict(SPECS[env_id].small)
    hints = arguments_of(env_id)
    if face == "vector":
        hints |= {"num_envs": Annotated[int, annotated_types.Ge(1)], "autoreset_mode": str}
        hints |= {"max_episode_steps": Annotated[int, annotated_types.Ge(1)] | None}

    def make(**kwargs: Any) -> Any:
        if face == "single":
            return gymnasium.make(env_id, disable_env_checker=True, **small | kwargs).unwrapped
        kwargs = {"num_envs": 2} | small | kwargs
        return gymnasium.make_vec(env_id, vectorization_mode="vector_entry_point", **kwargs)

    for number, (argument, hint) in enumerate(hints.items()):
        for name, junk in some(JUNK.items(), 5, number):
            if argument == "num_envs" and name == "1e11":
                continue  # a number; no memory has so many rows

            several = face == "vector" and argument in SEVERAL and isinstance(junk, tuple) and bool(junk)

            def wrong(env: Any, hint: Any = hint, junk: Any = junk, several: bool = several) -> str | None:
                if not all(fits(hint, each) for each in (junk if several else [junk])):
                    return "accepted"
                return play(env)

            clear = (ValueError, RuntimeError, FileNotFoundError)
            attack.attempt(
                f"{argument}={name}", lambda argument=argument, junk=junk: make(**{argument: junk}), wrong, clear,
                argument if not fits(hint, junk) else "",
            )  # fmt: skip


@pytest.mark.parametrize("env_id", list(SPECS))
def test_unknown_arguments(env_id: str, attack: Outcomes) -> None:
    for argument in ("cost_wieght", "x" * 300, "self", "cls", "_", "env_id", "kwargs", "face"):
        attack.attempt(
            argument, lambda argument=argument: gymnasium.make(env_id, **{argument: 1}), lambda env: "accepted",
            (ValueError, TypeError),
        )  # fmt: skip


@pytest.mark.parametrize("env_id", list(SPECS))
def test_calls_of_environments(env_id: str, attack: Outcomes) -> None:
    single: Any = gymnasium.make(env_id, **SPECS[env_id].small).unwrapped
    single.reset(seed=0)
    state, other = single.state(), gymnasium.make(env_id, **SPECS[env_id].small).unwrapped
    states: dict[str, Any] = {
        **JUNK,
        "empty arrays": {"arrays": {}, "generators": []},
        "no generators": state | {"generators": []},
    }
    for key in state["arrays"]:
        states[f"without {key}"] = state | {"arrays": {k: v for k, v in state["arrays"].items() if k != key}}
        if state["arrays"][key].size and key != "_draws":  # which is drawn anew
            states[f"{key} cut"] = state | {"arrays": state["arrays"] | {key: state["arrays"][key][..., :0]}}
        states[f"{key} of text"] = state | {"arrays": state["arrays"] | {key: "x"}}
    states |= {f"without {key}": {k: v for k, v in state.items() if k != key} for key in state}
    for name, junk in states.items():
        for env in (single, other):
            attack.attempt(
                f"restore {name}",
                lambda env=env, junk=junk: env.restore(junk),
                lambda seen: "accepted",
                names="restore",
            )
    seeds = {
        name: junk
        for name, junk in JUNK.items()
        if name not in ("none", "0", "1", "int64", "1e11", "huge", "True", "False")
    }
    for name, junk in seeds.items():
        attack.attempt(
            f"seed {name}",
            lambda junk=junk: single.reset(seed=junk),
            lambda seen: "accepted",
            (gymnasium.error.Error, ValueError, TypeError),
        )


@pytest.mark.parametrize("learner", [PPO, REINFORCE])
def test_arguments_of_learners(learner: type[PPO] | type[REINFORCE], attack: Outcomes) -> None:
    hints = get_type_hints(PPOSettings if learner is PPO else ReinforceSettings, include_extras=True)
    hints = {name: hint for name, hint in hints.items() if name != "whole_rollouts"}
    more = {
        "seed": Annotated[int, annotated_types.Ge(0)] | None,
        "n_envs": Annotated[int, annotated_types.Ge(1)],
        "verbose": int | bool,
    }
    for number, (argument, hint) in enumerate((hints | more).items()):
        for name, junk in some(JUNK.items(), 5, number):
            if argument == "n_envs" and name == "int64":
                continue
            attack.attempt(
                f"{argument}={name}",
                lambda argument=argument, junk=junk: learner("MlpPolicy", "CartPole-v1",
                **{"n_envs": 1} | {argument: junk}),
                lambda made, hint=hint, junk=junk: None if fits(hint, junk) else "accepted",
                names=argument if not fits(hint, junk) else "",
            )  # fmt: skip


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.complex_numbers() | st.text() | st.binary(),
    lambda inner: st.lists(inner) | st.tuples(inner, inner) | st.dictionaries(st.text(), inner),
    max_leaves=8,
)


def test_any_value_is_named_or_fits(attack: Outcomes) -> None:
    """What `cost.arguments` lets through is of the annotation, for whatever hypothesis thinks of."""
    hints = {f"{env_id} {name}": hint for env_id in SPECS for name, hint in arguments_of(env_id).items()}
    adapters = adapters_of(hints)

    @settings(max_examples=100 * SCALE, database=None)
    @given(VALUES)
    def one(value: Any) -> None:
        for name, hint in hints.items():
            attack.attempt(
                f"{name}={value!r}",
                lambda name=name: check(adapters, {name: value})[name],
                lambda found, hint=hint: None if fits(hint, found) else f"became {found!r}",
                names=name,
            )

    one()
