"""Single environment of MoERouting-v0: look-ups in Python numbers, several times faster for one row."""

from operator import index
from typing import Any

import numpy as np
from gymnasium.error import InvalidAction, ResetNeeded

from moe_envs.core import SingleEnv, State
from moe_envs.core.spaces import check_actions
from moe_envs.routing.picture import RoutingPicture

Price = tuple[float, float, float, float, np.ndarray]  # relative cost, time, memory, energy, vector reward


class SteppedBatch(SingleEnv):
    """One mini-batch, prepared at its start; `state` and `restore` use the vector environment."""

    vector: Any
    PARTS = ("choices",)

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        tables = self.vector.tables
        self._prices: dict[int, Price] = {}
        self._codes, self._num_options = tables.moves.options.tolist(), len(tables.moves.options)
        self._used_columns = tables.moves.rows()
        self._used = tables.of_paid
        self._num_choices, self._batch_size = tables.correct.shape[1], tables.batch_size
        self._share, self._reward = 1 / tables.batch_size, self.vector.reward
        self._normalizer = self._reward.normalizer
        self._max_live_cost = tables.max_cost if self.vector.live else 0.0
        self._num_experts, self._all = tables.num_experts, tables.moves.none_paid
        self._batch, self._position, self._unpaid, self._cost = 0, self._batch_size, 0, 0.0
        self._choices: list[tuple[int, int]] = []
        self._correct, self._top_m = b"", list[list[int]]()
        self._observations = np.empty(0, dtype=np.float32)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        """Start the next mini-batch."""
        self._seed(seed)
        self.vector.begin_live()
        self._load(self.vector.draw_one(0, len(self.vector.tables.summaries)), 0, self._all, 0.0, [])
        return self._observations[0], {}

    def step(self, action: Any) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        """Let experts answer the present input: the vector environment's look-ups, in Python numbers for speed."""
        position = self._position
        if position == self._batch_size:
            raise ResetNeeded("the batch is done or none was begun: call reset before step")
        choice = self._choice(action)
        option = self._top_m[position][choice] if self._top_m else choice
        correct = self._correct[position * self._num_choices + choice]
        new = self._unpaid & self._codes[option]
        key = new * self._num_options + option
        cost, time, memory, energy, vector = self._prices.get(key) or self._look_up(key)
        if self._max_live_cost:
            vector = self.vector.pay_live(new, option)
            (cost, time), vector = vector[:2].tolist(), vector[4:]
        vector = vector.copy()
        vector[0] = quality = correct * self._share
        self._choices.append((option, correct))
        self._unpaid = unpaid = self._unpaid - new
        self._cost += cost
        self._position = position = position + 1
        observation = self._observations[position]
        observation[self._used] = self._used_columns[unpaid]
        observation[-2] = min(max(self._cost, 0.0), self._max_live_cost) if self._max_live_cost else self._cost
        info = {
            "reward/quality": quality,
            "reward/cost": cost,
            "cost/time": time,
            "cost/memory": memory,
            "cost/energy": energy,
            "vector_reward": vector,
            "routing/experts_used": self._num_experts - unpaid.bit_count(),
        }
        if self._normalizer is not None:
            info["reward/normalized_cost"] = self._reward.normalized(cost)
        return observation, self._reward(quality, cost), position == self._batch_size, False, info

    def state(self) -> State:
        """Copy of the full state, for forks, undo and checkpoints."""
        self.vector.put_row(self._batch, self._position, self._unpaid, self._cost)
        return super().state()

    def restore(self, state: State) -> np.ndarray:
        """Restore a `state()` of an environment with the same arguments; returns its observation."""
        self.vector.check_state(state, self.PARTS)
        if not 0 <= state["arrays"]["batch"][0] < len(self.vector.tables.summaries):
            raise ValueError("restore: not a state of these mini-batches")
        observation = super().restore(state)
        batch, position, unpaid, cost = self.vector.take_row()
        self._load(batch, position, unpaid, cost, list(state["choices"]))
        return observation

    def batch_inputs(self) -> np.ndarray:
        """Input indices `[batch_size]` of the current batch."""
        return self.vector.tables.batch(self._batch)[:-1]

    def _picture(self) -> RoutingPicture:
        choices = [(self._codes[option], correct) for option, correct in self._choices]
        return RoutingPicture(self.vector.tables.num_experts, self._batch_size, choices, self._cost)

    def _load(self, batch: int, position: int, unpaid: int, cost: float, choices: list[tuple[int, int]]) -> None:
        """Prepare the data for the steps of a batch."""
        tables = self.vector.tables
        self._batch, self._position, self._unpaid, self._cost, self._choices = batch, position, unpaid, cost, choices
        inputs = tables.batch(batch)
        self._correct = tables.correct[inputs].tobytes()
        self._top_m = tables.options[inputs].tolist() if self.vector.action == "top-m" else []
        self._observations = np.zeros((len(inputs), tables.width), dtype=np.float32)
        start = batch * (self._batch_size + 1)
        places = np.arange(start, start + len(inputs)) if tables.by_place else inputs
        self._observations[:, tables.of_input] = tables.seen[places]
        self._observations[:, tables.of_batch] = tables.summaries[batch]
        self._observations[:, -1] = tables.progress[:-1]
        self._observations[position, self._used] = self._used_columns[unpaid]

    def _look_up(self, key: int) -> Price:
        """Price of an option by how much of it is new, cached."""
        terms = self.vector.tables.moves.costs(*divmod(key, self._num_options))
        cost, time, memory, energy = terms[:4].tolist()
        self._prices[key] = cost, time, memory, energy, terms[4:]
        return self._prices[key]

    def _choice(self, action: Any) -> int:
        """Index of the choice of an action; raises `InvalidAction` if it is outside the space."""
        if self.vector.action == "subset":
            return int(check_actions(self.action_space, action).astype(np.int64) @ self.vector.tables.codes)
        try:
            choice = index(action)
        except TypeError:
            choice = -1
        if not 0 <= choice < self._num_choices:
            raise InvalidAction(f"action {action!r} is not in {self.action_space}")
        return choice
