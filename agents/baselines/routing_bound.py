"""Bounds for MoERouting-v0: plans of largest return with known labels.

Shape legend: B inputs of a batch, E experts.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from moe_envs.routing.env import MoERoutingVectorEnv


class Oracle:
    """Exact bound: plan of largest return per batch over all subsets of experts, with known labels."""

    kind = "bound"
    env_kwargs = {"action": "subset"}

    def watch(self, env: MoERoutingVectorEnv) -> None:
        """Read the batches and labels of the environment."""
        tables, reward = env.tables, env.reward
        self._env, self._tables = env, tables
        self._fixed = reward.cost_weight * tables.fixed[:, 0]
        self._slope = reward.cost_weight * tables.slope[:, 0]
        self._plans = np.zeros((env.num_envs, tables.batch_size, tables.num_experts), dtype=np.int8)

    def predict(
        self, observation: np.ndarray, state: Any = None, episode_start: Any = None, deterministic: bool = True
    ) -> tuple[np.ndarray, Any]:
        """Planned subsets `[n, E]`; plans are made at the start of a batch."""
        done = observation[:, self._tables.layout["progress"].slice].ravel()
        position = np.rint(done * self._tables.batch_size).astype(np.int64)
        for row in (position == 0).nonzero()[0]:
            codes = self.plan(self._env.batch_inputs(row))
            self._plans[row] = codes[:, None] >> np.arange(self._tables.num_experts) & 1
        return self._plans[np.arange(len(position)), position], state

    def plan(self, inputs: np.ndarray) -> np.ndarray:
        """Subset code per input `[B]` of a batch.

        For every set P of paid experts, the best subset of P per input is computed by a maximum over subsets, expert by
        expert. The result uses the P with the largest sum minus its fixed cost.
        """
        best = self._tables.outcomes(inputs) / len(inputs) - self._slope
        codes = np.tile(np.arange(best.shape[1]), (len(inputs), 1))
        for expert in range(self._tables.num_experts):
            inside = (np.arange(best.shape[1]) >> expert & 1).nonzero()[0]
            without = inside ^ (1 << expert)
            better = best[:, without] > best[:, inside]
            best[:, inside] = np.where(better, best[:, without], best[:, inside])
            codes[:, inside] = np.where(better, codes[:, without], codes[:, inside])
        return codes[:, (best.sum(0) - self._fixed).argmax()]


class SingleOracle(Oracle):
    """Exact bound of one expert for each input: plan of largest return per batch, with known labels."""

    env_kwargs = {"action": "expert"}

    def predict(
        self, observation: np.ndarray, state: Any = None, episode_start: Any = None, deterministic: bool = True
    ) -> tuple[np.ndarray, Any]:
        """Planned experts `[n]`; plans are made at the start of a batch."""
        return super().predict(observation)[0].argmax(1), state

    def plan(self, inputs: np.ndarray) -> np.ndarray:
        """Code of an expert per input `[B]` of a batch: the best one of the best pool."""
        columns = self._tables.column(self._tables.codes)
        gain = self._tables.outcomes(inputs)[:, columns] / len(inputs) - self._slope[columns]
        pool = best_pool(gain, self._fixed[columns])
        return self._tables.codes[pool[gain[:, pool].argmax(1)]]


def best_pool(gain: np.ndarray, price: np.ndarray) -> np.ndarray:
    """The experts that maximise the sum over inputs of the largest gain `[B, E]` in the pool, less their prices `[E]`.

    The sum is submodular: what an expert adds to a pool falls as the pool grows. A branch and bound on this is exact:
    an expert that adds nothing now is dropped, and what the others add now bounds what they will add.
    """
    alone = gain.sum(0) - price
    most, found = float(alone.max()), [int(alone.argmax())]
    stack = [(list[int](), gain.min(1), np.arange(len(price)), float(gain.min(1).sum()))]
    while stack:
        pool, best, left, value = stack.pop()
        added = np.maximum(gain[:, left] - best[:, None], 0).sum(0) - price[left]
        left, added = left[added > 0], added[added > 0]
        if pool and value > most:
            most, found = value, pool
        if not len(left) or value + min(added.sum(), _reach(gain, price, best, left)) <= most + 1e-12:
            continue
        place = int(added.argmax())
        expert, others = int(left[place]), np.delete(left, place)
        stack.append((pool, best, others, value))
        stack.append(([*pool, expert], np.maximum(best, gain[:, expert]), others, value + float(added[place])))
    return np.array(sorted(found))


def _reach(gain: np.ndarray, price: np.ndarray, best: np.ndarray, left: np.ndarray) -> float:
    """A bound of what experts `left` can add: all of their gains for the price of the cheapest."""
    return float(np.maximum(gain[:, left].max(1) - best, 0).sum() - price[left].min())
