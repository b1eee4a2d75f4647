"""MoEAutoRate-v0: one learning rate for a training of any model, from any start."""

from __future__ import annotations

from typing import Annotated, Any, Unpack

import numpy as np
from annotated_types import Ge, Le
from gymnasium import spaces

from cost.arguments import NonNegative, Positive, choose
from cost.model import Cost
from experts import library, profiles, tasks
from moe_envs.autorate import references
from moe_envs.autorate.estimator import LAYOUT, NO_PRIOR, PRIOR, observe, update
from moe_envs.autorate.picture import RatePicture
from moe_envs.autorate.signals import (
    BACK,
    DIVERGED,
    KEEP,
    LOSS_FLOOR,
    TINY,
    RateSignals,
    changed,
    cosine,
    of_window,
    signals_of,
)
from moe_envs.autorate.trainings import CONTEXTS, DECISIONS, SPLITS, WIDTHS, Context, Trainings
from moe_envs.core import BatchedEnv, Face, Outcome, Reward, SingleEnv, Spec
from moe_envs.core.threads import one_thread

COSTS = ("reference", "machine")
SWEPT = "range test"
STARTS = 2**12  # different initial rates of a context
SCALE, SHAPING = 0.1, 0.3  # excess that counts as one unit; weight of the fall of the best validation loss
STEPS, BATCH_SIZE = 10, 32


class MoEAutoRateVectorEnv(BatchedEnv):
    """MoEAutoRate-v0 over `num_envs` trainings at once; see `MoEAutoRateEnv` for the problem and its arguments."""

    advice = {"rating": 2.0}
    INNER = ("trainings",)
    STATE = (
        *("context", "taken", "horizon", "rate", "_highest", "_bad", "_backs", "_diverged", "_losses", "_slope"),
        *("_spread", "_first", "best_loss", "_since_best", "_judged", "_step_size", "_straightness", "_turn", "_way"),
        *("_first_norm", "_width", "_best_weights", "_best_first", "_best_second", "_best_steps", "best_rate"),
        *("_precision",),
    )

    def __init__(
        self,
        num_envs: int = 1,
        *,
        task: str = "digits",
        split: str = "train",
        cost_weight: NonNegative = 0.0,
        costs: str = "reference",
        steps_per_action: Annotated[int, Ge(1), Le(1000)] = STEPS,
        batch_size: Annotated[int, Ge(1), Le(1000)] = BATCH_SIZE,
        initial_rate: str | Positive | tuple[Positive, Positive] = SWEPT,
        spread: tuple[Positive, Positive] = (1.0, 1.0),
        time_weight: NonNegative = 0.5,
        memory_weight: NonNegative = 0.0,
        energy_weight: NonNegative = 0.5,
        **face: Unpack[Face],
    ) -> None:
        choose("split", split, SPLITS)
        choose("costs", costs, COSTS)
        self.task = library.load("task", choose("task", task, tasks.names()))
        self.split, self.steps = split, steps_per_action
        if isinstance(initial_rate, str):
            choose("initial_rate", initial_rate, (SWEPT,))
        for name, value in (("initial_rate", initial_rate), ("spread", spread)):
            if not isinstance(value, str) and np.ravel(value)[0] > np.ravel(value)[-1]:
                raise ValueError(f"{name}={value!r}: the first must not be above the second")
        self.initial_rate, self.spread = initial_rate, spread
        self.references = references.load(self.task, self.steps, batch_size, split)
        widths = np.arange(WIDTHS[0], WIDTHS[1] + 1)
        self._paid = profiles.of_training(self.task, costs, widths, self.steps, batch_size)  # [widths, 3]
        whole = Cost(*(self._paid.max(0) * DECISIONS[1]).tolist())
        reward = Reward.of(cost_weight, whole, Cost(time_weight, memory_weight, energy_weight))
        super().__init__(num_envs, LAYOUT, spaces.Discrete(BACK + 1), reward, **face)
        self.trainings = Trainings(num_envs, self.task, batch_size)
        self.context, self.taken, self._backs, self._since_best, self._width = np.zeros((5, num_envs), dtype=np.int64)
        self.horizon = np.ones(num_envs, dtype=np.int64)
        self.rate, self._highest, self._step_size, self._straightness, self._first_norm = np.ones((5, num_envs))
        self._bad, self._slope, self._spread, self._turn, self.best_rate = np.zeros((5, num_envs))
        self._precision = np.ones(num_envs)
        self._first, self.best_loss, self._judged = np.ones((3, num_envs))
        self._diverged = np.zeros(num_envs, dtype=np.bool_)
        self._losses = np.zeros((num_envs, 2, 3))  # logs of mean training and validation losses, newest first
        training = self.trainings.training
        self._way, self._best_weights, self._best_first, self._best_second = (
            np.zeros_like(training.weights) for _ in range(4)
        )
        self._best_steps = np.zeros_like(training.steps)

    def _begin(self, rows: np.ndarray) -> None:
        drawn = self._draw(rows, CONTEXTS[self.split] * STARTS)
        numbers, places = drawn % CONTEXTS[self.split], drawn // CONTEXTS[self.split]
        contexts = self.trainings.begin(rows, self.split, numbers)
        self.context[rows] = numbers
        self.horizon[rows] = [each.decisions for each in contexts]
        self._width[rows] = [each.width - WIDTHS[0] for each in contexts]
        self.rate[rows] = self._initial(numbers, (places + 0.5) / STARTS)
        first = self.references.first[numbers].astype(np.float64)
        self._first[rows], self.best_loss[rows] = np.log(first), first
        self._judged[rows] = first
        self._losses[rows] = np.log(first)[:, None, None]
        self._highest[rows] = self.rate[rows]
        known = self.initial_rate == SWEPT and self.spread[0] == self.spread[1]
        self.best_rate[rows], self._precision[rows] = np.log10(self.rate[rows]), (PRIOR if known else NO_PRIOR) ** -2
        for zeros in (self.taken, self._backs, self._since_best, self._bad, self._slope, self._spread, self._turn):
            zeros[rows] = 0
        self._diverged[rows], self._straightness[rows], self._step_size[rows], self._way[rows] = False, 1, TINY, 0
        self._first_norm[rows] = _norms(self.trainings.training.weights[rows])
        self._keep(rows)

    def _initial(self, numbers: np.ndarray, shares: np.ndarray) -> np.ndarray:
        swept = self.initial_rate == SWEPT
        drawn_from = self.spread if swept else self.initial_rate
        low, high = np.broadcast_to(np.log(np.asarray(drawn_from, dtype=np.float64)), 2)
        found: np.ndarray = np.exp(low + shares * (high - low))
        return found * self.references.found[numbers] if swept else found

    def _advance(self, actions: np.ndarray) -> Outcome:
        training = self.trainings.training
        actions = np.where(self.taken == 0, KEEP, actions)
        self._go_back((actions == BACK).nonzero()[0])
        self.rate = changed(actions, self.rate)
        self._not_above((actions == BACK).nonzero()[0])
        self._highest = np.maximum(self._highest, self.rate)
        self.trainings.set(self.rate * cosine(self.taken / self.horizon))
        start = training.weights.copy()
        with one_thread(), np.errstate(all="ignore"):
            losses = np.stack([self.trainings.step() for _ in range(self.steps)], axis=1)
            validation, judged = self.trainings.validate()
            over_first = np.log(validation) - self._first
            fine = (over_first < DIVERGED) & np.isfinite(losses).all(1) & np.isfinite(_norms(training.weights))
            fallen = self._see(fine, losses, validation, judged, start)
        self.taken += 1
        seen = signals_of(self._signals())
        self.best_rate, self._precision = update(self.best_rate, self._precision, seen, self.rate, self.taken)
        lost = (~fine).nonzero()[0]
        self._go_back(lost)
        self.rate[lost] = changed(np.full(len(lost), BACK), self.rate[lost])
        self._not_above(lost)
        ended = self.taken >= self.horizon
        excess = np.log(self._judged) - np.log(self.references.judged[self.context])
        final = -np.sign(excess) * np.log1p(np.abs(excess) / SCALE)
        quality = SHAPING * fallen + np.where(ended, final, 0.0)
        return Outcome(quality, self._paid[self._width], ended, self._details(excess))

    @property
    def validation_loss(self) -> np.ndarray:
        """Last validation losses, `[n]`."""
        return np.exp(self._losses[:, 1, 0])

    def describe(self, row: int) -> Context:
        """What the training in a row is."""
        from moe_envs.autorate.trainings import draw

        return draw(self.split, int(self.context[row]), len(self.task.labels))[0]

    def _keep(self, rows: np.ndarray) -> None:
        """Remember the state of these rows as their best."""
        training = self.trainings.training
        for kept, now in zip(self._best(), (training.weights, training.first, training.second), strict=True):
            kept[rows] = now[rows]
        self._best_steps[rows] = training.steps[rows]

    def _best(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        return self._best_weights, self._best_first, self._best_second

    def _go_back(self, rows: np.ndarray) -> None:
        """Restore the best state of these rows; their rate was a bad one."""
        training = self.trainings.training
        for kept, now in zip(self._best(), (training.weights, training.first, training.second), strict=True):
            now[rows] = kept[rows]
        training.steps[rows] = self._best_steps[rows]
        self._bad[rows] = self.rate[rows]
        self._since_best[rows] = 0
        self._backs[rows] += 1

    def _not_above(self, rows: np.ndarray) -> None:
        """The best rate of these rows is not above the one that they go on with."""
        self.best_rate[rows] = np.minimum(self.best_rate[rows], np.log10(self.rate[rows]))

    def _see(
        self, fine: np.ndarray, losses: np.ndarray, validation: np.ndarray, judged: np.ndarray, start: np.ndarray
    ) -> np.ndarray:
        """Update the signals of trainings that did not diverge; returns the fall of the log of the best loss `[n]`."""
        training = self.trainings.training
        trained, slope, spread = of_window(losses)
        logs = np.stack([trained, np.log(np.maximum(validation, LOSS_FLOOR))], axis=1)
        self._losses[fine] = np.concatenate([logs[:, :, None], self._losses[:, :, :2]], axis=2)[fine]
        self._slope[fine], self._spread[fine] = slope[fine], spread[fine]
        way = training.weights - start
        step, length, weights = training.update_norm(), _norms(way), _norms(training.weights)
        self._step_size[fine] = (step / np.maximum(weights, TINY))[fine]
        self._straightness[fine] = (length / np.maximum(step * self.steps**0.5, TINY))[fine]
        product = (way * self._way).sum(1) / np.maximum(length * _norms(self._way), TINY)
        self._turn[fine] = product[fine]
        self._way[fine] = way[fine]
        better = fine & (validation < self.best_loss)
        fallen = np.where(better, np.log(self.best_loss / np.maximum(validation, LOSS_FLOOR)), 0.0)
        self.best_loss = np.where(better, np.maximum(validation, LOSS_FLOOR), self.best_loss)
        self._judged = np.where(better, np.maximum(judged, LOSS_FLOOR), self._judged)
        self._since_best = np.where(better, 0, self._since_best + 1)
        self._diverged = ~fine
        self._keep(better.nonzero()[0])
        return fallen

    def _details(self, excess: np.ndarray) -> dict[str, np.ndarray]:
        return {
            "autorate/excess": np.expm1(excess),
            "autorate/rate": self.rate.copy(),
            "autorate/validation_loss": self.validation_loss,
            "autorate/backs": self._backs.copy(),
            "autorate/decisions": self.taken.copy(),
            "autorate/sgd": self.trainings.training.sgd.astype(np.int64),
        }

    def _observe(self) -> np.ndarray:
        return observe(self._signals(), self.best_rate)

    def _signals(self) -> RateSignals:
        growth = _norms(self.trainings.training.weights) / np.maximum(self._first_norm, TINY)
        return RateSignals(
            self.taken / self.horizon, self.horizon, self._losses, self._slope, self._spread, self._first,
            np.log(self.best_loss), self._since_best, self._step_size, self._straightness, self._turn, growth,
            self.rate, self._highest, self._bad, self._backs, self._diverged,
        )  # fmt: skip


def _norms(rows: np.ndarray) -> np.ndarray:
    """Norms of the rows, `[n]`, in an order of summation that their number does not change."""
    found: np.ndarray = np.sqrt(np.square(rows).sum(1))
    return found


class MoEAutoRateEnv(SingleEnv):
    """
    ## Description
    A small network is trained from scratch on real data for a fixed number of steps. Every few steps it is validated,
    and the agent multiplies its one learning rate, under a cosine to 1 % at the end, or goes back to the best state so
    far with a lower rate. The goal is the lowest loss at the end, whatever the model, optimiser, scale of the inputs
    and initial rate. What is observed are losses and norms of weights only, relative to each other, so that a policy
    can set the rate of any torch training: `agents.deploy.metaopt.AutoRate`.

    Nothing is simulated: an episode is a real training. The vector environment trains all rows as one batched product.
    It also accepts several tasks, numbers of steps and batch sizes, `task=["digits", "fashion-mnist"]`,
    `batch_size=[32, 128]`, each combination in an equal share of its rows.

    ## Action Space
    `Discrete(8)`: multiply the learning rate by 0.1, 0.33, 0.7, 1, 1.4, 3 or 10 (actions 0 to 6), clamped to
    1e-7 .. 10; or go back (7): weights and optimiser of the best validation loss so far, and 0.3 times the rate. The
    first action has no effect, since nothing has been observed.

    ## Observation Space
    A `Box` of float32 from -5 to 5; `env.unwrapped.observation_layout` maps each name to its slice, its bounds and its
    meaning. Logarithms are natural unless stated otherwise.

    | part | size | meaning |
    |---|---|---|
    | `progress` | 1 | decisions taken over all decisions |
    | `horizon` | 1 | log2 of the number of decisions, minus 5 |
    | `validation_change` | 2 | last two changes of the log validation loss, newest first, times 5 |
    | `training_change` | 2 | the same of the mean training loss |
    | `slope` | 1 | log of the second half's over the first half's mean training loss of the last steps, times 5 |
    | `spread` | 1 | standard deviation over mean of the training losses of the last steps, times 5 |
    | `gap` | 1 | log validation loss minus log training loss |
    | `over_best` | 1 | log of the validation loss over the best one, times 5 |
    | `over_first` | 1 | log of the validation loss over that before the training |
    | `best_over_first` | 1 | log of the best validation loss over that before the training |
    | `since_best` | 1 | decisions since the best validation loss, or since restoring its state, over 5 |
    | `step_size` | 1 | log10 of the norm of the last step over that of the weights, plus 3 |
    | `straightness` | 1 | log of the distance that the weights moved over that of a random walk with as many steps |
    | `turn` | 1 | cosine between the last two displacements of the weights |
    | `growth` | 1 | log of the norm of the weights over that before the training |
    | `from_highest` | 1 | log10 of the rate over the highest one so far |
    | `from_bad` | 1 | log10 of the rate over that at the last restore, 0 if there was none |
    | `backs` | 1 | log2 of one plus the number of restores |
    | `diverged` | 1 | 1 if the last steps diverged and were undone |
    | `offset` | 1 | log10 of the rate over the estimated best one |
    | `rating` | 8 | score of an action: how near to it; of restoring 0 where it helps |

    ## Rewards
    R = quality - cost_weight * cost. Quality is 0.3 times the decrease of the log of the best validation loss. At the
    end, -sign(u) ln(1 + |u| / 0.1) is added: u is the log of the loss of the best state over the lowest one of eight
    cosine schedules, trained from the same start with rates from 1e-4 to 0.3 (AdamW) or 1e-3 to 3 (SGD). An excess of
    3 % costs 0.26, one of 100 % 2.07. Half of the inputs held out validate, the other half judges the end.

    Cost covers the optimiser steps and the validation. It is looked up in a profile of the same model with four experts
    under AdamW, relative to the longest training of the widest model, whose total cost is 1.0.

    `info` has `reward/quality`, `reward/cost`, `cost/time` [s], `cost/memory` [B], `cost/energy` [J], `vector_reward`
    (quality, -time, -memory, -energy, relative), and `autorate/excess` (the best state's loss over the best cosine's,
    minus 1), `autorate/rate` (without the cosine), `autorate/validation_loss`, `autorate/backs`, `autorate/decisions`,
    `autorate/sgd`.

    ## Starting State
    One of 384 contexts of the training split, of 128 of validation and of 128 of test: AdamW or SGD with momentum 0.9,
    1, 2 or 4 experts (top-2 gate) of 6 to 24 hidden units, inputs times 0.1 to 10, 250 inputs to all of the task's, a
    wrong label for up to 40 % of them, 15 to 44 decisions, weights and order of the inputs. The initial rate is what a
    range test of 60 steps finds in this training, or drawn anew in each episode.

    ## Episode End
    Terminated after the context's number of decisions. Steps after which the validation loss is not finite, or more
    than 7.4 times the one before the training, are undone as by action 7.

    ## Arguments
    | argument | default | meaning |
    |---|---|---|
    | `task` | `"digits"` | a task of MoEMetaOpt-v0, or one of your own by `experts.tasks.build` |
    | `split` | `"train"` | contexts of `"train"`, `"validation"` or `"test"`, which are disjoint |
    | `cost_weight` | 0.0 | lambda of the reward |
    | `costs` | `"reference"` | the shipped profile (only of the first two tasks), or this `"machine"`'s |
    | `steps_per_action` | 10 | optimiser steps between two decisions |
    | `batch_size` | 32 | inputs of a step |
    | `initial_rate` | `"range test"` | what one finds, a number, or (low, high), log-uniform |
    | `spread` | (1, 1) | (low, high) of a log-uniform factor on what the range test finds |
    | `time_weight`, `memory_weight`, `energy_weight` | 1/2, 0, 1/2 | weights of the cost terms; should sum to 1 |
    | `render_mode` | None | `"rgb_array"` or `"ansi"` |

    ## Version History
    * v0: initial version.
    """

    vector_class = MoEAutoRateVectorEnv
    PARTS = ("history",)
    vector: MoEAutoRateVectorEnv

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        self._history: list[tuple[float, float, bool]] = []

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        """Start a new training."""
        self._history = []
        return super().reset(seed=seed, options=options)

    def step(self, action: Any) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        """Change the rate, train, validate; raises `InvalidAction` before anything changes."""
        backs = int(self.vector._backs[0])
        result = super().step(action)
        info = result[4]
        self._history.append((info["autorate/validation_loss"], info["autorate/rate"], info["autorate/backs"] > backs))
        return result

    def _picture(self) -> RatePicture:
        reference = float(self.vector.references.judged[self.vector.context[0]])
        return RatePicture(int(self.vector.horizon[0]), reference, self._history)


SPEC = Spec(
    id="MoEAutoRate-v0",
    entry_point="moe_envs.autorate:MoEAutoRateEnv",
    vector_entry_point="moe_envs.autorate:make_vec",
    baselines="agents.baselines.autorate",
    reference_point=(1.0, -4.0),
    boards={
        f"{name}{label}": {"task": name, **more}
        for name in tasks.SHIPPED
        for label, more in (("", {}), (", random rate", {"initial_rate": (1e-5, 1.0)}))
    },
    small={"task": "digits"},
    variants=({}, {"initial_rate": (0.01, 10.0)}),
)
