"""Running normalisation of costs to a common scale, as a wrapper or inside the reward.

Costs are clipped at the running 99th percentile, both in the statistics and in the result. The percentile is estimated
from a reservoir of 1,024 costs (Vitter 1985, algorithm R). Results are clipped to 3 standard deviations.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gymnasium
import numpy as np
from gymnasium.utils import RecordConstructorArgs
from gymnasium.vector import VectorEnv, VectorWrapper

from cost.files import load_json, save_json
from cost.model import Array

if TYPE_CHECKING:
    AnyVectorWrapper = VectorWrapper[Any, Any, Any]
else:
    AnyVectorWrapper = VectorWrapper  # not generic before gymnasium 1.4

METHODS = ("z-norm", "ema", "min-max")
COSTS = ("cost/time", "cost/memory", "cost/energy")
BOUND, MOST = 3.0, 1e100  # clipping in standard deviations; largest cost whose square is finite
SCHEMA = 1


class NormalizerError(RuntimeError):
    """A saved normaliser is absent, damaged or foreign; the message names the file."""


@dataclass(frozen=True)
class FrozenNormalizer:
    """Fixed normalisation of one cost: (min(cost, high) - shift) / scale, clipped to +-3; floats or arrays."""

    shift: float
    scale: float
    high: float

    def __call__(self, cost: Array) -> Array:
        if isinstance(cost, float):
            return min(max((min(cost, self.high) - self.shift) / self.scale, -BOUND), BOUND)
        return np.minimum(np.maximum((np.minimum(cost, self.high) - self.shift) / self.scale, -BOUND), BOUND)


class CostNormalizer:
    """Normalises costs `[..., k]` named `names` by running statistics.

    | method | normalised cost |
    |---|---|
    | `"z-norm"` | standard score by the mean and standard deviation of all costs seen |
    | `"ema"` | standard score by exponential moving averages; an update has weight 1 - `ema` |
    | `"min-max"` | 0 for the minimum seen, 1 for the 99th percentile |

    With "z-norm" and "ema", results are clipped to +-3. `jitter` is the smallest relative spread that is not treated
    as constant; constants become 0. Non-finite costs raise `ValueError` and change nothing.
    """

    def __init__(
        self,
        names: Sequence[str] = COSTS,
        method: str = "z-norm",
        *,
        ema: float = 0.9,
        percentile: float = 99.0,
        jitter: float = 1e-6,
        reservoir: int = 1024,
        seed: int = 0,
    ) -> None:
        if method not in METHODS:
            raise ValueError(f"method={method!r} is not one of {', '.join(METHODS)}")
        if not 0 < ema < 1 or not 50 <= percentile <= 100 or not 0 < jitter < MOST or reservoir < 100:
            raise ValueError(
                f"ema={ema} must be within 0..1, percentile={percentile} within 50..100, jitter={jitter} within "
                f"0..{MOST} and reservoir={reservoir} >= 100"
            )
        self.names, self.method = (names,) if isinstance(names, str) else tuple(names), method
        self.ema, self.percentile, self.jitter = ema, percentile, float(jitter)
        self.count = self._checked = 0
        self.mean, self.variance, self.low = np.zeros((3, len(self.names)))
        self.high = np.full(len(self.names), np.inf)
        self._reservoir = np.zeros((reservoir, len(self.names)))
        self._generator = np.random.Generator(np.random.PCG64(seed))

    def __call__(self, costs: np.ndarray) -> np.ndarray:
        """Update with costs `[..., k]` and return them normalised."""
        self.update(costs)
        return self.normalize(costs)

    def update(self, costs: np.ndarray) -> None:
        """Update the statistics with costs `[..., k]`."""
        rows = self._rows(costs)
        if not len(rows):
            return
        self._sample(rows)
        rows = np.minimum(rows, self.high)
        self.low = np.minimum(self.low, rows.min(0)) if self.count else rows.min(0)
        self.count += len(rows)
        share = len(rows) / self.count if self.method != "ema" or self.count == len(rows) else 1 - self.ema
        away = rows.mean(0) - self.mean
        self.variance = (1 - share) * (self.variance + share * away**2) + share * rows.var(0)
        self.mean = self.mean + share * away

    def normalize(self, costs: np.ndarray) -> np.ndarray:
        """Normalise costs `[..., k]` by the current statistics, clipped to +-3; 0 before the first update."""
        rows = self._rows(costs)
        shift, scale = self._affine()
        normalized = np.clip((np.minimum(rows, self.high) - shift) / scale, -BOUND, BOUND)
        return (normalized if self.count else np.zeros_like(rows)).reshape(np.shape(costs))

    def frozen(self, name: str | None = None) -> FrozenNormalizer:
        """Fixed copy of the current normalisation of one cost; raises `ValueError` before any update."""
        if not self.count:
            raise ValueError("the normaliser has seen no costs yet: update it first")
        name = name or self.names[0]
        if name not in self.names:
            raise ValueError(f"the normaliser is for {', '.join(self.names)}, not for {name}")
        index = self.names.index(name)
        shift, scale = self._affine()
        return FrozenNormalizer(float(shift[index]), float(scale[index]), float(self.high[index]))

    def state_dict(self) -> dict[str, Any]:
        """Settings and statistics as JSON values; `from_state_dict` restores them bit for bit."""
        return {
            "schema": SCHEMA,
            "names": list(self.names),
            **{name: getattr(self, name) for name in ("method", "ema", "percentile", "jitter", "count")},
            **{name: getattr(self, name).tolist() for name in ("mean", "variance", "low")},
            "high": [None if np.isinf(value) else value for value in self.high.tolist()],
            "checked": self._checked,
            "reservoir_size": len(self._reservoir),
            "reservoir": self._reservoir[: self.count].tolist(),
            "generator": self._generator.bit_generator.state,
        }

    @classmethod
    def from_state_dict(cls, state: dict[str, Any]) -> CostNormalizer:
        """Restore a normaliser from `state_dict`; raises `ValueError` for an invalid state."""
        try:
            if state["schema"] != SCHEMA:
                raise ValueError(f"schema {state['schema']}; this moe-envs reads {SCHEMA}")
            settings = {name: state[name] for name in ("method", "ema", "percentile", "jitter")}
            made = cls(state["names"], **settings, reservoir=state["reservoir_size"])
            made.count, made._checked = int(state["count"]), int(state["checked"])
            made.mean, made.variance, made.low = (made._rows(state[name])[0] for name in ("mean", "variance", "low"))
            made.high = np.array([np.inf if value is None else float(value) for value in state["high"]])
            seen = made._rows(np.array(state["reservoir"], dtype=np.float64).reshape(-1, len(made.names)))
            if len(seen) != min(made.count, len(made._reservoir)) or made.high.shape != made.mean.shape:
                raise ValueError("its parts do not fit each other")
            made._reservoir[: len(seen)] = seen
            made._generator.bit_generator.state = state["generator"]
        except (KeyError, TypeError, IndexError, OverflowError, AttributeError) as error:
            raise ValueError(f"not the state of a normaliser: {error!r}") from error
        return made

    def save(self, path: str | Path) -> None:
        """Write atomically, with a SHA-256 of the content."""
        save_json(Path(path), self.state_dict())

    @classmethod
    def load(cls, path: str | Path) -> CostNormalizer:
        """Load a normaliser saved by `save`; raises `NormalizerError` naming the file and the problem."""
        try:
            return cls.from_state_dict(load_json(Path(path), NormalizerError, "save it again"))
        except ValueError as error:
            raise NormalizerError(f"{path} is not a saved normaliser: {error}") from error

    def _rows(self, costs: Any) -> np.ndarray:
        array = np.asarray(costs, dtype=np.float64)
        if array.ndim == 0 or array.shape[-1] != len(self.names):
            raise ValueError(f"costs must be [..., {len(self.names)}] for {', '.join(self.names)}, got {array.shape}")
        rows = array.reshape(-1, len(self.names))
        usable = np.abs(rows) < MOST  # false for NaN, too
        if not usable.all():
            row, column = np.argwhere(~usable)[0]
            raise ValueError(f"{self.names[column]} is {rows[row, column]}: not finite, or beyond {MOST}")
        return rows

    def _sample(self, rows: np.ndarray) -> None:
        """Reservoir-sample the costs and recompute the percentile after 2 % more costs."""
        size, numbers = len(self._reservoir), np.arange(self.count, self.count + len(rows))
        places = np.where(numbers < size, numbers, self._generator.integers(0, numbers + 1))
        kept = places < size
        self._reservoir[places[kept]] = rows[kept]
        seen = self.count + len(rows)
        if seen >= self._checked * 1.02:
            self._checked = seen
            self.high = np.percentile(self._reservoir[:seen], self.percentile, axis=0)

    def _affine(self) -> tuple[np.ndarray, np.ndarray]:
        shift, spread = self.mean, np.sqrt(self.variance)
        if self.method == "min-max":
            shift, spread = self.low, np.where(np.isinf(self.high), 0.0, self.high - self.low)
        return shift, np.maximum(spread, np.maximum(self.jitter * np.abs(self.mean), 1e-30))


class NormalizeCost(gymnasium.Wrapper[Any, Any, Any, Any], RecordConstructorArgs):
    """Replaces the reward by `info["reward/quality"]` - `cost_weight` * mean of the normalised costs in `info`.

    The costs are the `names` of the normaliser, returned as `info["normalized/NAME"]`. `learning = False` freezes it.
    """

    def __init__(self, env: gymnasium.Env[Any, Any], normalizer: CostNormalizer, cost_weight: float) -> None:
        RecordConstructorArgs.__init__(self, normalizer=normalizer, cost_weight=cost_weight)
        gymnasium.Wrapper.__init__(self, env)
        self.normalizer, self.cost_weight, self.learning = normalizer, cost_weight, True

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        """One step; raises `ValueError` if a cost is missing in `info`."""
        observation, _, terminated, truncated, info = self.env.step(action)
        costs = np.array([_named(info, name) for name in self.normalizer.names])
        normalized = self.normalizer(costs) if self.learning else self.normalizer.normalize(costs)
        info |= {f"normalized/{n}": v for n, v in zip(self.normalizer.names, normalized.tolist(), strict=True)}
        reward = _named(info, "reward/quality") - self.cost_weight * float(normalized.mean())
        return observation, reward, terminated, truncated, info


class NormalizeCostVector(AnyVectorWrapper):
    """`NormalizeCost` for a vector environment, with one normaliser for all rows, updated once per step."""

    def __init__(self, env: VectorEnv[Any, Any, Any], normalizer: CostNormalizer, cost_weight: float) -> None:
        super().__init__(env)
        self.normalizer, self.cost_weight, self.learning = normalizer, cost_weight, True
        self._ended = np.zeros(self.num_envs, dtype=np.bool_)  # ended rows, which may be reset in the next step

    def step(self, actions: Any) -> tuple[Any, np.ndarray, np.ndarray, np.ndarray, dict[str, Any]]:
        """One step in every row; rows that are only reset have no cost and do not update the statistics."""
        observation, reward, terminated, truncated, infos = self.env.step(actions)
        parts = [part for part in (infos, infos.get("final_info", {})) if "reward/quality" in part]
        if not parts and not self._ended.all():
            raise ValueError(f"info has no 'reward/quality'; there are {', '.join(sorted(infos))}")
        self._ended = terminated | truncated
        masks = [np.asarray(part["_reward/quality"]) for part in parts]
        if not any(mask.any() for mask in masks):
            return observation, reward, terminated, truncated, infos
        costs, quality = np.zeros((self.num_envs, len(self.normalizer.names))), np.zeros(self.num_envs)
        for part, mask in zip(parts, masks, strict=True):
            costs[mask] = np.stack([_named(part, name)[mask] for name in self.normalizer.names], axis=1)
            quality[mask] = part["reward/quality"][mask]
        paid = np.logical_or.reduce(masks)
        normalized = np.zeros_like(costs)
        normalized[paid] = (self.normalizer if self.learning else self.normalizer.normalize)(costs[paid])
        for part, mask in zip(parts, masks, strict=True):
            for name, column in zip(self.normalizer.names, normalized.T, strict=True):
                part |= {f"normalized/{name}": np.where(mask, column, 0.0), f"_normalized/{name}": mask.copy()}
        reward = np.where(paid, quality - self.cost_weight * normalized.mean(1), reward)
        return observation, reward, terminated, truncated, infos


def _named(info: dict[str, Any], name: str) -> Any:
    if name not in info:
        raise ValueError(f"info has no {name!r}; there are {', '.join(sorted(info))}")
    return info[name]
