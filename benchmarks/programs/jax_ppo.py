"""PPO and MoERouting-v0 in JAX as one jitted training (after PureJaxRL, Lu et al. 2022), for speed comparison.

Network, batches, epochs, loss and Adam are those of `agents.PPO` with default settings. The environment uses the tables
of MoERouting-v0. Needs the extra `bench`.
"""

from __future__ import annotations

import json
import sys
import time
from itertools import pairwise
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.nn.initializers import orthogonal

from moe_envs.routing.env import MoERoutingVectorEnv
from moe_envs.routing.moves import TabulatedMoves

GAMMA, DECAY, CLIP, VF_COEF, MAX_NORM, RATE, EPOCHS, WIDTH = 0.99, 0.95, 0.2, 0.5, 0.5, 3e-4, 4, 64


class Steps(NamedTuple):
    """State of all rows: first places in the deck, steps taken, ledgers, costs so far, batches."""

    place: Any
    step: Any
    ledger: Any
    cost: Any
    batch: Any


class Environment:
    """MoERouting-v0 with default arguments and autoreset."""

    def __init__(self, num_rows: int) -> None:
        tables = MoERoutingVectorEnv(1, observation="features").tables
        self.rows, self.length, self.width, self.actions = num_rows, tables.batch_size, tables.width, tables.num_experts
        moves = tables.moves
        assert isinstance(moves, TabulatedMoves)
        self.deck, self.correct, self.ledgers = map(jnp.array, (tables.deck, tables.correct, moves.ledger))
        self.cost_of, self.paid = jnp.array(moves.terms[:, 0], jnp.float32), jnp.array(moves.seen_of_paid)
        self.seen, self.summaries = jnp.array(tables.seen), jnp.array(tables.summaries)
        self.first_ledger = moves.ledger_of(moves.none_paid)

    def begin(self, key: Any) -> Steps:
        batch = jax.random.randint(key, (self.rows,), 0, len(self.summaries))
        zeros = jnp.zeros(self.rows, jnp.int32)
        return Steps(batch * (self.length + 1), zeros, zeros + self.first_ledger, jnp.zeros(self.rows), batch)

    def observe(self, rows: Steps) -> Any:
        inputs = self.deck[rows.place + rows.step]
        parts = self.seen[inputs], self.summaries[rows.batch], self.paid[rows.ledger // self.actions]
        return jnp.concatenate([*parts, rows.cost[:, None], (rows.step / self.length)[:, None]], axis=1)

    def step(self, rows: Steps, action: Any, key: Any) -> tuple[Steps, Any, Any]:
        move = rows.ledger + action
        quality = self.correct[self.deck[rows.place + rows.step], action] / self.length
        cost = self.cost_of[move]
        after = Steps(rows.place, rows.step + 1, self.ledgers[move], rows.cost + cost, rows.batch)
        done = after.step == self.length
        found = Steps(*(jnp.where(done, new, old) for new, old in zip(self.begin(key), after, strict=True)))
        return found, quality - 0.2 * cost, done


def first_weights(inputs: int, outputs: int, key: Any) -> Any:
    """Two separate tanh networks, initialised like `agents.networks.Network`."""
    keys = iter(jax.random.split(key, 8))
    layers = [
        (jnp.stack([orthogonal(2**0.5)(next(keys), (before, after)) for _ in range(2)]), jnp.zeros((2, 1, after)))
        for before, after in pairwise((inputs, WIDTH, WIDTH))
    ]
    return {
        "layers": layers,
        "head": (orthogonal(0.01)(next(keys), (WIDTH, outputs)), jnp.zeros(outputs)),
        "value": (orthogonal(1.0)(next(keys), (WIDTH, 1))[:, 0], jnp.zeros(())),
    }


def forward(weights: Any, x: Any) -> tuple[Any, Any]:
    """Logits and values."""
    hidden = [x, x]
    for weight, bias in weights["layers"]:
        hidden = [jnp.tanh(each @ weight[k] + bias[k]) for k, each in enumerate(hidden)]
    head, value = weights["head"], weights["value"]
    return hidden[0] @ head[0] + head[1], hidden[1] @ value[0] + value[1]


def log_prob_of(logits: Any, actions: Any) -> Any:
    return jnp.take_along_axis(jax.nn.log_softmax(logits), actions[:, None], 1)[:, 0]


def loss(weights: Any, x: Any, actions: Any, old: Any, advantages: Any, returns: Any) -> Any:
    """PPO's clipped surrogate and the squared error of the values."""
    logits, values = forward(weights, x)
    advantages = (advantages - advantages.mean()) / (advantages.std(ddof=1) + 1e-8)
    ratio = jnp.exp(log_prob_of(logits, actions) - old)
    held = jnp.clip(ratio, 1 - CLIP, 1 + CLIP)
    return -jnp.minimum(ratio * advantages, held * advantages).mean() + VF_COEF * ((values - returns) ** 2).mean()


def descend(carry: Any, batch: Any) -> tuple[Any, None]:
    """One step of torch's Adam with gradient norm clipping."""
    weights, first, second, count = carry
    gradient = jax.grad(loss)(weights, *batch)
    norm = jnp.sqrt(sum((leaf**2).sum() for leaf in jax.tree.leaves(gradient)))
    gradient = jax.tree.map(lambda leaf: leaf * jnp.minimum(1.0, MAX_NORM / (norm + 1e-6)), gradient)
    count += 1
    first = jax.tree.map(lambda m, g: 0.9 * m + 0.1 * g, first, gradient)
    second = jax.tree.map(lambda v, g: 0.999 * v + 0.001 * g**2, second, gradient)
    root = jnp.sqrt(1 - 0.999**count)
    rate, epsilon = RATE * root / (1 - 0.9**count), 1e-5 * root
    weights = jax.tree.map(lambda w, m, v: w - rate * m / (jnp.sqrt(v) + epsilon), weights, first, second)
    return (weights, first, second, count), None


def make(num_rows: int, num_steps: int, size: int, updates: int, seed: int = 0) -> Any:
    """Create the jitted training function and the initial state. The function maps a state and a key to (state after
    the updates, mean return of the episodes that ended in each update)."""
    env, of_weights, of_rows = Environment(num_rows), *jax.random.split(jax.random.key(seed))

    def act(carry: Any, key: Any) -> tuple[Any, Any]:
        rows, weights, sums = carry
        x = env.observe(rows)
        logits, values = forward(weights, x)
        of_action, of_env = jax.random.split(key)
        actions = jax.random.categorical(of_action, logits)
        after, reward, done = env.step(rows, actions, of_env)
        sums = sums + reward
        kept = (x, actions, log_prob_of(logits, actions), values, reward, done, jnp.where(done, sums, 0.0))
        return (after, weights, jnp.where(done, 0.0, sums)), kept

    def back(carry: Any, item: Any) -> tuple[Any, Any]:
        advantage, after = carry
        reward, value, ended = item
        advantage = reward - value + GAMMA * (1 - ended) * (after + DECAY * advantage)
        return (advantage, value), advantage

    def update(state: Any, key: Any) -> tuple[Any, Any]:
        (weights, *rest), rows, sums = state
        keys = jax.random.split(key, num_steps + EPOCHS)
        (rows, _, sums), kept = jax.lax.scan(act, (rows, weights, sums), keys[:num_steps])
        x, actions, old, values, rewards, done, returned = kept
        last = jnp.zeros(num_rows), forward(weights, env.observe(rows))[1]
        _, advantages = jax.lax.scan(back, last, (rewards, values, done), reverse=True)
        parts = (x, actions, old, advantages, advantages + values)
        flat = [part.reshape(num_rows * num_steps, *part.shape[2:]) for part in parts]

        def epoch(carry: Any, key: Any) -> tuple[Any, None]:
            order = jax.random.permutation(key, num_rows * num_steps)
            return jax.lax.scan(descend, carry, [part[order].reshape(-1, size, *part.shape[1:]) for part in flat])

        learnt, _ = jax.lax.scan(epoch, (weights, *rest), keys[num_steps:])
        return (learnt, rows, sums), returned.sum() / jnp.maximum(1, done.sum())

    @jax.jit
    def train(state: Any, key: Any) -> tuple[Any, Any]:
        return jax.lax.scan(update, state, jax.random.split(key, updates))

    weights = first_weights(int(env.width), env.actions, of_weights)
    zeros = jax.tree.map(jnp.zeros_like, weights)
    return train, ((weights, zeros, zeros, jnp.zeros(())), env.begin(of_rows), jnp.zeros(num_rows))


def main(rows: int, steps: int, size: int, timesteps: int) -> None:
    """Time one training per line of stdin; print one JSON line each."""
    updates = max(1, timesteps // (rows * steps))
    train, state = make(rows, steps, size, updates)
    compiled = train.lower(state, jax.random.key(0)).compile()
    for number, line in enumerate(sys.stdin):
        if not line.strip():
            break
        begun = time.process_time()
        state, returns = compiled(state, jax.random.key(number))
        last = float(np.asarray(returns)[-1])  # waits for the result
        rate = updates * rows * steps / (time.process_time() - begun)
        print(json.dumps({"rate": rate, "return": last}), flush=True)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
