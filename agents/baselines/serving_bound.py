"""The best that is possible in MoEServing-v0 with one class of requests: exactly, or with the future known.

Shape legend: n rows, Q lengths of the queue, A choices, T milliseconds, W requests from the first that can be in time.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from gymnasium.vector import VectorEnv
from scipy.stats import poisson

from experts.serving.control import WAIT, WAITS, must_send
from moe_envs.serving.env import MoEServingVectorEnv

LONGEST = 400  # requests in the queue; more are counted as so many
GRID = 1e-3  # seconds
TOGETHER = 8  # rows that are planned at once


class Optimal:
    """The optimum for Poisson arrivals and `answers="latency"`: the state is the length of the queue, and the policy of
    highest reward a second is found by policy iteration in this semi-Markov problem (Xu et al. 2023, arXiv 2301.12865).

    The load must be one number.
    """

    kind = "bound"

    def watch(self, env: VectorEnv[Any, Any, Any]) -> None:
        """Solve the problem of this environment."""
        servers: Any = env
        if servers.in_time or servers.load[0] != servers.load[1] or servers.traffic.kind != "poisson":
            raise ValueError('the optimum is known for trace="poisson", answers="latency" and one load')
        self.env: MoEServingVectorEnv = servers
        self.choice, self.gain = solved(servers)

    def predict(
        self, observation: np.ndarray, state: Any = None, episode_start: Any = None, deterministic: bool = True
    ) -> tuple[np.ndarray, Any]:
        """Choices `[n]`."""
        queue = self.env.traffic.queue(self.env.now)[:, 0]
        return self.choice[queue.clip(1, LONGEST)], state


def solved(env: MoEServingVectorEnv) -> tuple[np.ndarray, float]:
    """The best choice for each length of the queue, `[Q + 1]`, and its reward a second."""
    rate, deadline = env.load[0] * env.capacity, env.classes[0].deadline
    queue, count = np.arange(LONGEST + 1), len(env.choices)
    reward, seconds = np.zeros((2, count, LONGEST + 1))
    moves = np.zeros((count, LONGEST + 1, LONGEST + 1))
    nobody = np.exp(-rate * WAIT)
    seconds[WAITS] = (1 - nobody) / rate
    reward[WAITS] = -queue * seconds[WAITS] / deadline
    moves[WAITS, queue, queue] = nobody
    moves[WAITS, queue, np.minimum(queue + 1, LONGEST)] += 1 - nobody
    for choice in range(1, count):
        cap, level, _ = env.choices.parts(choice)
        rows = np.minimum(queue, cap)
        taken = env.table[level, rows]
        waited = queue * taken + rate * taken**2 / 2  # by those there are and those who come meanwhile
        reward[choice] = rows * env.value[0, level] - waited / deadline - env.reward.cost_weight * taken * rate
        seconds[choice] = taken
        came = poisson.pmf(queue[None] - (queue - rows)[:, None], (rate * taken)[:, None])
        came[:, -1] += 1 - came.sum(1)
        moves[choice] = came
        empty = came[:, 0]  # then the next request is awaited
        seconds[choice] += empty / rate
        moves[choice, :, 1] += empty
        moves[choice, :, 0] = 0
    reward[:, 0], seconds[:, 0], moves[:, 0], moves[:, 0, 1] = 0, 1 / rate, 0, 1
    return _policy_iteration(reward, seconds, moves)


def _policy_iteration(reward: np.ndarray, seconds: np.ndarray, moves: np.ndarray) -> tuple[np.ndarray, float]:
    """The stationary policy with the highest reward a second; values are relative to those of an empty queue."""
    lengths = np.arange(reward.shape[1])
    best = np.ones(len(lengths), dtype=np.int64)
    for _ in range(1000):
        system = np.eye(len(lengths)) - moves[best, lengths]
        system[:, 0] = seconds[best, lengths]  # in the place of the value that is 0: the gain
        found = np.linalg.solve(system, reward[best, lengths])
        gain, values = float(found[0]), np.concatenate([[0.0], found[1:]])
        worth = reward - gain * seconds + moves @ values
        better = worth.argmax(0)
        if (worth[better, lengths] <= worth[best, lengths] + 1e-9).all():
            return best, gain
        best = better
    raise RuntimeError("policy iteration did not end")


class Foresight:
    """A server that knows all arrivals: dynamic programming from the end, on a grid of a millisecond with all times
    rounded up, so that what it plans can be had."""

    kind = "bound"

    def watch(self, env: VectorEnv[Any, Any, Any]) -> None:
        """Attach to a vector environment."""
        servers: Any = env
        self.env: MoEServingVectorEnv = servers
        steps = int((servers.seconds + servers.classes[0].deadline) / GRID) + 2
        self._plan: list[np.ndarray] = [np.zeros((steps, 1), dtype=np.int16)] * servers.num_envs
        self._first = np.zeros((servers.num_envs, steps), dtype=np.int64)

    def predict(
        self, observation: np.ndarray, state: Any = None, episode_start: Any = None, deterministic: bool = True
    ) -> tuple[np.ndarray, Any]:
        """Choices `[n]`."""
        starts = np.zeros(len(observation), dtype=np.bool_) if episode_start is None else episode_start
        began = starts.nonzero()[0]
        for part in np.array_split(began, -(-len(began) // TOGETHER)) if began.size else ():
            self._first[part], plans = planned(self.env, part)
            for row, plan in zip(part.tolist(), plans, strict=True):
                self._plan[row] = plan
        time = np.ceil(self.env.now / GRID).astype(np.int64).clip(0, self._first.shape[1] - 1)
        place = self.env.traffic.heads[:, 0] - self._first[np.arange(len(time)), time]
        chosen = [
            plan[moment, min(max(where, 0), plan.shape[1] - 1)]
            for plan, moment, where in zip(self._plan, time.tolist(), place.tolist(), strict=True)
        ]
        return np.array(chosen, dtype=np.int64), state


def planned(env: MoEServingVectorEnv, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """For each millisecond of these rows' episodes the first request `[n, T]` that can be answered in time, and the
    best choice `[n, T, W]` if the queue begins with it or one of those after it."""
    times = env.traffic.times[rows, 0] - env.traffic.apart[rows, :1]
    deadline, table = env.classes[0].deadline, env.table
    steps = int((env.seconds + deadline) / GRID) + 2
    later = int(table.max() / GRID) + 3
    clock = np.arange(steps + later) * GRID

    def until(limits: np.ndarray, side: Any) -> np.ndarray:
        return np.stack([np.searchsorted(each, limits, side=side) for each in times])

    came, first = until(clock, "right"), until(clock + env.fastest - deadline, "left")
    width = int((came - first).max()) + 1
    before = until(clock - deadline, "left")
    choices = np.arange(1, len(env.choices))
    cap, level, _ = env.choices.parts(choices)
    quality = env.value[0, level][:, None]
    price = (env.reward.cost_weight * env.worth[rows] / env.seconds)[:, None, None]  # of a second of the model
    values = np.zeros((len(rows), steps + later, width))
    plan = np.zeros((len(rows), steps, width), dtype=np.int16)
    window, row = np.arange(width), np.arange(len(rows))[:, None]
    for now in range(steps - 1, -1, -1):
        head = first[:, now, None] + window  # [n, W]
        waiting = np.maximum(came[:, now, None] - head, 0)
        sent = np.minimum(waiting[:, None], cap[:, None])  # [n, A - 1, W]
        taken = table[level[:, None], sent]
        end, place = now + np.ceil(taken / GRID).astype(np.int64), row[..., None]
        late = (before[place, end] - head[:, None]).clip(0, sent)
        gain = (sent - late) * quality - price * taken
        gain += values[place, end, (head[:, None] + sent - first[place, end]).clip(0, width - 1)]
        gain.transpose(0, 2, 1)[waiting == 0] = -np.inf
        stay = values[row, now + 1, (head - first[:, now + 1, None]).clip(0, width - 1)]
        left = np.take_along_axis(times, head.clip(0, times.shape[1] - 1), 1) + deadline - clock[now]
        stay[(waiting > 0) & (left < must_send(env.fastest))] = -np.inf  # as the environment does not let it wait
        best = gain.argmax(1)
        most = np.take_along_axis(gain, best[:, None], 1)[:, 0]
        plan[:, now] = np.where(most >= stay, choices[best], WAITS)
        values[:, now] = np.maximum(most, stay)
    return first[:, :steps], plan
