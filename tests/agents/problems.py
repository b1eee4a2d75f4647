"""Environments whose best return is known, each of which only a learner that can do one thing reaches."""

from typing import Any

import gymnasium
import numpy as np
from gymnasium import spaces
from gymnasium.envs.registration import register

Step = tuple[Any, float, bool, bool, dict[str, Any]]


class Problem(gymnasium.Env[Any, Any]):
    """Counts steps; `seen` is the observation."""

    count = 0

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        self.count = 0
        self.begin()
        return self.seen(), {}

    def begin(self) -> None: ...

    def seen(self) -> Any:
        raise NotImplementedError


class Identity(Problem):
    """Say what you see: 8 right answers are the best return."""

    observation_space, action_space = spaces.Discrete(4), spaces.Discrete(4)

    def begin(self) -> None:
        self.number = self.np_random.integers(4)

    def seen(self) -> Any:
        return self.number

    def step(self, action: Any) -> Step:
        reward = float(action == self.number)
        self.begin()
        self.count += 1
        return self.number, reward, self.count == 8, False, {}


class Counting(Problem):
    """Go on three times, then stop: 1 is the best return, and all reward comes at the end."""

    observation_space, action_space = spaces.Box(0, 1, (1,), np.float32), spaces.Discrete(2)

    def seen(self) -> Any:
        return np.array([self.count / 10], dtype=np.float32)

    def step(self, action: Any) -> Step:
        self.count += action == 0
        right = action == 1 and self.count == 3
        return self.seen(), float(right), action == 1 or self.count == 10, False, {}


class Masked(Problem):
    """Two of ten actions are allowed, the larger one pays; one that is not is an error. The best return is 8."""

    observation_space, action_space = spaces.MultiBinary(10), spaces.Discrete(10)

    def begin(self) -> None:
        self.allowed = self.np_random.choice(10, 2, replace=False)

    def action_masks(self) -> np.ndarray:
        return np.isin(np.arange(10), self.allowed)

    def seen(self) -> Any:
        return self.action_masks().astype(np.int8)

    def step(self, action: Any) -> Step:
        if action not in self.allowed:
            raise AssertionError("a masked action")
        reward = float(action == self.allowed.max())
        self.begin()
        self.count += 1
        return self.seen(), reward, self.count == 8, False, {}


class Memory(Problem):
    """A sign is seen once, six steps before it is asked for; only a memory earns 1, others 0 on average."""

    observation_space, action_space = spaces.Box(-1, 1, (2,), np.float32), spaces.Discrete(2)

    def begin(self) -> None:
        self.sign = self.np_random.choice([-1.0, 1.0])

    def seen(self) -> Any:
        return np.array([self.sign if self.count == 0 else 0, self.count == 5], dtype=np.float32)

    def step(self, action: Any) -> Step:
        self.count += 1
        asked = self.count == 6
        return self.seen(), (self.sign * (2 * action - 1) if asked else 0.0), asked, False, {}


class Target(Problem):
    """Name the number that is seen; the return is minus the squared error, 0 at best."""

    observation_space, action_space = spaces.Box(-1, 1, (1,), np.float32), spaces.Box(-1, 1, (1,), np.float32)

    def begin(self) -> None:
        self.number = self.np_random.uniform(-0.8, 0.8)

    def seen(self) -> Any:
        return np.array([self.number], dtype=np.float32)

    def step(self, action: Any) -> Step:
        return self.seen(), -float((action[0] - self.number) ** 2), True, False, {}


class Bits(Problem):
    """Repeat three bits and, in another choice each, their complements: 1 for all that are right."""

    observation_space, action_space = spaces.Box(0, 1, (3,), np.float32), spaces.MultiBinary(3)

    def begin(self) -> None:
        self.bits = self.np_random.integers(0, 2, 3)

    def seen(self) -> Any:
        return self.bits.astype(np.float32)

    def step(self, action: Any) -> Step:
        return self.seen(), float((action == self.bits).mean()), True, False, {}


class Choices(Bits):
    """The same with MultiDiscrete choices of different sizes."""

    action_space = spaces.MultiDiscrete([2, 3, 4])  # type: ignore[assignment]


class Forever(Problem):
    """Pays 1 in each step and is cut, not ended, after 5: with gamma 0.9 each state is worth 10."""

    observation_space, action_space = spaces.Box(0, 1, (1,), np.float32), spaces.Discrete(2)

    def seen(self) -> Any:
        return np.zeros(1, dtype=np.float32)

    def step(self, action: Any) -> Step:
        self.count += 1
        return self.seen(), 1.0, False, self.count == 5, {}


class Broken(Forever):
    """Forever, with one field not finite in the third step."""

    def __init__(self, field: str) -> None:
        self.field = field

    def step(self, action: Any) -> Step:
        observation, reward, *rest = super().step(action)
        wrong = float("nan") if self.count == 3 else 0.0
        if self.field == "reward":
            return observation, reward + wrong, *rest
        return observation + np.float32(wrong), reward, *rest


for _problem in (Identity, Counting, Masked, Memory, Target, Bits, Choices, Forever, Broken):
    register(f"{_problem.__name__}-v0", _problem, disable_env_checker=True)
