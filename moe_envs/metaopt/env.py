"""MoEMetaOpt-v0: learning rates and weight decays of a real training, decided while it runs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any, Unpack

import numpy as np
from annotated_types import Ge, Gt, Le, Lt
from gymnasium import spaces

from cost.arguments import NonNegative, Positive, choose
from cost.model import Cost
from experts import library, profiles, tasks
from moe_envs.core import BatchedEnv, Face, Outcome, Reward, SingleEnv, Spec
from moe_envs.core.threads import one_thread
from moe_envs.metaopt.picture import TrainingPicture
from moe_envs.metaopt.signals import (
    DECAYS,
    DIVERGED,
    LAYOUT,
    LOSS_FLOOR,
    RATES,
    RATIO_FLOOR,
    Signals,
    apply,
    distance,
    observe,
)

if TYPE_CHECKING:
    from experts.batched_training import Passed

Thousand = Annotated[int, Ge(1), Le(1000)]
SPLITS = ("train", "validation", "test")
COSTS = ("reference", "machine")
CONTEXTS = 2**20  # per split
INITIAL_RATES = 3e-4, 1e-1  # log-uniform
BATCH_SIZE, NUM_EXPERTS, TOP_K = 64, 4, 2
STEP_PENALTY, ARRIVAL_BONUS, DIVERGENCE_PENALTY = 0.1, 1.0, 1.0


class MoEMetaOptVectorEnv(BatchedEnv):
    """MoEMetaOpt-v0 over `num_envs` trainings at once; see `MoEMetaOptEnv` for the problem and its arguments."""

    INNER = ("training",)
    STATE = (
        *("_orders", "_place", "_scale", "_width", "context", "_losses", "accuracy", "_gradients", "_ratio"),
        *("_first_norms", "gate_entropy", "_imbalance", "_spread", "ladder", "taken", "_cost", "_undone"),
    )

    def __init__(
        self,
        num_envs: int = 1,
        *,
        task: str = "digits",
        split: str = "train",
        cost_weight: NonNegative = 0.0,
        costs: str = "reference",
        steps_per_action: Thousand | None = None,
        max_actions: Thousand = 30,
        target: Annotated[float, Gt(0), Lt(2)] | None = None,
        initial_rate: Positive | tuple[Positive, Positive] | None = None,
        initial_decay: NonNegative | Sequence[NonNegative] | None = None,
        widths: Sequence[Thousand] = (12, 16, 24),
        scales: tuple[Positive, Positive] = (1.0, 1.0),
        undo: bool = True,
        time_weight: NonNegative = 0.5,
        memory_weight: NonNegative = 0.0,
        energy_weight: NonNegative = 0.5,
        **face: Unpack[Face],
    ) -> None:
        from experts.batched_training import BatchedTraining  # imports torch

        choose("split", split, SPLITS)
        choose("costs", costs, COSTS)
        self.task = library.load("task", choose("task", task, tasks.names()))
        recipe = self.task.recipe
        self.split, self.undo, self.max_actions, self.scales = split, undo, max_actions, scales
        self.steps = recipe.steps if steps_per_action is None else steps_per_action
        if target is None and recipe.target is None:
            raise ValueError(f"task={task!r} has no target accuracy: give one, as target=0.9")
        self.target: float = recipe.target if target is None else target  # type: ignore[assignment]
        self.initial_rates = np.broadcast_to(INITIAL_RATES if initial_rate is None else initial_rate, 2)
        decays = np.atleast_1d(DECAYS if initial_decay is None else initial_decay)
        self.widths, self.initial_ladder = np.array(widths, dtype=np.int64), np.flatnonzero(np.isin(DECAYS, decays))
        _check(self.widths, self.initial_rates, scales)
        if not decays.size or not np.isin(decays, DECAYS).all():
            raise ValueError(f"initial_decay={initial_decay!r}: must be one or several of {DECAYS.tolist()}")
        self._paid = profiles.of_training(self.task, costs, self.widths, self.steps, BATCH_SIZE)  # [widths, 3]
        whole = Cost(*(self._paid.max(0) * max_actions).tolist())
        reward = Reward.of(cost_weight, whole, Cost(time_weight, memory_weight, energy_weight))
        super().__init__(num_envs, LAYOUT, spaces.MultiDiscrete([3, 3, 3, 3]), reward, **face)
        self.training = BatchedTraining(
            num_envs, self.task.inputs.shape[1], self.task.num_classes, num_experts=NUM_EXPERTS, width=max(widths),
            top_k=TOP_K,
        )  # fmt: skip
        self._length = max_actions * self.steps * BATCH_SIZE
        self._orders = np.zeros((num_envs, self._length), dtype=np.int32)
        self._place, self._width, self.context, self.taken = np.zeros((4, num_envs), dtype=np.int64)
        self._scale, self.accuracy, self.gate_entropy, self._imbalance, self._spread, self._cost = np.zeros(
            (6, num_envs)
        )
        self._losses = np.zeros((num_envs, 2, 3))  # log training and validation losses, newest first
        self._gradients, self._ratio, self._first_norms = np.ones((3, num_envs, 2))
        self.ladder = np.zeros((num_envs, 2), dtype=np.int64)  # positions in DECAYS
        self._undone = np.zeros(num_envs, dtype=np.bool_)

    def _begin(self, rows: np.ndarray) -> None:
        contexts = self._draw(rows, CONTEXTS)
        generators = [np.random.default_rng([SPLITS.index(self.split), context]) for context in contexts.tolist()]
        rates = self.training.rates.copy()
        for row, generator in zip(rows.tolist(), generators, strict=True):
            subset = generator.permutation(len(self.task.labels))[: self.task.recipe.subset]
            epochs = -(-self._length // len(subset))
            order = generator.permuted(np.broadcast_to(subset, (epochs, len(subset))), axis=1)
            self._orders[row] = order.reshape(-1)[: self._length]
            rates[row] = np.exp(generator.uniform(*np.log(self.initial_rates)))
            self._width[row] = generator.integers(len(self.widths))
            self._scale[row] = np.exp(generator.uniform(*np.log(self.scales)))
            # Always one draw, so that later weights do not depend on the arguments; 1 to 6 positions divide 60.
            self.ladder[row] = self.initial_ladder[generator.integers(60) * len(self.initial_ladder) // 60]
        self.context[rows], self._place[rows], self.taken[rows], self._cost[rows] = contexts, 0, 0, 0.0
        self._undone[rows] = False
        self.training.begin(rows, generators, self.widths[self._width[rows]])
        self.training.set(rates, DECAYS[self.ladder])
        self._first_norms[rows] = self.training.weight_norms()[rows]
        # Values of an untrained model, so that no run is needed to start an episode.
        self._losses[rows] = np.log(np.log(self.task.num_classes))
        self.accuracy[rows], self.gate_entropy[rows], self._imbalance[rows] = 1 / self.task.num_classes, 1.0, 0.0
        self._spread[rows], self._gradients[rows], self._ratio[rows] = 0.0, 1.0, RATIO_FLOOR

    def _advance(self, actions: np.ndarray) -> Outcome:
        training, before = self.training, self.training.state()
        rates, self.ladder = apply(actions, training.rates, self.ladder)
        training.set(rates, DECAYS[self.ladder])
        with one_thread(), np.errstate(all="ignore"):
            losses = np.stack([self._train() for _ in range(self.steps)], axis=1)
            found = self._validate()
            fine = (found.loss < DIVERGED) & np.isfinite(losses).all(1) & np.isfinite(training.weight_norms()).all(1)
        dropped = self._see(fine, losses, found)
        if not fine.all():
            training.restore(before, ~fine)
            rates = training.rates.copy()
            rates[~fine] = np.clip(rates[~fine] / 2, *RATES)
            training.set(rates, DECAYS[self.ladder])
        self._undone = ~fine
        self.taken += 1
        arrived = fine & (self.accuracy >= self.target)
        quality = dropped - STEP_PENALTY + ARRIVAL_BONUS * arrived - DIVERGENCE_PENALTY * ~fine
        paid = self._paid[self._width]
        self._cost += self.reward.relative(*paid.T)
        ended = arrived | (self.taken >= self.max_actions) | (~fine & (not self.undo))
        return Outcome(quality, paid, ended, self._details(arrived))

    @property
    def validation_loss(self) -> np.ndarray:
        """Last validation losses, `[n]`."""
        return np.exp(self._losses[:, 1, 0])

    def _train(self) -> np.ndarray:
        """Run one optimiser step in every training; returns losses `[n]`."""
        batches = self._orders.reshape(self.num_envs, -1, BATCH_SIZE)
        rows = batches[self._rows, self._place % self._length // BATCH_SIZE]
        self._place += BATCH_SIZE
        return self.training.step(self._scaled(self.task.inputs[rows]), self.task.labels[rows]).loss

    def _validate(self) -> Passed:
        return self.training.evaluate(self._scaled(self.task.validation_inputs), self.task.validation_labels)

    def _scaled(self, inputs: np.ndarray) -> np.ndarray:
        return inputs if self.scales == (1.0, 1.0) else inputs * self._scale[:, None, None].astype(np.float32)

    def _see(self, fine: np.ndarray, losses: np.ndarray, found: Passed) -> np.ndarray:
        """Update the signals of trainings that did not diverge; returns the decrease of log validation loss `[n]`."""
        weights = self.training.weight_norms()
        logs = np.log(np.maximum(np.stack([losses.mean(1), found.loss], axis=1), LOSS_FLOOR))
        dropped = np.where(fine, self._losses[:, 1, 0] - logs[:, 1], 0.0)
        self._losses[fine] = np.concatenate([logs[:, :, None], self._losses[:, :, :2]], axis=2)[fine]
        self.accuracy[fine] = found.accuracy[fine]
        self.gate_entropy[fine] = found.entropy[fine] / np.log(NUM_EXPERTS)
        self._imbalance[fine] = (found.load.std(1) / found.load.mean(1))[fine]
        self._spread[fine] = (losses.std(1) / np.maximum(losses.mean(1), RATIO_FLOOR))[fine]  # losses may be 0
        self._gradients[fine] = self.training.gradient_norms()[fine]
        self._ratio[fine] = (self.training.update_norms() / np.maximum(weights, RATIO_FLOOR))[fine]
        return dropped

    def _details(self, arrived: np.ndarray) -> dict[str, np.ndarray]:
        rates, decays = self.training.rates, self.training.decays
        return {
            "meta/arrived": arrived.astype(np.float64),
            "meta/actions": self.taken.copy(),
            "meta/accuracy": self.accuracy.copy(),
            "meta/validation_loss": self.validation_loss,
            "meta/gate_rate": rates[:, 0].copy(),
            "meta/experts_rate": rates[:, 1].copy(),
            "meta/gate_decay": decays[:, 0].copy(),
            "meta/experts_decay": decays[:, 1].copy(),
        }

    def _observe(self) -> np.ndarray:
        signals = Signals(
            self.training.rates, self.ladder, self._losses, distance(self.accuracy, self.target), self._gradients,
            self.training.weight_norms() / self._first_norms, self._ratio, self.gate_entropy, self._imbalance,
            self._spread, self.taken / self.max_actions, self._cost, self._undone,
        )  # fmt: skip
        return observe(signals)


class MoEMetaOptEnv(SingleEnv):
    """
    ## Description
    A small Mixture of Experts is trained from scratch by AdamW on real data. Every few optimiser steps it is validated,
    and the agent changes the learning rates and weight decays of gate and experts. The goal is to reach a target
    accuracy in few decisions. Each episode is a new training with different initial weights, data subset, data order,
    width and initial learning rate, which may be far too small or far too large. The same seed and actions reproduce a
    training bit for bit.

    Nothing is simulated: an episode is a real training. The vector environment trains all rows as one batched product.
    It also accepts several tasks, `task=["digits", "fashion-mnist"]`, in equal shares of its rows.

    ## Action Space
    `MultiDiscrete([3, 3, 3, 3])`: multiply the learning rate of the gate, and of the experts, by 0.5, 1 or 2, clamped
    to 1e-5 .. 0.3; move the weight decay of the gate, and of the experts, one step down, keep it, or move it one step
    up on the ladder 0, 0.001, 0.01, 0.1, 0.3, 1.

    ## Observation Space
    A `Box` of float32 from -5 to 5; `env.unwrapped.observation_layout` maps each name to its slice, its bounds and its
    meaning. Logarithms are natural unless stated otherwise.

    | part | size | meaning |
    |---|---|---|
    | `rates` | 2 | log10 of the learning rates of gate and experts, plus 2.5 |
    | `decays` | 2 | positions of their weight decays on the ladder, minus 2 |
    | `validation_loss` | 1 | log of the validation loss |
    | `validation_change` | 2 | last two changes of that log, newest first, times 5 |
    | `training_loss` | 1 | log of the mean over the last optimiser steps |
    | `training_change` | 2 | last two changes of that log, newest first, times 5 |
    | `gap` | 1 | log validation loss minus log training loss |
    | `distance` | 1 | log of the validation error over the error at the target |
    | `gradients` | 2 | log of the gradient norms |
    | `weights` | 2 | log of the weight norms relative to the start |
    | `updates` | 2 | half the log of update norm over weight norm, plus 2 |
    | `entropy` | 1 | gate entropy over its maximum |
    | `imbalance` | 1 | standard deviation over mean of the experts' loads |
    | `spread` | 1 | standard deviation over mean of the losses in the last optimiser steps, times 5 |
    | `progress` | 1 | decisions taken / `max_actions` |
    | `cost` | 1 | cost so far, relative to a training with all decisions |
    | `undone` | 1 | 1 if the last optimiser steps diverged and were undone |

    ## Rewards
    R = quality - cost_weight * cost. Quality is the decrease of the log validation loss, minus 0.1 per decision, plus 1
    when the target is reached, minus 1 if the training diverged. Cost covers the optimiser steps and the validation. It
    is looked up in a profile of the same model in torch, relative to a training of the widest model with all decisions,
    whose total cost is 1.0. Widths below 8 and above 128 have the cost of 8 and 128.

    `info` has `reward/quality`, `reward/cost`, `cost/time` [s], `cost/memory` [B], `cost/energy` [J], `vector_reward`
    (quality, -time, -memory, -energy, relative), and `meta/arrived`, `meta/actions` (decisions so far),
    `meta/accuracy`, `meta/validation_loss`, `meta/gate_rate`, `meta/experts_rate`, `meta/gate_decay`,
    `meta/experts_decay`.

    ## Starting State
    One of 2^20 contexts of the split: seed of weights and data order, training inputs, width of the experts, scale of
    the inputs, learning rate (log-uniform from 3e-4 to 0.1) and weight decay (from the ladder), for both groups.
    Initial losses and accuracy are those of an untrained model, ln C and 1 / C. All splits train and validate on the
    same images; weights, data orders, widths and rates are held out.

    ## Episode End
    Terminated when the target is reached and after `max_actions` decisions. Optimiser steps that diverge (validation
    loss above 20 or not finite) are undone, and the learning rates become half of those before the decision; the weight
    decays stay as decided. With `undo=False`, divergence terminates the episode.

    ## Arguments
    | argument | default | meaning |
    |---|---|---|
    | `task` | `"digits"` | `"digits"`, `"fashion-mnist"` (7 x 7), `"fashion-mnist-14"` (14 x 14), `"breast-cancer"` |
    | `split` | `"train"` | contexts of `"train"`, `"validation"` or `"test"`, which are disjoint |
    | `cost_weight` | 0.0 | lambda of the reward |
    | `costs` | `"reference"` | the shipped profile (only of the first two tasks), or this `"machine"`'s |
    | `steps_per_action` | 5, 10, 10, 2 | optimiser steps between two decisions, with batches of 64 |
    | `max_actions` | 30 | decisions in an episode |
    | `target` | 0.97, 0.79, 0.81, 0.97 | validation accuracy to reach |
    | `initial_rate` | (3e-4, 0.1) | initial learning rate: a number, or (low, high), log-uniform |
    | `initial_decay` | the ladder | initial weight decay: a value of the ladder, or several to draw from |
    | `widths` | (12, 16, 24) | hidden units of each of the 4 experts, drawn from these |
    | `scales` | (1, 1) | (low, high) of a log-uniform factor on the inputs |
    | `undo` | True | see Episode End |
    | `time_weight`, `memory_weight`, `energy_weight` | 1/2, 0, 1/2 | weights of the cost terms; should sum to 1 |
    | `render_mode` | None | `"rgb_array"` or `"ansi"` |

    ## Version History
    * v0: initial version.
    """

    vector_class = MoEMetaOptVectorEnv
    PARTS = ("history",)
    vector: MoEMetaOptVectorEnv

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        self._history: list[tuple[float, float, float]] = []

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        """Start a new training."""
        self._history = []
        return super().reset(seed=seed, options=options)

    def step(self, action: Any) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        """Change rates and decays, train, validate; raises `InvalidAction` before anything changes."""
        result = super().step(action)
        info = result[4]
        self._history.append((info["meta/accuracy"], info["meta/gate_rate"], info["meta/experts_rate"]))
        return result

    def _picture(self) -> TrainingPicture:
        return TrainingPicture(self.vector.max_actions, self.vector.target, self._history)


def _check(widths: np.ndarray, rates: Any, scales: Any) -> None:
    if not len(widths):
        raise ValueError("widths=(): must be at least one")
    for name, (low, high) in {"initial_rate": rates, "scales": scales}.items():
        if low > high:
            raise ValueError(f"{name}={(float(low), float(high))}: the first must not be above the second")


SPEC = Spec(
    id="MoEMetaOpt-v0",
    entry_point="moe_envs.metaopt:MoEMetaOptEnv",
    vector_entry_point="moe_envs.metaopt:make_vec",
    baselines="agents.baselines.metaopt",
    reference_point=(31.0, 0.0),
    boards={name: {"task": name} for name in tasks.SHIPPED},
    small={"task": "digits", "steps_per_action": 1},
    short={"max_actions": 4},
    variants=(
        {"max_actions": 8, "steps_per_action": 2},
        {
            "max_actions": 8, "steps_per_action": 2, "scales": (0.2, 5.0), "undo": False, "initial_rate": (0.1, 0.3),
            "widths": (3, 8),
        },
    ),
)  # fmt: skip
