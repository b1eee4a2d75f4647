"""Rules for every registered environment: checkers, determinism, two faces, pickling, documentation."""

import ast
import copy
import hashlib
import inspect
import itertools
import json
import os
import pickle
import random
import re
import subprocess
import sys
import warnings
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium import spaces
from gymnasium.envs.registration import EnvSpec
from gymnasium.error import InvalidAction, ResetNeeded
from gymnasium.utils.env_checker import check_env
from gymnasium.vector import AutoresetMode
from stable_baselines3.common.env_checker import check_env as sb3_check_env

from moe_envs import SPECS

IDS = [f"moe_envs:{name}" for name in SPECS]
REPEATABLE = [f"moe_envs:{name}" for name, spec in SPECS.items() if not spec.nondeterministic]
HEADINGS = ["Description", "Action Space", "Observation Space", "Rewards", "Starting State", "Episode End", "Arguments"]
SMALL = {f"moe_envs:{name}": dict(spec.small) for name, spec in SPECS.items()}
SHORT = {f"moe_envs:{name}": dict(spec.short) for name, spec in SPECS.items()}  # episodes of four steps
VARIANTS = [(f"moe_envs:{name}", {**spec.small, **more}) for name, spec in SPECS.items() for more in spec.variants]
DEAR = {f"moe_envs:{name}-v0" for name in ("MoEAutoRate", "MoEExpertCache", "MoELayerTopK")}  # of 10 ms a step
MODES = [mode.value for mode in AutoresetMode]

each_variant = pytest.mark.parametrize(("env_id", "kwargs"), VARIANTS, ids=lambda value: str(value))
each_id = pytest.mark.parametrize("env_id", IDS)
each_repeatable = pytest.mark.parametrize("env_id", REPEATABLE)


def make(env_id: str, **kwargs: Any) -> gymnasium.Env[np.ndarray, Any]:
    return gymnasium.make(env_id, **(SMALL[env_id] | kwargs))


def zeros(space: gymnasium.Space[Any]) -> Any:
    """An action of zeros."""
    return np.zeros(space.shape, dtype=np.int64) if space.shape else 0


def digest(env_id: str, **kwargs: Any) -> str:
    """A hash of everything that 100 steps return."""
    env, found = make(env_id, **kwargs), hashlib.sha256()
    env.action_space.seed(5)
    observation, _ = env.reset(seed=5)
    for _ in range(100):
        observation, reward, terminated, truncated, info = env.step(env.action_space.sample())
        found.update(observation.tobytes() + repr((reward, terminated, {k: str(v) for k, v in info.items()})).encode())
        if terminated or truncated:
            env.reset()
    return found.hexdigest()


@each_variant
@pytest.mark.parametrize("render_mode", ["rgb_array", "ansi", None])
def test_both_checkers_are_silent(env_id: str, kwargs: dict[str, Any], render_mode: str | None) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_env(make(env_id, **kwargs, render_mode=render_mode).unwrapped)
        sb3_check_env(make(env_id, **kwargs))


@each_variant
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("rows", [1, 3, 16])
def test_vector_equals_single(
    env_id: str, kwargs: dict[str, Any], mode: str, rows: int, assert_same: Callable[[Any, Any], None]
) -> None:
    native = gymnasium.make_vec(
        env_id, rows, vectorization_mode="vector_entry_point", autoreset_mode=mode, max_episode_steps=6, **kwargs
    )
    single = gymnasium.make_vec(
        env_id,
        rows,
        vectorization_mode="sync",
        vector_kwargs={"autoreset_mode": mode},
        wrappers=[lambda env: gymnasium.wrappers.TimeLimit(env, 6)],
        **kwargs,
    )
    assert_same(native.reset(seed=11), single.reset(seed=11))
    native.action_space.seed(0)
    for step in range(40):
        actions = native.action_space.sample()
        ours, theirs = native.step(actions), single.step(actions)
        assert_same(ours, theirs)
        ended = ours[2] | ours[3]
        if mode == AutoresetMode.DISABLED.value and (ended.any() or step == 3):
            ended[0] |= step == 3  # rows out of step with each other from here on
            reset = [env.reset(options={"reset_mask": ended.copy()})[0][ended] for env in (native, single)]
            assert_same(*reset)


@each_repeatable
def test_natural_episodes_of_the_vector_equal_the_single_one(
    env_id: str, assert_same: Callable[[Any, Any], None]
) -> None:
    kwargs = SMALL[env_id] | SHORT[env_id]
    native = gymnasium.make_vec(env_id, 3, vectorization_mode="vector_entry_point", **kwargs)
    single = gymnasium.make_vec(env_id, 3, vectorization_mode="sync", **kwargs)
    assert_same(native.reset(seed=2), single.reset(seed=2))
    native.action_space.seed(0)
    for _ in range(200 if env_id in DEAR else 1500):  # 1,500: past the first block of what a row draws
        actions = native.action_space.sample()
        assert_same(native.step(actions), single.step(actions))


@pytest.fixture(scope="module")
def elsewhere() -> list[dict[str, str]]:
    """Digests by environment, of two other processes."""
    code = (
        "import json, sys, torch; torch.set_num_threads(int(sys.argv[1]))\n"
        "from tests.moe_envs.test_registry import REPEATABLE, digest\n"
        "print(json.dumps({env_id: digest(env_id) for env_id in REPEATABLE}))"
    )
    found = []
    for threads, hash_seed in (("1", "0"), ("2", "1")):
        environment = {**os.environ, "PYTHONHASHSEED": hash_seed, "PYTHONPATH": os.getcwd()}
        run = [sys.executable, "-c", code, threads]
        done = subprocess.run(run, env=environment, capture_output=True, text=True, check=True)
        found.append(json.loads(done.stdout))
    return found


@each_repeatable
def test_digest_does_not_depend_on_process_threads_or_hash_seed(env_id: str, elsewhere: list[dict[str, str]]) -> None:
    assert [each[env_id] for each in elsewhere] == [digest(env_id)] * 2


@each_id
def test_spec_survives_json(env_id: str) -> None:
    more: dict[str, Any] = {"initial_rate": [0.001, 0.1]} if "MetaOpt" in env_id else SHORT[env_id]
    env = make(env_id, cost_weight=0.3, **more)
    assert env.spec is not None
    again = gymnasium.make(EnvSpec.from_json(env.spec.to_json()))
    assert again.unwrapped.vector.reward.cost_weight == 0.3  # type: ignore[attr-defined]
    assert json.loads(env.spec.to_json())["kwargs"].items() >= more.items()


@each_variant
@pytest.mark.parametrize("copier", [copy.deepcopy, lambda env: pickle.loads(pickle.dumps(env))])
def test_copies_go_on_alike_from_mid_episode(
    env_id: str,
    kwargs: dict[str, Any],
    copier: Callable[[Any], Any],
    assert_same: Callable[[Any, Any], None],
) -> None:
    for env in (
        make(env_id, **kwargs),
        gymnasium.make_vec(env_id, 3, vectorization_mode="vector_entry_point", **kwargs),
    ):
        env.reset(seed=1)
        env.action_space.seed(1)
        actions = [env.action_space.sample() for _ in range(30)]
        for action in actions[:3]:
            env.step(action)
        twin = copier(env)
        for action in actions[3:]:
            results = env.step(action), twin.step(action)
            assert_same(*results)
            if results[0][2] is True:
                assert_same(env.reset(), twin.reset())


@each_variant
def test_state_and_restore_undo_steps(
    env_id: str, kwargs: dict[str, Any], assert_same: Callable[[Any, Any], None]
) -> None:
    env = make(env_id, **kwargs).unwrapped
    env.reset(seed=1)
    env.action_space.seed(1)
    actions = [env.action_space.sample() for _ in range(5)]
    last = [env.step(action) for action in actions[:2]][-1][0]
    state = env.state()  # type: ignore[attr-defined]
    first = [env.step(action) for action in actions], env.reset()
    np.testing.assert_array_equal(env.restore(state), last)  # type: ignore[attr-defined]
    assert_same(([env.step(action) for action in actions], env.reset()), first)


@each_variant
def test_action_outside_the_space_changes_nothing(
    env_id: str, kwargs: dict[str, Any], assert_same: Callable[[Any, Any], None]
) -> None:
    env, twin = make(env_id, **kwargs), make(env_id, **kwargs)
    for each in (env, twin):
        each.reset(seed=3)
    space = env.action_space  # the least that is too large, of our Discrete, MultiDiscrete and MultiBinary
    limit = int(space.nvec.max()) if isinstance(space, spaces.MultiDiscrete) else int(getattr(space, "n", 3))
    for wrong in (-1, limit, 999, 1.5, None, "a", np.full(8, 2), np.zeros(3, dtype=np.int8), np.nan):
        with pytest.raises(InvalidAction):
            env.step(wrong)
    action = env.action_space.sample()
    assert_same(env.step(action), twin.step(action))
    vector = gymnasium.make_vec(env_id, 3, vectorization_mode="vector_entry_point", **kwargs)
    vector.reset(seed=0)
    before = vector.unwrapped.state()  # type: ignore[attr-defined]
    with pytest.raises(InvalidAction):
        vector.step(np.full(vector.action_space.shape, limit))
    with pytest.raises(InvalidAction):
        vector.step(np.full(vector.action_space.shape, -1))
    assert_same(vector.unwrapped.state(), before)  # type: ignore[attr-defined]


@each_id
def test_steps_outside_an_episode_are_refused(env_id: str) -> None:
    env = make(env_id, **SHORT[env_id])
    with pytest.raises(ResetNeeded):
        env.unwrapped.step(zeros(env.action_space))
    with pytest.raises(ResetNeeded):
        env.unwrapped.state()  # type: ignore[attr-defined]
    env.reset()
    while not env.step(zeros(env.action_space))[2]:
        pass
    with pytest.raises(ResetNeeded):
        env.step(zeros(env.action_space))
    vector = gymnasium.make_vec(
        env_id, 2, vectorization_mode="vector_entry_point", autoreset_mode="Disabled", **(SMALL[env_id] | SHORT[env_id])
    )
    with pytest.raises(ResetNeeded):
        vector.step(zeros(vector.action_space))
    with pytest.raises(ResetNeeded):
        vector.reset(options={"reset_mask": np.array([True, False])})
    vector.reset()
    while not (ended := vector.step(zeros(vector.action_space))[2]).any():
        pass
    with pytest.raises(ResetNeeded, match=re.escape(str(ended.nonzero()[0].tolist()))):
        vector.step(zeros(vector.action_space))


@each_id
def test_reward_is_recomputed_from_info(env_id: str) -> None:
    env = make(env_id, cost_weight=0.3, time_weight=0.2, memory_weight=0.5, energy_weight=0.3)
    env.reset(seed=0)
    for _ in range(100):  # no episode of the small ones is as long
        _, reward, terminated, _, info = env.step(env.action_space.sample())
        assert reward == pytest.approx(info["reward/quality"] - 0.3 * info["reward/cost"], rel=1e-12)
        weights = np.array([1, 0.3 * 0.2, 0.3 * 0.5, 0.3 * 0.3])
        assert reward == pytest.approx(info["vector_reward"] @ weights, rel=1e-12)
        if terminated:
            break
    assert terminated


@each_id
def test_observations_lie_in_bounds_and_nothing_returned_changes_later(
    env_id: str, assert_same: Callable[[Any, Any], None]
) -> None:
    kwargs = SMALL[env_id] | SHORT[env_id]
    env = gymnasium.make_vec(env_id, 64, vectorization_mode="vector_entry_point", **kwargs)
    kept: list[Any] = [env.reset(seed=0)]
    copies = copy.deepcopy(kept)
    for _ in range(20):
        returned = env.step(env.action_space.sample())
        assert env.observation_space.contains(returned[0])
        kept.append(returned)
        copies.append(copy.deepcopy(returned))
    assert_same(kept, copies)


@each_id
def test_render_without_a_mode_warns_as_gymnasiums_environments_do(env_id: str) -> None:
    env = make(env_id)
    env.reset(seed=0)
    with pytest.warns(UserWarning, match="without specifying any render mode"):
        assert env.unwrapped.render() is None
    with pytest.raises(ValueError, match="a vector environment does not render"):
        gymnasium.make_vec(env_id, 2, vectorization_mode="vector_entry_point", render_mode="rgb_array", **SMALL[env_id])


@each_id
def test_nothing_global_is_touched(env_id: str) -> None:
    states = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate(), torch.get_num_threads()  # type: ignore[union-attr]  # noqa: NPY002
    env = make(env_id)
    env.reset(seed=0)
    env.step(zeros(env.action_space))
    assert torch.equal(states[0], torch.get_rng_state())
    assert np.array_equal(states[1], np.random.get_state()[1])  # type: ignore[arg-type,index]  # noqa: NPY002
    assert states[2:] == (random.getstate(), torch.get_num_threads())


@each_id
def test_documentation_is_the_docstring(env_id: str) -> None:
    name = env_id.split(":")[-1]
    text = inspect.cleandoc(str(make(env_id).unwrapped.__doc__))
    assert text in (Path(__file__).parents[2] / "docs" / "environments" / f"{name}.md").read_text()


@each_id
def test_docstring_has_all_headings_and_its_tables_the_parts(env_id: str) -> None:
    doc = str(make(env_id).unwrapped.__doc__)
    headings = [line.removeprefix("## ") for line in map(str.strip, doc.splitlines()) if line.startswith("## ")]
    assert headings == [*HEADINGS, "Version History"]


def tables(env_id: str, first: str) -> list[list[str]]:
    """The lines of the docstring's table whose first heading is `first`, as cells."""
    doc = inspect.cleandoc(str(make(env_id).unwrapped.__doc__))
    lines = doc[doc.index(f"\n| {first} |") + 1 :].splitlines()[2:]
    return [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in itertools.takewhile(lambda line: line.startswith("|"), lines)
    ]


@each_id
def test_table_of_parts_is_the_live_observation(env_id: str) -> None:
    env: Any = make(env_id).unwrapped
    rows = {line[0].strip("`"): line[1] for line in tables(env_id, "part")}
    optional = {"edges", "budget"} - {*env.observation_layout}  # of models with an expert graph; of a budget
    assert [name for name in rows if name not in optional] == [*env.observation_layout]
    live = {name: part.slice.stop - part.slice.start for name, part in env.observation_layout.items()}
    for name, size in live.items():
        same = {live[other] for other in live if rows[other] == rows[name]}
        assert same == ({int(rows[name])} if rows[name].isdigit() else {size})  # a letter stands for one number
    assert sum(live.values()) == env.observation_space.shape[0]


@each_id
def test_table_of_arguments_has_the_live_defaults(env_id: str) -> None:
    env: Any = make(env_id).unwrapped
    parameters = inspect.signature(type(env.vector).__init__).parameters
    live = {name: each.default for name, each in parameters.items() if each.kind is each.KEYWORD_ONLY}
    live["render_mode"] = None
    lines = [(re.findall(r"`(\w+)`", names), said) for names, said, _ in tables(env_id, "argument")]
    assert [name for names, _ in lines for name in names] == [*live]
    for names, said in lines:
        if names[0] in ("steps_per_action", "target", "initial_rate", "initial_decay") and live[names[0]] is None:
            continue  # the task's own, which are told
        elif len(names) == 3:
            weights = 3 * [said.removesuffix(" each")] if said.endswith(" each") else said.split(", ")
            assert [float(Fraction(each)) for each in weights] == [live[name] for name in names]
        else:
            assert ast.literal_eval(said.strip("`")) == live[names[0]], names


@pytest.mark.parametrize("env_id", ["moe_envs:MoERouting-v0", "moe_envs:MoERoutingLive-v0"])
@pytest.mark.filterwarnings("ignore:.*doesn't natively support")
@pytest.mark.filterwarnings("ignore:.*not in the possible render_modes")
@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"split": "tests"}, "did you mean 'test'"),
        ({"bundle": "nothing"}, "digits, fashion-mnist"),
        ({"action": "experts"}, "'expert', 'subset', 'top-m'"),
        ({"costs": "free"}, "'reference', 'machine'"),
        ({"stream": "mixed"}, "'topical', 'iid'"),
        ({"cost_wieght": 1.0}, "did you mean 'cost_weight'"),
        ({"cost_weight": -1.0}, "cost_weight"),
        ({"cost_weight": float("nan")}, "cost_weight"),
        ({"batch_size": 0}, "batch_size"),
        ({"time_weight": -1.0}, "time_weight=-1.0: must be a finite number of at least 0"),
        ({"render_mode": "video"}, "rgb_array"),
    ],
)
def test_wrong_arguments_name_the_valid_ones(env_id: str, kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises((ValueError, RuntimeError), match=message):
        make(env_id, **kwargs)
