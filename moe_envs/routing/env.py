"""MoERouting-v0: which experts of a trained Mixture of Experts answer each input of a mini-batch."""

from dataclasses import replace
from typing import Annotated, Unpack

import numpy as np
from annotated_types import Ge, Le
from gymnasium import spaces

from cost.arguments import NonNegative, choose
from cost.model import Cost
from experts import library, profiles
from experts.bundle import SPLITS
from experts.bundle.streams import STREAMS
from moe_envs.core import BatchedEnv, Face, Outcome, Reward, Spec
from moe_envs.routing.live import LiveExperts
from moe_envs.routing.observations import OBSERVATIONS
from moe_envs.routing.single import SteppedBatch
from moe_envs.routing.tables import ACTIONS, RoutingTables

ADVICE = 20.0  # logits for each correct answer
COSTS = ("reference", "machine", "live")


class MoERoutingVectorEnv(BatchedEnv):
    """MoERouting-v0 over `num_envs` mini-batches at once; see `MoERoutingEnv` for the problem and its arguments."""

    STATE = ("batch", "_place", "_inputs", "_ledger", "_used", "_cost", "_summary", "_loads", "_seconds")

    def __init__(
        self,
        num_envs: int = 1,
        *,
        bundle: str = "fashion-mnist",
        split: str = "rl_train",
        cost_weight: NonNegative = 0.2,
        costs: str = "reference",
        batch_size: Annotated[int, Ge(1), Le(2**14)] = 32,
        stream: str = "topical",
        action: str = "expert",
        observation: str = "estimates",
        time_weight: NonNegative = 1 / 3,
        memory_weight: NonNegative = 1 / 3,
        energy_weight: NonNegative = 1 / 3,
        normalizer: str | None = None,
        **face: Unpack[Face],
    ) -> None:
        choose("split", split, SPLITS)
        choose("stream", stream, STREAMS)
        choose("action", action, ACTIONS)
        choose("costs", costs, COSTS)
        choose("observation", observation, OBSERVATIONS)
        loaded = library.load("bundle", bundle)
        weights = Cost(time_weight, memory_weight, energy_weight)
        profile = profiles.select(loaded, costs)
        tables = RoutingTables(
            loaded, split, profile, weights, batch_size=batch_size, stream=stream, action=action,
            observation=observation, cost_weight=cost_weight,
        )  # fmt: skip
        reward = Reward.of(cost_weight, tables.reference, weights, normalizer)
        experts = tables.num_experts
        self._num_choices = tables.correct.shape[1]
        action_space = spaces.MultiBinary(experts) if action == "subset" else spaces.Discrete(self._num_choices)
        super().__init__(num_envs, tables.layout, action_space, reward, **face)
        self.tables, self.action = tables, action
        if tables.by_place and action == "expert":
            self.advice = {"worth": ADVICE, "detour": ADVICE}
        self.batch, self._inputs, self._ledger = np.zeros((3, num_envs), dtype=np.int64)
        self._place = np.zeros((2, num_envs), dtype=np.int64)  # in the deck, and in the batch
        self._cost = np.zeros(num_envs)
        self._summary = np.zeros(num_envs, dtype=tables.summary_blocks.dtype)
        none_paid = tables.moves.none_paid
        self._start = tables.moves.ledger_of(none_paid), tables.moves.block_of(none_paid)
        self._used = np.zeros(num_envs, dtype=self._start[1].dtype)
        self.live = LiveExperts(loaded, tables) if costs == "live" else None
        self._loads = np.zeros((num_envs, experts if self.live else 0), dtype=np.int64)
        self._seconds = np.zeros(self._loads.shape)

    def _begin(self, rows: np.ndarray) -> None:
        batch = self._draw(rows, len(self.tables.summaries))
        self.batch[rows], self._place[0, rows], self._place[1, rows] = batch, batch * (self.tables.batch_size + 1), 0
        self._ledger[rows], self._used[rows] = self._start
        self._cost[rows] = 0.0
        self._summary[rows] = self.tables.summary_blocks[batch]
        self._inputs = self.tables.deck.take(self._place[0])
        if self.live is not None:
            self._loads[rows], self._seconds[rows] = 0, 0.0

    def _advance(self, actions: np.ndarray) -> Outcome:
        tables = self.tables
        choice: np.ndarray = actions.astype(np.int64) @ tables.codes if self.action == "subset" else actions
        entry = self._inputs * self._num_choices + choice
        option = tables.options.take(entry) if self.action == "top-m" else choice
        terms, self._ledger, self._used, num_used = tables.moves.pay(self._ledger, option)
        if self.live is not None:
            self.live.charge(terms, tables.moves.options.take(option), self._loads, self._seconds)
        terms[:, 4] = quality = tables.quality.take(tables.correct.take(entry))
        self._cost += terms[:, 0]
        self._place += 1
        self._inputs = tables.deck.take(self._place[0])
        details = {"routing/experts_used": num_used}
        ended = self._place[1] == tables.batch_size
        return Outcome(quality, terms[:, 1:4], ended, details, (terms[:, 0], terms[:, 4:]))

    def _observe(self) -> np.ndarray:
        tables = self.tables
        observation = np.empty((self.num_envs, tables.width), dtype=np.float32)
        record = observation.view(tables.record)[:, 0]
        record["input"] = tables.seen_blocks.take(self._place[0] if tables.by_place else self._inputs)
        record["batch"] = self._summary
        record["paid"] = self._used
        record["cost"] = self._cost if self.live is None else self._cost.clip(0, tables.max_cost)
        record["progress"] = tables.progress.take(self._place[1])
        return observation

    def take_row(self) -> tuple[int, int, int, float]:
        """Batch, position, code of the experts not paid yet, and cost so far, of a vector of one row."""
        unpaid = self.tables.moves.unpaid_of(self._ledger.item())
        return self.batch.item(), self._place[1].item(), unpaid, self._cost.item()

    def put_row(self, batch: int, position: int, unpaid: int, cost: float) -> None:
        """The inverse of `take_row`."""
        self.batch[0], self._cost[0] = batch, cost
        self._ledger[0], self._used[:] = self.tables.moves.ledger_of(unpaid), self.tables.moves.block_of(unpaid)
        self._place[:, 0] = batch * (self.tables.batch_size + 1) + position, position
        self._done[0] = position == self.tables.batch_size
        self._summary[0] = self.tables.summary_blocks[batch]
        self._inputs = self.tables.deck.take(self._place[0])

    def pay_live(self, new: int, option: int) -> np.ndarray:
        """The live costs `[8]` of an option, of which the experts `new` are not paid yet, of a vector of one row."""
        assert self.live is not None
        moves = self.tables.moves
        terms = moves.costs(new, option)[None]
        self.live.charge(terms, moves.options[[option]], self._loads, self._seconds)
        return terms[0]

    def begin_live(self) -> None:
        """Forget what the experts of the batch before took."""
        self._loads[:], self._seconds[:] = 0, 0.0

    def batch_inputs(self, row: int) -> np.ndarray:
        """The input indices `[batch_size]` of a row's present batch."""
        return self.tables.batch(self.batch[row])[:-1]


class MoERoutingEnv(SteppedBatch):
    """
    ## Description
    A trained Mixture of Experts classifies a mini-batch of real inputs. In each step, the agent selects the experts for
    the next input. The first use of an expert in a batch costs a fixed amount (its call and its weights), and each
    input adds a small cost. Experts differ: small ones are cheap, large ones are accurate, and each is best on
    different inputs. Since an expert is nearly free after its first use, the choice for one input affects the best
    choice for the next: the problem is sequential, not a bandit.

    Models, data and costs are real. The outcomes of all 2^E subsets of experts are tabulated in a bundle (of more than
    10 experts, those of single experts and pairs), and the costs are looked up in a profile measured on a machine
    (energy is a proxy on machines without an energy counter).

    With `costs="live"`, the default of `MoERoutingLive-v0` (nondeterministic), the experts are run and timed in each
    step, on as many example inputs as the expert has inputs in the batch so far. The time of an expert in a batch is
    that of its last run, so a step costs the difference to the run before. Memory and energy come from this machine's
    profile.

    ## Action Space
    The argument `action` selects the action space, for a bundle of E experts (8 in the shipped bundles):

    | action | space | meaning |
    |---|---|---|
    | `"expert"` | `Discrete(E)` | run this expert |
    | `"subset"` | `MultiBinary(E)` | run these experts, mixed by the gate's softmax over them |
    | `"top-m"` | `Discrete(E)` | run the m + 1 experts with the largest gate logits |

    The empty subset has no cost and is never correct. With more than 10 experts, at most two can answer an input:
    `"top-m"` is `Discrete(2)`, and `"subset"` is refused.

    ## Observation Space
    A `Box` of float32; `env.unwrapped.observation_layout` maps each name to its slice, its bounds and its meaning.

    | part | size | range | meaning |
    |---|---|---|---|
    | `worth` | E | -price..1 | estimated P(correct) of each expert for the current input, less the price of an input |
    | `gate` | E | 0..1 | gate probabilities of the current input |
    | `batch_worth` | E | -price..1 | mean worth over the batch |
    | `batch_gate` | E | 0..E | mean gate probability over the whole batch, times E; 1 if uniform |
    | `plan` | E | -4..4 | best return of a pool with this expert, minus that of a pool without it |
    | `detour` | E | -5..0 | 0 for experts in the best pool, else `plan` - 1 |
    | `experts_used` | E | 0..1 | 1 for experts already used in this batch |
    | `edges` | E | 0..1 | mean edge weight from those experts to each expert; only for models with an expert graph |
    | `prices` | E | 0..first use | price of running each expert now |
    | `cost` | 1 | 0..all experts for all inputs | cost of this batch so far |
    | `progress` | 1 | 0..1 | finished share of the batch |

    Worth, plan and prices are in correct answers: 1 is 1 / batch_size of the return. P(correct) is estimated from the
    input's features, its gate and the rest of the batch, by nearest neighbours and small networks fitted on `rl_train`
    when the bundle is built; estimates of inputs of `rl_train` are cross-fitted. The plan is exact for these estimates
    if one expert answers each input; with more than 10 experts, it is over pools of at most 3.

    With `observation="features"`, the policy sees the input itself instead of `worth`, `gate`, `batch_worth`, `plan`,
    `detour` and `prices`: `features` (F principal components scaled to variance 1, within +-5), `gate_logits` (minus
    their mean, within +-10), and `batch_features` (three times their mean over the batch).

    After the last input, the parts about the current input are 0.

    ## Rewards
    R = quality - cost_weight * cost. Quality is 1 / batch_size for a correct answer, so that the quality of an episode
    is the accuracy on its batch. Cost is the weighted sum of time, memory and energy, each relative to the mean cost of
    the model's own top-2 gate per batch, so that the top-2 gate has a mean cost of 1.0 per episode.

    `info` has `reward/quality`, `reward/cost` (relative, unweighted; with a `normalizer` the reward uses
    `reward/normalized_cost` instead), `cost/time` [s], `cost/memory` [B], `cost/energy`
    [J], `vector_reward` (quality, -time, -memory, -energy, relative), and
    `routing/experts_used`, the number of distinct experts used in this batch so far.

    ## Starting State
    The next mini-batch of the row, out of 4,096 per split; no expert has been used.

    ## Episode End
    Terminated after the last input of the batch; never truncated by itself.

    ## Arguments
    | argument | default | meaning |
    |---|---|---|
    | `bundle` | `"fashion-mnist"` | name (`"digits"`, or your own) or folder of a bundle; for `make_vec` also a list |
    | `split` | `"rl_train"` | inputs of `"rl_train"`, `"validation"` or `"test"` |
    | `cost_weight` | 0.2 | lambda of the reward; for `make_vec` also a list |
    | `costs` | `"reference"` | the shipped profile, this `"machine"`'s, or `"live"` (default of MoERoutingLive-v0) |
    | `batch_size` | 32 | inputs in a batch, steps in an episode |
    | `stream` | `"topical"` | class shares of a batch from Dirichlet(0.15), or `"iid"` |
    | `action` | `"expert"` | see Action Space |
    | `observation` | `"estimates"` | or `"features"`, see Observation Space |
    | `time_weight`, `memory_weight`, `energy_weight` | 1/3 each | weights of the cost terms; should sum to 1 |
    | `normalizer` | None | file of a `CostNormalizer` for `reward/cost`; the reward then uses the normalised cost |
    | `render_mode` | None | `"rgb_array"` or `"ansi"` |

    ## Version History
    * v0: initial version.
    """

    vector_class = MoERoutingVectorEnv


SPEC = Spec(
    id="MoERouting-v0",
    entry_point="moe_envs.routing:MoERoutingEnv",
    vector_entry_point="moe_envs.routing:make_vec",
    baselines="agents.baselines.routing",
    reference_point=(2.0, 0.0),
    boards={
        f"{bundle}, cost weight {weight:g}": {"bundle": bundle, "cost_weight": weight}
        for bundle in ("fashion-mnist", "digits")
        for weight in (0.1, 0.4)
    },
    small={"bundle": "digits"},
    short={"batch_size": 4},
    variants=tuple({"batch_size": 8, "action": action} for action in ACTIONS),
)
LIVE = replace(SPEC, id="MoERoutingLive-v0", kwargs={"costs": "live"}, nondeterministic=True, variants=())
