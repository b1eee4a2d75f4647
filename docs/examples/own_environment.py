"""An environment of one's own: ask the gate's first expert, and the next only while that is worth what it costs."""

import sys
from typing import Any, Unpack

import gymnasium
import numpy as np
from gymnasium import spaces
from scipy.special import softmax

from agents.evaluate import evaluate
from cost.arguments import NonNegative
from cost.model import Cost
from experts import bundle as bundles
from experts import profiles
from moe_envs import Spec, register
from moe_envs.core import BatchedEnv, Face, Outcome, Reward, SingleEnv
from moe_envs.core.spaces import layout


class CascadeVectorEnv(BatchedEnv):
    """The problem, written once over rows; an episode is one input."""

    STATE = ("_input", "_asked")  # what a row's next steps depend on

    def __init__(
        self,
        num_envs: int = 1,
        *,
        bundle: str = "digits",
        split: str = "rl_train",
        cost_weight: NonNegative = 0.2,
        **face: Unpack[Face],
    ) -> None:
        loaded = bundles.load(bundle)
        tables, costs = loaded.split(split), profiles.select(loaded, "reference").cost_model()
        one = costs.fixed + costs.slope  # [E, 3]: s, B, J of an expert for one input
        top_2 = np.argsort(-loaded.split("rl_train").gate_logits, axis=1)[:, :2]
        reference = one[top_2].sum(1).mean(0)
        order = np.argsort(-tables.gate_logits, axis=1)  # [N, E]
        self.experts, self.paid = order.shape[1], one[order]  # [N, E, 3], by how many were asked
        odds = np.exp(np.take_along_axis(tables.gate_logits, order, axis=1))[..., None]
        logits = np.take_along_axis(tables.logits, order[..., None], axis=1)
        mixed = np.cumsum(odds * logits, axis=1) / np.cumsum(odds, axis=1)  # [N, E, classes]
        shares = softmax(mixed, axis=-1).max(-1)
        self.sure = np.pad(shares, ((0, 0), (1, 0)))  # [N, E + 1], by how many were asked
        self.right = np.pad(mixed.argmax(-1) == tables.labels[:, None], ((0, 0), (1, 0)))
        parts = layout([("confidence", 1, 0, 1, "of the experts asked so far"), ("asked", 1, 0, 1, "share of them")])
        reward = Reward.of(cost_weight, Cost(*reference.tolist()), Cost(1 / 3, 1 / 3, 1 / 3))
        super().__init__(num_envs, parts, spaces.Discrete(2), reward, **face)
        self._input, self._asked = np.zeros((2, num_envs), dtype=np.int64)

    def _begin(self, rows: np.ndarray) -> None:
        self._input[rows], self._asked[rows] = self._draw(rows, len(self.sure)), 0

    def _advance(self, actions: np.ndarray) -> Outcome:
        asks = (actions == 1) & (self._asked < self.experts)
        cost = self.paid[self._input, self._asked.clip(max=self.experts - 1)] * asks[:, None]
        self._asked = self._asked + asks
        ended = ~asks | (self._asked == self.experts)
        quality = (ended & self.right[self._input, self._asked]).astype(np.float64)  # when the answer is given
        return Outcome(quality, cost, ended, {"cascade/asked": self._asked.copy()})

    def _observe(self) -> np.ndarray:
        sure = self.sure[self._input, self._asked]
        return np.column_stack([sure, self._asked / self.experts]).astype(np.float32)


class CascadeEnv(SingleEnv):
    """0 answers with the experts asked so far, 1 asks the next one."""

    vector_class = CascadeVectorEnv
    metadata = {"render_modes": []}


class Threshold:
    """The baseline: ask while the confidence is below a threshold, at most so many."""

    kind = "baseline"

    def __init__(self, least: float, most: int) -> None:
        self.least, self.most = least, most

    def predict(self, observation: np.ndarray, state: Any = None, **_: Any) -> tuple[np.ndarray, Any]:
        asks = (observation[:, 0] < self.least) & (observation[:, 1] * 8 < self.most)
        return asks.astype(np.int64), state


class Clairvoyant:
    """The bound: looks at the answers and stops where that is best."""

    kind = "bound"

    def watch(self, env: CascadeVectorEnv) -> None:
        relative = env.reward.relative(*env.paid.transpose(2, 0, 1)).cumsum(1)  # [N, E]
        after = env.right - env.reward.cost_weight * np.pad(relative, ((0, 0), (1, 0)))  # [N, E + 1], the returns
        self.env, self.stop = env, after.argmax(1)

    def predict(self, observation: np.ndarray, state: Any = None, **_: Any) -> tuple[np.ndarray, Any]:
        return (self.env._asked < self.stop[self.env._input]).astype(np.int64), state


def baselines(env_id: str, *, report: Any = lambda share: None, **kwargs: Any) -> dict[str, Any]:
    """The threshold and the limit that are best together on validation."""
    rules = [Threshold(least, most) for least in np.linspace(0.1, 1, 10) for most in range(1, 9)]
    best = max(
        rules, key=lambda rule: evaluate(rule, env_id, 1000, **kwargs | {"split": "validation"})["return"].mean()
    )
    return {f"confidence below {best.least:.1f}, at most {best.most}": best}


def bound(env_id: str, **kwargs: Any) -> Any:
    return Clairvoyant()


here, point = "own_environment", (3.0, 0.0)  # this module's name; the worst cost and quality that count
SPEC = Spec(id="Cascade-v0", entry_point=f"{here}:CascadeEnv", baselines=here, reference_point=point)
register(SPEC)

if __name__ == "__main__":
    from gymnasium.utils.env_checker import check_env

    from agents import PPO

    steps = int(sys.argv[1]) if sys.argv[1:] else 200_000
    check_env(gymnasium.make("Cascade-v0").unwrapped, skip_render_check=True)
    learner = PPO("MlpPolicy", "Cascade-v0", n_envs=64, n_steps=32, batch_size=512, seed=0).learn(steps)
    for name, policy in ({"PPO": learner} | baselines("Cascade-v0") | {"bound": bound("Cascade-v0")}).items():
        total, quality, cost = evaluate(policy, "Cascade-v0", 2000, split="test")[["return", "quality", "cost"]].mean()
        print(f"{name}: return {total:.3f}, accuracy {quality:.3f}, cost {cost:.3f} on test")
