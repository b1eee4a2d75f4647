"""How few decisions are enough in MoEMetaOpt-v0: a search that sees what becomes of every action, for single contexts.

It knows the validation losses to come, their noise included, which no policy does. What is found is a sequence of
actions that really arrives; only a beam that keeps every child finds the shortest there is.
"""

from __future__ import annotations

from itertools import product
from typing import Any, NamedTuple

import numpy as np
from gymnasium.vector import AutoresetMode

from agents.evaluate import Policy
from moe_envs.core.batched import State
from moe_envs.metaopt.env import MoEMetaOptVectorEnv

ACTIONS = np.array(list(product(range(3), repeat=4)))


class Node(NamedTuple):
    """A training that can be forked, and the decisions up to it `[n, 4]`. The lower `worth` the more it promises: the
    decisions that a policy takes from here, then the validation loss. It is a row of the state."""

    worth: tuple[float, float]
    actions: np.ndarray
    row: int
    state: State


def beam_search(
    seed: int, split: str, width: int = 4, policy: Policy | None = None, **env_kwargs: Any
) -> tuple[np.ndarray, bool]:
    """The fewest actions `[n, 4]` found that take the training of a seed to its target, and whether they do.

    From each of the `width` most promising trainings all 81 actions are tried; where a policy is given, its decisions
    are played to the end after each of them.
    """
    env = MoEMetaOptVectorEnv(len(ACTIONS), split=split, autoreset_mode=AutoresetMode.NEXT_STEP, **env_kwargs)
    env.reset(seed=[seed] * len(ACTIONS))
    root = _row(env.state(), 0)
    best, arrives, beam = (
        np.tile(1, (env.max_actions, 4)),
        False,
        [Node((0, 0), np.zeros((0, 4), dtype=np.int64), 0, root)],
    )
    while beam and len(beam[0].actions) < len(best) - arrives:
        children: dict[bytes, Node] = {}  # by what they are, as clamped actions come to the same training
        for node in beam:
            env.restore(_repeated(node.state, len(ACTIONS)))
            observation, _, ended, _, infos = env.step(ACTIONS)
            losses, state = infos["meta/validation_loss"].copy(), env.state()
            identities = np.concatenate([losses[:, None], env.training.rates, env.ladder], axis=1)
            paths = np.concatenate([np.tile(node.actions, (len(ACTIONS), 1, 1)), ACTIONS[:, None]], axis=1)
            left = len(best) - paths.shape[1]
            steps, more = _play(env, policy, observation, infos["meta/arrived"] == 1, ended, left if policy else 0)
            quickest = int(steps.argmin())
            if steps[quickest] <= left - arrives:
                taken = more[quickest, : int(steps[quickest])]
                best, arrives = np.concatenate([paths[quickest], taken]), True
            for row in (~ended).nonzero()[0].tolist():
                worth = float(steps[row]), float(losses[row])
                children.setdefault(identities[row].tobytes(), Node(worth, paths[row], row, state))
        kept = sorted(children.values(), key=lambda node: node.worth)[:width]
        beam = [node._replace(state=_row(node.state, node.row)) for node in kept]
    return best, arrives


def _play(
    env: MoEMetaOptVectorEnv,
    policy: Policy | None,
    observation: np.ndarray,
    arrived: np.ndarray,
    over: np.ndarray,
    most: int,
) -> tuple[np.ndarray, np.ndarray]:
    """How many decisions of the policy each row takes to arrive, more than the environment allows where it does not
    within `most`; the decisions `[rows, most, 4]`."""
    steps, taken = np.where(arrived, 0, env.max_actions + 1), np.ones((env.num_envs, most, 4), dtype=np.int64)
    ended = over.copy()
    for step in range(most):
        assert policy is not None
        taken[:, step], _ = policy.predict(observation, deterministic=True)
        observation, _, terminated, _, infos = env.step(taken[:, step])
        steps[(infos.get("meta/arrived", 0) == 1) & ~ended] = step + 1
        ended |= terminated
        if ended.all():
            break
    return steps, taken


def _row(state: State, row: int) -> State:
    """The state of an environment with one of another's rows."""
    return _each(state, lambda each: each[row : row + 1])


def _repeated(state: State, count: int) -> State:
    """The state of an environment whose rows are copies of one row."""
    return _each(state, lambda each: each * count if isinstance(each, list) else each.repeat(count, axis=0))


def _each(state: State, change: Any) -> State:
    return {
        "arrays": {name: change(array) for name, array in state["arrays"].items()},
        "generators": change(state["generators"]),
        "training": {name: change(array) for name, array in state["training"].items()},
    }
