"""MoECompression-v0: at which level each matrix of a trained Mixture of Experts is stored, under a limit of bytes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Unpack

import numpy as np
from gymnasium import spaces

from cost.arguments import NonNegative, choose
from cost.model import Cost
from experts.compression import KINDS, LEVELS
from moe_envs.compression.picture import PlanPicture
from moe_envs.core import BatchedEnv, Face, Outcome, Reward, SingleEnv, Spec
from moe_envs.core.spaces import Layout, box, layout

if TYPE_CHECKING:
    from moe_envs.compression.tables import CompressionTables

COSTS = ("reference", "machine")
EVALUATIONS = ("model", "additive")
CONTEXTS = 2**20
SHARES = 0.03, 0.19  # range of budgets as share of the float32 file, from at least 1.25 of the smallest plan
COUNT = len(LEVELS)
LAYOUT: Layout = layout(
    (
        ("kind", len(KINDS), 0, 1, "kind of matrix: " + ", ".join(KINDS)),
        ("expert", 1, 0, 1, "number of the expert / number of experts, 0 outside them"),
        ("shape", 2, 0, 2, "log2 of outputs and of inputs, / 16"),
        ("share", 1, 0, 1, "of the bytes that all matrices take as float32"),
        (
            "load",
            1,
            0,
            1,
            "share of the inputs that this expert answers, 1 outside the experts",
        ),
        ("errors", COUNT, 0, 1, "relative error of the weights at each level: log10, 1e-4 is 0 and 1 is 1"),
        (
            "accuracies",
            COUNT,
            -5,
            5,
            "points of accuracy that this alone changes at each level: sign * log(1 + points)",
        ),
        ("losses", COUNT, -10, 10, "the same of 100 times the loss"),
        ("budget", 1, -6, 0.1, "log of the budget / bytes of the float32 file"),
        ("slack", 1, 0, 1, "share of the budget that the smallest levels from here on would leave"),
        ("left", 1, -6, 0.1, "log of the bytes left / bytes of the matrices from here on as float32"),
        ("allowed", COUNT, 0, 1, "1 where the level fits"),
        ("suggested", COUNT, 0, 1, "1 at the level of the plan that is best for the bytes left if losses add up"),
        ("previous", 1, 0, 1, "level of the matrix before / the last level"),
        ("progress", 1, 0, 1, "share of the matrices that is done"),
    )
)
STATIC = LAYOUT["losses"].slice.stop  # entries that are constant in an episode
LOWS, HIGHS = box(LAYOUT).low, box(LAYOUT).high


class MoECompressionVectorEnv(BatchedEnv):
    """MoECompression-v0 over `num_envs` walks at once; see `MoECompressionEnv` for the problem and its arguments."""

    STATE = ("model", "budget", "place", "levels", "_spent", "_surrogate", "_ended_with")

    def __init__(
        self,
        num_envs: int = 1,
        *,
        model: Annotated[str | Sequence[str], "a name, or a list of at least one"] = "fashion-mnist-conv",
        budget: Annotated[int | None, "a whole number of bytes"] = None,
        split: str = "train",
        cost_weight: NonNegative = 0.0,
        costs: str = "reference",
        quality: str = "accuracy and loss",
        evaluation: str = "model",
        shaped: bool = False,
        granularity: str = "expert",
        time_weight: NonNegative = 0.5,
        memory_weight: NonNegative = 0.5,
        energy_weight: NonNegative = 0.0,
        **face: Unpack[Face],
    ) -> None:
        from moe_envs.compression.tables import CompressionTables  # imports torch

        choose("costs", costs, COSTS)
        choose("evaluation", evaluation, EVALUATIONS)
        names = (model,) if isinstance(model, str) else tuple(model)
        if not names:
            raise ValueError("model=(): must be a name, or a list of at least one")
        self.tables = tables = CompressionTables(names, split, granularity, quality, costs)
        self.shaped, self.additive = shaped, evaluation == "additive"
        self.budgets = _budgets(tables, budget)
        whole = tables.costs[0, :, 0].sum(0)
        reference = Cost(whole[0], tables.bytes, whole[2])
        reward = Reward.of(cost_weight, reference, Cost(time_weight, memory_weight, energy_weight))
        super().__init__(num_envs, LAYOUT, spaces.Discrete(COUNT), reward, **face)
        self.model, self.budget, self.place, self._spent = np.zeros((4, num_envs), dtype=np.int64)
        self.levels = np.zeros((num_envs, len(tables.units)), dtype=np.int64)
        self._surrogate = np.zeros(num_envs)
        self._ended_with = np.zeros((num_envs, 2))  # change of accuracy and of loss

    def _begin(self, rows: np.ndarray) -> None:
        contexts, count = self._draw(rows, CONTEXTS), len(self.tables.models)
        low, high = np.log(self.budgets)
        share = (contexts // count + 0.5) / (CONTEXTS // count + 1)
        self.model[rows] = contexts % count
        self.budget[rows] = np.floor(np.exp(low + (high - low) * share) + 1e-6)
        self.place[rows], self.levels[rows], self._spent[rows] = 0, 0, self.tables.overhead
        self._surrogate[rows], self._ended_with[rows] = 0.0, 0.0

    def _advance(self, actions: np.ndarray) -> Outcome:
        tables, place = self.tables, np.minimum(self.place, len(self.tables.units) - 1)
        taken = np.maximum(
            actions, self._wall()
        )  # sizes decrease with the level, so the first fitting level replaces those that do not fit
        self.levels[self._rows, place] = taken
        self._spent = self._spent + tables.sizes[place, taken]
        gain = tables.gains[self.model, place, taken]
        self._surrogate += gain
        self.place += 1
        ended = self.place >= len(tables.units)
        quality = gain if self.shaped else np.zeros(self.num_envs)
        if (rows := ended.nonzero()[0]).size:
            quality = quality.copy()
            quality[rows] = self._final(rows) - (self._surrogate[rows] - gain[rows] if self.shaped else 0.0)
        cost = tables.costs[self.model, place, taken]
        cost[:, 1] += tables.overhead * ended
        details = {
            "compression/level": taken,
            "compression/bytes": self._spent.copy(),
            "compression/accuracy": self._ended_with[:, 0].copy(),
            "compression/loss": self._ended_with[:, 1].copy(),
        }
        return Outcome(quality, cost, ended, details)

    def _observe(self) -> np.ndarray:
        tables, place, model = self.tables, self.place, self.model
        ended = place >= len(tables.units)
        left = np.maximum(self.budget - self._spent, 0)
        observation = np.empty((self.num_envs, LAYOUT["progress"].slice.stop), dtype=np.float32)
        observation[:, :STATIC] = tables.features[model, np.minimum(place, len(tables.units))]

        def put(name: str, values: np.ndarray) -> None:
            observation[:, LAYOUT[name].slice] = values.reshape(self.num_envs, -1)

        put("budget", np.log(self.budget / tables.bytes).clip(-6, 0.1))
        put("slack", (left - tables.least[place]).clip(0) / self.budget)
        put("left", np.log(np.maximum(left, 1) / np.maximum(tables.rest[place], 1)).clip(-6, 0.1) * ~ended)
        put("allowed", self.action_masks() & ~ended[:, None])
        put("suggested", (tables.suggested(model, place, left)[:, None] == np.arange(COUNT)) & ~ended[:, None])
        before = self.levels[self._rows, np.maximum(place - 1, 0)]
        put("previous", np.where(place > 0, before, 0) / (COUNT - 1))
        put("progress", place / len(tables.units))
        return np.clip(observation, LOWS, HIGHS)

    def action_masks(self) -> np.ndarray:
        """Mask `[n, levels]`, True if the level fits with the smallest levels for all remaining matrices."""
        return np.asarray(np.arange(COUNT) >= self._wall()[:, None])

    def _wall(self) -> np.ndarray:
        """First level that fits, `[n]`."""
        tables, place = self.tables, np.minimum(self.place, len(self.tables.units) - 1)
        room = self.budget - self._spent - tables.least[place + 1]
        return np.minimum((tables.sizes[place] > room[:, None]).sum(1), COUNT - 1)

    def _final(self, rows: np.ndarray) -> np.ndarray:
        """Quality `[rows]` of finished plans."""
        if self.additive:
            return np.asarray(self._surrogate[rows])
        quality, accuracy, loss = self.tables.quality(self.model[rows], self.levels[rows])
        self._ended_with[rows] = np.stack([accuracy, loss], axis=1)
        return quality


class MoECompressionEnv(SingleEnv):
    """
    ## Description
    A trained Mixture of Experts must be compressed to a byte budget. The agent visits its matrices in order (trunk,
    gate, and two per expert) and selects each matrix's compression level: float32, 8, 4 or 2 bits, with or without
    pruning, or low rank. Sizes are exact to the byte of the file that `experts.compression.plan.Plan` writes. The
    accuracy lost by compressing a matrix depends on the other matrices, so the observed individual losses do not add
    up. Budgets vary between episodes, so that one policy covers all of them.

    Models, data and times are real: at the end of an episode, the compressed model is decompressed and run on held-out
    images. The splits `"train"` and `"validation"` are halves of the validation images of the data set; `"test"` images
    are for reports. Sensitivities are always measured on `"train"`.

    ## Action Space
    `Discrete(14)`: the level, an index of `experts.compression.LEVELS`. A level that would leave too few bytes
    for the rest is replaced by the first level that fits (sizes never increase with the level), so that every episode
    ends within its budget. `action_masks()` returns the levels that fit.

    ## Observation Space
    A `Box` of float32; `env.unwrapped.observation_layout` maps each name to its slice, its bounds and its meaning.

    | part | size | range | meaning |
    |---|---|---|---|
    | `kind` | 5 | 0..1 | conv, linear, gate, expert in, expert out |
    | `expert` | 1 | 0..1 | index of the expert / number of experts, 0 outside experts |
    | `shape` | 2 | 0..2 | log2 of outputs and of inputs, / 16 |
    | `share` | 1 | 0..1 | share of the float32 bytes of all matrices |
    | `load` | 1 | 0..1 | share of the inputs routed to this expert, 1 outside experts |
    | `errors` | 14 | 0..1 | relative weight error at each level on a log10 scale: 1e-4 maps to 0, 1 to 1 |
    | `accuracies` | 14 | -5..5 | accuracy change in points if only this matrix is compressed: sign * log(1 + points) |
    | `losses` | 14 | -10..10 | same for 100 times the loss |
    | `budget` | 1 | -6..0.1 | log of the budget / bytes of the float32 file |
    | `slack` | 1 | 0..1 | share of the budget left over if all remaining matrices use their smallest level |
    | `left` | 1 | -6..0.1 | log of the remaining bytes / float32 bytes of the remaining matrices |
    | `allowed` | 14 | 0..1 | 1 if the level fits |
    | `suggested` | 14 | 0..1 | 1 at the level in the best plan for the remaining bytes, assuming additive losses |
    | `previous` | 1 | 0..1 | level of the previous matrix / 13 |
    | `progress` | 1 | 0..1 | finished share of the matrices |

    After the last matrix, the parts about the current matrix are 0.

    ## Rewards
    R = quality - cost_weight * cost. Quality is given at the last matrix: 10 times the change of accuracy minus 3 times
    the change of loss (cross-entropy in nats) relative to the uncompressed model, or as set by `quality`. With
    `shaped`, every step gives the change caused by its matrix alone, and the last step adds the difference to the joint
    change, so the sum is unchanged. With `evaluation="additive"`, no model is run and the quality is the sum of the
    individual changes, which gives thousands of steps per second for pre-training.

    Cost is the weighted sum of time, memory and energy over all matrices, each relative to the uncompressed model. Time
    and energy are those of a batch of 64 inputs in a profile of the matrix products: a low-rank matrix runs as two thin
    products if that was measured to be faster, all other levels as a dense product. Memory is the file size in bytes.

    `info` has `reward/quality`, `reward/cost` (relative, unweighted), `cost/time` [s], `cost/memory` [B], `cost/energy`
    [J], `vector_reward` (quality, -time, -memory, -energy, relative), `compression/level` (as applied),
    `compression/bytes` (file size so far), and at the last matrix `compression/accuracy` and `compression/loss`
    (changes; 0 before, and with `evaluation="additive"`).

    ## Starting State
    The first matrix of a model drawn from `model`, with a budget drawn log-uniformly from 0.03 to 0.19 of the float32
    file size, but at least 1.25 times the smallest plan.

    ## Episode End
    Terminated after the last matrix; never truncated by itself.

    ## Arguments
    | argument | default | meaning |
    |---|---|---|
    | `model` | `"fashion-mnist-conv"` | or `"digits-mlp"`; with `-1`, `-2`, ... for other seeds; or a list |
    | `budget` | None | file size in bytes for all episodes; None: drawn per episode |
    | `split` | `"train"` | images of `"train"`, `"validation"` or `"test"` |
    | `cost_weight` | 0.0 | lambda of the reward |
    | `costs` | `"reference"` | the shipped profile, or this `"machine"`'s |
    | `quality` | `"accuracy and loss"` | or `"accuracy"` (its change), or `"loss"` (less its change) |
    | `evaluation` | `"model"` | or `"additive"`: sum of the individual changes |
    | `shaped` | False | give the additive part of the quality step by step |
    | `granularity` | `"expert"` | one level per matrix, or `"layer"`: experts share their levels |
    | `time_weight`, `memory_weight`, `energy_weight` | 0.5, 0.5, 0 | weights of the cost terms; should sum to 1 |
    | `render_mode` | None | `"rgb_array"` or `"ansi"` |

    ## Version History
    * v0: initial version.
    """

    vector_class = MoECompressionVectorEnv
    vector: MoECompressionVectorEnv

    def action_masks(self) -> np.ndarray:
        """Mask `[levels]`, True if the level fits; sb3-contrib's MaskablePPO requires this name."""
        return np.asarray(self.vector.action_masks()[0])

    def _picture(self) -> PlanPicture:
        vector, done = self.vector, int(self.vector.place[0])
        levels = vector.levels[0, :done].tolist()
        shares = (vector.tables.sizes[range(done), levels] / vector.tables.sizes[:done, 0]).tolist()
        picked = list(zip(levels, shares, strict=True))
        return PlanPicture(vector.tables.units, picked, int(vector._spent[0]), int(vector.budget[0]))


def _budgets(tables: CompressionTables, budget: int | None) -> tuple[float, float]:
    """Smallest and largest budget in bytes."""
    least = tables.overhead + int(tables.least[0])
    if budget is None:
        low = max(SHARES[0] * tables.bytes, 1.25 * least)
        return low, max(SHARES[1] * tables.bytes, 2 * low)
    if budget < least:
        raise ValueError(f"budget={budget!r}: must be a whole number of bytes of at least {least:,}, the smallest plan")
    enough = float(min(budget, tables.bytes))  # larger budgets have no effect
    return enough, enough


SPEC = Spec(
    id="MoECompression-v0",
    entry_point="moe_envs.compression:MoECompressionEnv",
    baselines="agents.baselines.compression",
    reference_point=(1.0, -1.0),
    boards={
        "digits-mlp, by layer": {"model": ["digits-mlp"], "granularity": "layer"},
        "fashion-mnist-conv": {"model": [f"fashion-mnist-conv-{seed}" for seed in range(3)]},
    },
    small={"model": "digits-mlp"},
    short={"granularity": "layer"},
    variants=({}, {"shaped": True, "quality": "loss", "budget": 20_000}, {"evaluation": "additive"}),
)
