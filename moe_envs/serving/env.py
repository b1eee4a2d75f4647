"""MoEServing-v0: when a server sends a batch, how large, and at which quality level."""

from __future__ import annotations

from typing import Annotated, Any, Unpack

import numpy as np
from annotated_types import Ge, Gt, Le
from gymnasium import spaces

from cost.arguments import NonNegative, Positive, choose
from cost.model import Cost
from experts.serving.arrivals import PARTS
from experts.serving.control import (
    CAPS,
    NEVER,
    WAIT,
    WAITS,
    Choices,
    RequestClass,
    Seen,
    Service,
    must_send,
    slower,
)
from moe_envs.core import BatchedEnv, Face, Outcome, Reward, SingleEnv, Spec
from moe_envs.serving.observations import Observer, capacity, parts_of
from moe_envs.serving.picture import ServingPicture
from moe_envs.serving.traffic import MOST_SECONDS, NUMBERS, Traffic

COSTS = ("reference", "machine")
ANSWERS = ("in time", "latency")
EPISODES = 2**20  # of a split
HORIZON = 2.0  # seconds after which a reward counts 1 / e
FACTORS = 256  # of the times of batches in an episode, the same again if there are more
MEMORY = 0.9  # of the mean wait that remains after a batch
MIXED = (
    RequestClass("interactive", deadline=0.25),
    RequestClass("careful", deadline=1.0, value=2.0, care=4.0),
    RequestClass("bulk", deadline=4.0, size=4, care=0.25),
)
SHARES = {"one": (1.0,), "mixed": (0.6, 0.2, 0.2)}


def classes_of(classes: str = "one", deadline: float = 0.25, **others: Any) -> tuple[RequestClass, ...]:
    """The classes of requests of an environment with these arguments."""
    return MIXED if classes == "mixed" else (RequestClass(deadline=deadline),)


class MoEServingVectorEnv(BatchedEnv):
    """MoEServing-v0 over `num_envs` servers at once; see `MoEServingEnv` for the problem and its arguments."""

    advice = {"plan": 4.0}
    INNER = ("traffic",)
    STATE = (
        "now", "_last", "_waited", "worth", "rate", "_answered", "_in_time", "_ended", "_batches", "_factors", "_slow",
    )  # fmt: skip

    def __init__(
        self,
        num_envs: int = 1,
        *,
        trace: Annotated[str, "poisson, bursts, or the file of a trace"] = "poisson",
        split: str = "train",
        load: Positive | tuple[Positive, Positive] = (0.5, 1.1),
        classes: str = "one",
        deadline: Annotated[float, Gt(0), Le(NEVER)] = 0.25,
        answers: str = "in time",
        cost_weight: NonNegative = 0.1,
        seconds: Annotated[float, Gt(0), Le(MOST_SECONDS)] = 8.0,
        model: str = "language",
        costs: str = "reference",
        overhead: NonNegative = 0.0,
        jitter: Annotated[float, Ge(0), Le(1)] = 0.0,
        slowdown: Positive | tuple[Positive, Positive] = 1.0,
        rule: str = "plan",
        time_weight: NonNegative = 1.0,
        memory_weight: NonNegative = 0.0,
        energy_weight: NonNegative = 0.0,
        **face: Unpack[Face],
    ) -> None:
        from experts.serving.timing import service_of  # imports torch

        choose("split", split, PARTS)
        choose("classes", classes, SHARES)
        choose("answers", answers, ANSWERS)
        choose("costs", costs, COSTS)
        low, high = _range("load", load)
        self.slowdown = _range("slowdown", slowdown)
        self.classes = classes_of(classes, deadline)
        self.in_time = answers == "in time"
        if not self.in_time and len(self.classes) > 1:
            raise ValueError('answers="latency" is for one class of requests')
        self.service = service_of(model, costs)  # what controllers know
        served = with_overhead(self.service, overhead)
        self.load, self.seconds, self.choices = (
            (low, high),
            seconds,
            Choices(len(self.service.levels), len(self.classes)),
        )
        self.table, self.joules = served.table(CAPS[-1]), served.energy(CAPS[-1])
        self.fastest = float(self.table[:, 1].min())
        if self.in_time and min(each.deadline for each in self.classes) <= self.fastest * self.slowdown[1]:
            takes = self.fastest * self.slowdown[1]
            raise ValueError(f"deadline={deadline:g}: the fastest answer of {model} takes {takes:.3g} s")
        self.capacity = capacity(served)
        self.observer = Observer(rule, cost_weight, self.choices, self.service, self.classes)
        watts = float(self.joules[0, -1] / self.table[0, -1])
        if energy_weight and not watts:
            raise ValueError(f"energy_weight={energy_weight}: the energy of batches of {model} is not known")
        reference = Cost(seconds, 1.0, watts * seconds or 1.0)
        reward = Reward.of(cost_weight, reference, Cost(time_weight, memory_weight, energy_weight))
        super().__init__(num_envs, parts_of(self.choices), spaces.Discrete(len(self.choices)), reward, **face)
        self.traffic = Traffic(
            num_envs, trace, split, seconds, self.classes, SHARES[classes], high * self.capacity / self.slowdown[0]
        )  # fmt: skip
        value, care = (np.array([getattr(each, name) for each in self.classes]) for name in ("value", "care"))
        self.value = value[:, None] * (1 - care[:, None] * (1 - self.service.quality)).clip(0)  # [C, L]
        self._value, self._worth_of_row = value, value / self.traffic.size
        self.now, self._waited, self.rate = np.zeros((3, num_envs))
        self.worth = np.ones(num_envs)
        self._last = np.zeros((num_envs, 2))
        self._answered, self._in_time, self._batches = np.zeros((3, num_envs), dtype=np.int64)
        self.jitter, self._factors = jitter, np.ones((num_envs, FACTORS))  # of the times of batches
        self._slow = np.ones(num_envs)
        self._ended = np.zeros(num_envs, dtype=np.bool_)
        self._seen = self._look()

    def _begin(self, rows: np.ndarray) -> None:
        drawn = self._draw(rows, EPISODES)
        for row, number in zip(rows.tolist(), drawn.tolist(), strict=True):
            share = np.random.default_rng([0, number]).random()
            slow = self._slow_down(row, number)
            self.rate[row] = self.capacity * (self.load[0] + share * (self.load[1] - self.load[0])) / slow
            counts = self.traffic.begin(row, number, self.rate[row])
            self.worth[row] = max(float(counts @ [each.value for each in self.classes]), 1.0)
        self.now[rows], self._waited[rows], self._last[rows] = 0, 0, 0
        self._answered[rows], self._in_time[rows], self._batches[rows], self._ended[rows] = 0, 0, 0, False
        self._slow[rows] = 1
        self._go_on()

    def _slow_down(self, row: int, number: int) -> float:
        """Draw how the times of batches differ from the known ones in an episode; returns by how much all do."""
        random, (low, high) = np.random.default_rng([NUMBERS[self.traffic.split], number, 1]), self.slowdown
        slow = low + float(random.random()) * (high - low)
        self._factors[row] = slow * np.exp(self.jitter * random.standard_normal(FACTORS))
        return slow

    def _advance(self, actions: np.ndarray) -> Outcome:
        begun, running = self.now.copy(), ~self._ended
        waits = running & (actions == WAITS) & self.may_wait()
        sends = running & ~waits
        actions = np.where(actions == WAITS, self.choices.number(CAPS[-1], 0), actions)
        cap, level, order = self.choices.parts(actions)
        queue, chosen = self.traffic.queue(self.now), sends.nonzero()[0]
        taken = np.zeros_like(queue)
        taken[chosen] = self.traffic.taken(chosen, queue[chosen], cap[chosen], order[chosen], self._worth_of_row)
        rows = taken @ self.traffic.size
        factor = self._factors[self._rows, self._batches % FACTORS]
        seconds = np.where(sends, self.table[level, np.minimum(rows, CAPS[-1])] * factor, 0.0)
        self._slow = np.where(sends, slower(self._slow, factor), self._slow)
        end = self.now + seconds
        lost = self._lost(taken, level, end)
        self._count(sends, taken, rows, seconds)
        self.traffic.heads += taken
        until = np.minimum(self.now + WAIT, np.maximum(self.traffic.next(self.now), self.now))
        self.now = np.where(sends, end, np.where(waits, until, self.now))
        lost += self._go_on() @ self._value
        joules = np.where(sends, self.joules[level, np.minimum(rows, CAPS[-1])], 0.0)
        cost = np.stack([seconds, np.zeros_like(seconds), joules], axis=1)
        elapsed = np.where(running, self.now - begun, 0.0)
        return Outcome(-lost / self.worth, cost, self._ended.copy(), self._details(elapsed, rows, sends, level))

    def _lost(self, taken: np.ndarray, level: np.ndarray, end: np.ndarray) -> np.ndarray:
        """The value `[n]` that the requests of a batch lose which ends at these times."""
        if self.in_time:
            fine = taken - self.traffic.late(taken, end)
            self._in_time += fine.sum(1)
            return np.asarray(taken @ self._value - (fine * self.value.T[level]).sum(1))
        latency = end * taken[:, 0] - self.traffic.arrival_sums(taken)[:, 0]
        self._in_time += taken.sum(1)
        return np.asarray(taken[:, 0] * (self._value[0] - self.value[0, level]) + latency / self.classes[0].deadline)

    def _count(self, sends: np.ndarray, taken: np.ndarray, rows: np.ndarray, seconds: np.ndarray) -> None:
        requests = taken.sum(1)
        waited = (self.now[:, None] * taken - self.traffic.arrival_sums(taken)).sum(1) / np.maximum(requests, 1)
        self._waited = np.where(sends, MEMORY * self._waited + (1 - MEMORY) * waited, self._waited)
        self._batches += sends
        self._last[sends] = np.stack([rows, seconds], axis=1)[sends]
        self._answered += requests

    def _go_on(self) -> np.ndarray:
        """Give up what is too late; where nothing waits, go to the next arrival, or end. Returns the requests `[n, C]`
        that are given up."""
        traffic = self.traffic
        gone = traffic.expire(self.now, self.fastest) if self.in_time else np.zeros_like(traffic.heads)
        empty = traffic.queue(self.now).sum(1) == 0
        after = traffic.next(self.now)
        over = empty & (after > MOST_SECONDS)
        self._ended |= over
        self.now = np.where(empty & ~over, after, self.now)
        return gone

    def _details(self, elapsed: np.ndarray, rows: np.ndarray, sends: np.ndarray, level: np.ndarray) -> Any:
        return {
            "discount": np.exp(-elapsed / HORIZON),
            "serving/time": self.now.copy(),
            "serving/elapsed": elapsed,
            "serving/rows": rows,
            "serving/level": np.where(sends, level, -1),
            "serving/answered": self._answered.copy(),
            "serving/in_time": self._in_time.copy(),
        }

    def seen(self) -> Seen:
        """What a controller sees, as of the last observation; its arrays cannot be written to."""
        return self._seen

    def _look(self) -> Seen:
        traffic, now = self.traffic, self.now
        queue = traffic.queue(now)
        there, oldest = queue > 0, traffic.oldest()
        age = np.where(there, now[:, None] - oldest, 0.0)
        slack = np.where(there, oldest + traffic.deadline - now[:, None], NEVER).clip(0, NEVER)
        last, rates = traffic.recent(now)
        since = np.maximum(now - last, 0.0)
        found = Seen(queue * traffic.size, age, slack, since, rates, self._last.copy(), self._waited.copy(),
                     self._slow.copy())  # fmt: skip
        for values in vars(found).values():
            values.flags.writeable = False
        return found

    def may_wait(self) -> np.ndarray:
        """Rows `[n]` whose first deadline is not too near to wait; with "latency" those to which more requests come."""
        if not self.in_time:
            return self.traffic.next(self.now) <= MOST_SECONDS
        return np.asarray(self._seen.slack.min(1) >= must_send(self.fastest))

    def action_masks(self) -> np.ndarray:
        """Mask `[n, actions]`: waiting is not possible where a deadline is near."""
        allowed = np.ones((self.num_envs, len(self.choices)), dtype=np.bool_)
        allowed[:, WAITS] = self.may_wait() | self._ended
        return allowed

    def _observe(self) -> np.ndarray:
        self._seen = self._look()
        observation = self.observer(self._seen)
        observation[self._ended] = 0
        return observation


def _range(name: str, value: float | tuple[float, float]) -> tuple[float, float]:
    low, high = value if isinstance(value, tuple) else (value, value)
    if low > high:
        raise ValueError(f"{name}={value!r}: the first must not be above the second")
    return low, high


def with_overhead(service: Service, overhead: float) -> Service:
    """A service whose batches take this many seconds more for each row."""
    seconds = service.seconds + overhead * np.array(service.sizes)
    return Service(service.levels, service.sizes, seconds, service.quality, service.joules)


class MoEServingEnv(SingleEnv):
    """
    ## Description
    A server answers requests with one model. Whenever it is free and something waits, the agent decides: wait a little,
    or send a batch of up to so many rows at one of the model's quality levels. Large batches serve more requests a
    second, and late answers are worth nothing; a lower level is faster and its answers are worth less.

    Batches take the time that was measured for their size and level. What arrives are Poisson processes, bursts, or a
    part of a real trace, scaled to the load. The policy is the controller of a real server by
    `moe-serve --controller policy:RUN_DIR`.

    ## Action Space
    `Discrete(1 + 7 * L * O)` for L levels and O orders. 0 waits until the next arrival, 5 ms at most; where a deadline
    is closer than the time of the fastest batch plus 10 ms (with `answers="latency"`, only where no more requests
    come), waiting is masked, and choosing it anyway sends up to 64 rows at the best level. The others are caps of 1, 2,
    4, 8, 16, 32 or 64 rows, times levels (the best first), times orders: `env.unwrapped.vector.choices.parts(action)`.
    With one class of requests there is one order. With several a batch takes those with the first deadline, or those
    with the highest value per row, or those of one class.

    ## Observation Space
    A `Box` of float32; `env.unwrapped.observation_layout` maps each name to its slice, bounds and meaning.

    | part | size | meaning |
    |---|---|---|
    | `queue` | C | log of 1 + waiting rows of each class, over log 65 |
    | `age` | C | how long the oldest request waits, over its deadline |
    | `slack` | C | time until the first deadline, over the deadline |
    | `since` | 1 | -log10 of the seconds since the last arrival |
    | `load` | 4 | arrival rate over what the best level serves, averaged over 0.02, 0.1, 0.5 and 2.5 s |
    | `last` | 2 | rows of the last batch over 64, its seconds over the first class's deadline |
    | `waited` | 1 | mean wait of served requests over the first class's deadline |
    | `plan` | actions | one-hot choice of the rule given as `rule`, from which our PPO starts |

    ## Rewards
    R = quality - cost_weight * cost. Quality is minus the value that is lost, over the value of all requests of the
    episode; a perfect server has 0. A request loses

    * all of its value if its answer is late or it is given up;
    * the share care * loss if it is answered at a lower level. The loss of a level is 1 minus its quality over that of
      the best one: a ratio of perplexities for the language model, of accuracies for a classifier;
    * with `answers="latency"`, where nothing is given up, also its latency over the deadline.

    Cost is the time that the model runs, over the length of the episode. Energy is relative to that of the best level,
    always busy, and 0 for models whose energy is not known.

    Steps take different times, so `info["discount"]` is exp(-elapsed / 2 s), by which our learners multiply `gamma`: a
    constant discount for each decision would reward waiting.

    `info` has `reward/quality`, `reward/cost`, `cost/time` [s], `cost/memory` [B] (0), `cost/energy` [J],
    `vector_reward` (quality, -time, -memory, -energy, relative), `discount`, and `serving/time` [s], `serving/elapsed`
    [s], `serving/rows` and `serving/level` of the batch (-1: waited), `serving/answered` and `serving/in_time` requests
    so far.

    ## Starting State
    The first request has come. Its time and all others are drawn for the episode, and the load from its range.

    ## Episode End
    Terminated when all requests of `seconds` are answered or given up. Requests are given up when even the fastest
    batch would be too late, by the known seconds.

    ## Arguments
    | argument | default | meaning |
    |---|---|---|
    | `trace` | `"poisson"` | or `"bursts"` (0.5 s at 4 times the rate between them, every 2.5 s in the mean), or a \
CSV file whose first column has the arrivals, as seconds or dates, at least 100 in each split |
    | `split` | `"train"` | or `"validation"`, `"test"`: 60, 20 and 20 % of a file, by time; drawn arrivals have other \
seeds |
    | `load` | (0.5, 1.1) | arriving rows over what the best level serves in large batches; a number or a range |
    | `classes` | `"one"` | or `"mixed"`: 60 % interactive requests (deadline 0.25 s), 20 % careful (1 s, value 2, \
care 4), 20 % bulk (4 s, 4 rows, care 0.25) |
    | `deadline` | 0.25 | seconds until an answer is worth nothing, with one class; at most 10 |
    | `answers` | `"in time"` | or `"latency"`, whose optimum is known for Poisson arrivals and one `load` |
    | `cost_weight` | 0.1 | lambda of the reward |
    | `seconds` | 8.0 | length of the arrivals; at most 10 |
    | `model` | `"language"` | what is served, texts of 64 tokens; or any model that `moe-serve` takes |
    | `costs` | `"reference"` | the shipped times of the language model, others are measured here; or all by this \
`"machine"` |
    | `overhead` | 0.0 | seconds that a row takes beside the model, as HTTP does; rules do not know it |
    | `jitter` | 0.0 | standard deviation of the logarithm of a batch's time around the known one; at most 1 |
    | `slowdown` | 1.0 | how many times the known seconds all batches of an episode take, a number or a range; fewer \
requests come, so that the load is the same. Rules learn it from the batches; a policy sees it in the last batch and \
in the choice of `rule` |
    | `rule` | `"plan"` | the rule in the observation, as `moe-serve --controller` takes it, but not `adaptive` nor a \
policy; best a tuned one. The price of a bare `"plan"` is `cost_weight` |
    | `time_weight`, `memory_weight`, `energy_weight` | 1, 0, 0 | weights of the cost terms; should sum to 1 |
    | `render_mode` | None | `"rgb_array"` or `"ansi"` |

    ## Version History
    * v0: initial version.
    """

    vector_class = MoEServingVectorEnv
    PARTS = ("history",)
    vector: MoEServingVectorEnv

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        self._history: list[tuple[float, int, int, int]] = []

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        """Start a new episode."""
        self._history = []
        return super().reset(seed=seed, options=options)

    def step(self, action: Any) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        """Wait, or send a batch; raises `InvalidAction` before anything changes."""
        ready = bool(self.vector.generators) and not self.vector.ended()
        time, waiting = float(self.vector.now[0]), int(self.vector.seen().queue.sum()) if ready else 0
        result = super().step(action)
        info = result[4]
        self._history.append((time, waiting, info["serving/rows"], info["serving/level"]))
        return result

    def action_masks(self) -> np.ndarray:
        """Mask `[actions]` of allowed actions."""
        return np.asarray(self.vector.action_masks()[0])

    def _picture(self) -> ServingPicture:
        return ServingPicture(self._history, self.vector.seconds, self.vector.service.levels)


SPEC = Spec(
    id="MoEServing-v0",
    entry_point="moe_envs.serving:MoEServingEnv",
    baselines="agents.baselines.serving",
    reference_point=(1.0, -1.0),
    validation_episodes=128,
    boards={
        f"{trace}, {classes}": {"trace": trace, "classes": classes}
        for trace in ("poisson", "bursts")
        for classes in SHARES
    },
    small={"seconds": 1.0},
    short={"seconds": 0.1},
    variants=(
        {},
        {"classes": "mixed", "trace": "bursts", "jitter": 0.3, "slowdown": (0.8, 2.0)},
        {"answers": "latency"},
    ),
)
