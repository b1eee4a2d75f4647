"""Minimum number of decisions in MoEMetaOpt-v0: beam search with look-ahead for single contexts.

The search knows future validation losses including their noise, unlike any policy. Its sequence of actions does reach
the target, but is the shortest one only if the beam keeps every child.
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
    """Node of the search: a training, as a row of the state, and its decisions so far `[n, 4]`. Lower `worth` is
    better: the remaining decisions of a policy, then the validation loss."""

    worth: tuple[float, float]
    actions: np.ndarray
    row: int
    state: State


def beam_search(
    seed: int, split: str, width: int = 4, policy: Policy | None = None, **env_kwargs: Any
) -> tuple[np.ndarray, bool]:
    """Shortest sequence of actions `[n, 4]` found for the training of a seed, and whether it reaches the target.

    All 81 actions are tried from each of the `width` best trainings; if a policy is given, it then plays each of them
    to the end.
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
        children: dict[bytes, Node] = {}  # keyed by content, since clamped actions lead to the same training
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
    """Number of policy decisions to the target per row, above the limit of the environment if it takes more than
    `most`; and the decisions `[rows, most, 4]`."""
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
    """State of a one-row environment with a row of another environment."""
    return _each(state, lambda each: each[row : row + 1])


def _repeated(state: State, count: int) -> State:
    """State of an environment whose rows are all copies of one row."""
    return _each(state, lambda each: each * count if isinstance(each, list) else each.repeat(count, axis=0))


def _each(state: State, change: Any) -> State:
    return {
        "arrays": {name: change(array) for name, array in state["arrays"].items()},
        "generators": change(state["generators"]),
        "training": {name: change(array) for name, array in state["training"].items()},
    }
