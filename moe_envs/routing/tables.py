"""Tables of MoERouting-v0: mini-batches, observations, outcomes and costs, built once per environment."""

import numpy as np

from cost.model import Cost, CostModel, RelativeCost
from cost.profile import Profile
from experts.bundle import SPLITS, Bundle, Split, subsets
from experts.bundle.streams import deal
from moe_envs.core.spaces import layout
from moe_envs.routing.moves import Moves, TabulatedMoves, blocks
from moe_envs.routing.observations import View
from moe_envs.routing.planning import pool_members

ACTIONS = ("expert", "subset", "top-m")
DECK_SIZE = 4_096  # mini-batches that a split is laid out in


class RoutingTables:
    """Look-ups by input index (the last one, `num_inputs`, stands for "no input left"), by batch and by subset.

    `deck` is flat: batch b's inputs start at b * (batch_size + 1) and end in a "no input left". `correct [n + 1, K]`
    says whether an input is classified correctly under a choice: an expert, an m, or a subset's code, by `action`.
    `moves.options` are the subsets that a choice can mean: one for each choice, but for top-m all that the bundle
    tabulates, of which `options [n + 1, K]` names the one that a choice means for an input.

    An observation is a `record`: one of `seen`, what is seen of an input (`[n + 1, .]`, or `by_place` in the deck), one
    of `summaries [batches, .]`, what is seen of a batch, and what changes in it. `seen_blocks` and `summary_blocks` are
    the same as blocks of bytes, which are copied several times faster than slices of rows.

    `subsets [S]` are the codes (bit e = expert e) that the bundle tabulates. `fixed` and `slope` `[S, 8]` are their
    costs, and in the last row those of all experts, for a first use in the batch and for an input: relative cost,
    time [s], memory [B], energy [J], then the vector reward (0, -time, -memory, -energy, relative).
    `input_price [E]`, `first_price [E]` and `pool_price [P]`, of the first use of the plan's pools, are costs in the
    reward, in units of a correct answer.
    """

    def __init__(
        self,
        bundle: Bundle,
        split: str,
        profile: Profile,
        weights: Cost,
        *,
        batch_size: int = 32,
        stream: str = "topical",
        action: str = "expert",
        observation: str = "estimates",
        cost_weight: float = 0.2,
    ) -> None:
        tables = bundle.split(split)
        self.batch_size, self.num_experts, self.num_inputs = batch_size, bundle.num_experts, len(tables.labels)
        self.subsets = subsets.tabulated(self.num_experts)
        self.complete = subsets.complete(self.num_experts)
        _check_action(action, self.num_experts)
        self._pay(profile.cost_model(), bundle.split("rl_train"), stream, weights)
        self.edges, self.codes = bundle.edges, subsets.singles(self.num_experts)
        prices = (batch_size * cost_weight * part[:, 0] for part in (self.fixed, self.slope))
        price, self.input_price = next(prices), next(prices)[self.column(self.codes)]
        self.first_price = price[self.column(self.codes)]
        self.pool_price = price if self.complete else pool_members(self.num_experts) @ self.first_price
        deck = deal(tables.labels, batch_size, stream, DECK_SIZE, seed=SPLITS.index(split))
        self.deck = np.append(np.pad(deck, ((0, 0), (0, 1)), constant_values=self.num_inputs), self.num_inputs)
        if observation == "estimates":
            chances = bundle.in_batches(split, deck)
            view = View.of_estimates(tables, deck, chances, self.input_price, self.pool_price)
        else:
            view = View.of_features(tables, deck)
        self._lay_out(view)
        self.by_place, self.seen, self.summaries = view.by_place, view.seen, view.summaries
        self.seen_blocks, self.summary_blocks = blocks(self.seen), blocks(self.summaries)
        self._packed = np.append(tables.outcomes, np.zeros_like(tables.outcomes[:1]), axis=0)
        self.moves = self._moves(self.codes if action == "expert" else self.subsets)
        self._tabulate_choices(action, tables.gate_logits)
        self.quality = np.array([0.0, 1 / batch_size])
        self.progress = (np.arange(batch_size + 2) / batch_size).astype(np.float32)

    def outcomes(self, inputs: np.ndarray) -> np.ndarray:
        """Whether each of `subsets` classifies the inputs correctly, `[n, S]` uint8."""
        return np.unpackbits(self._packed[inputs], axis=1, count=len(self.subsets), bitorder="little")

    def column(self, codes: np.ndarray) -> np.ndarray:
        """The places of codes in `subsets`."""
        return codes if self.complete else np.searchsorted(self.subsets, codes)

    def batch(self, index: int) -> np.ndarray:
        """The input indices of one batch, with the "no input left" at its end."""
        start = index * (self.batch_size + 1)
        return self.deck[start : start + self.batch_size + 1]

    def _moves(self, options: np.ndarray) -> Moves:
        prices = (self.input_price, self.first_price) if self.by_place else None
        kind = TabulatedMoves if self.complete else Moves
        return kind(options, self.subsets, self.fixed, self.slope, self.edges, prices, self.num_experts)

    def _tabulate_choices(self, action: str, gate_logits: np.ndarray) -> None:
        outcomes = self.outcomes(np.arange(self.num_inputs + 1))
        if action == "top-m":
            most = self.num_experts if self.complete else 2
            codes = (1 << _ranking(gate_logits)[:, :most]).cumsum(axis=1)
            self.options = np.pad(self.column(codes), ((0, 1), (0, 0)))
            self.correct = np.take_along_axis(outcomes, self.options, axis=1)
        else:
            self.correct = np.ascontiguousarray(outcomes[:, self.column(self.moves.options)])

    def _pay(self, costs: CostModel, split: Split, stream: str, weights: Cost) -> None:
        self.reference = _top_2_cost(costs, split, self.batch_size, stream)
        self.relative = RelativeCost(self.reference, weights)
        ratio = np.array([-1 / self.reference.time, -1 / self.reference.memory, -1 / self.reference.energy])
        self.fixed, self.slope = (
            np.column_stack([self.relative(*terms.T), terms, np.zeros(len(terms)), terms * ratio])
            for terms in costs.subsets(np.union1d(self.subsets, 2**self.num_experts - 1))
        )
        self.max_cost = float(self.fixed[-1, 0] + self.batch_size * self.slope[-1, 0])

    def _lay_out(self, view: View) -> None:
        experts = self.num_experts
        edges = [("edges", experts, 0, 1, "mean edge from the experts already used to each, in the expert graph")]
        highest = float((self.first_price + self.input_price).max()) * 1.001 + 1e-6
        prices = [("prices", experts, 0, highest, "price of running each expert now, in correct answers")]
        self.layout = layout(
            [
                *view.of_input,
                *view.of_batch,
                ("experts_used", experts, 0, 1, "1 for experts already used in this batch"),
                *(edges if self.edges is not None else []),
                *(prices if view.by_place else []),
                ("cost", 1, 0, self.max_cost * 1.001, "cost of this batch so far, relative to the top-2 gate's"),
                ("progress", 1, 0, 1, "share of the batch that is done"),
            ]
        )
        self.of_input = slice(0, sum(size for _, size, *_ in view.of_input))
        self.of_batch = slice(self.of_input.stop, self.layout["experts_used"].slice.start)
        self.of_paid = slice(self.of_batch.stop, self.layout["cost"].slice.start)
        parts = {"input": self.of_input, "batch": self.of_batch, "paid": self.of_paid}
        blocks = [(name, f"V{4 * (part.stop - part.start)}") for name, part in parts.items()]
        self.record = np.dtype([*blocks, ("cost", np.float32), ("progress", np.float32)])
        self.width = self.layout["progress"].slice.stop


def _check_action(action: str, experts: int) -> None:
    if action == "subset" and not subsets.complete(experts):
        raise ValueError(
            f"action='subset': a bundle of {experts} experts has the outcomes of single experts and pairs only; must "
            f"be 'expert', or 'top-m' of one or two experts, with more than {subsets.ALL_UP_TO} experts"
        )


def _ranking(gate_logits: np.ndarray) -> np.ndarray:
    return np.argsort(-gate_logits, axis=1, kind="stable")


def _top_2_cost(costs: CostModel, split: Split, batch_size: int, stream: str) -> Cost:
    """The mean cost of a batch under the model's own top-2 gate, over 1,024 batches."""
    batches = deal(split.labels, batch_size, stream, count=1024)
    chosen = np.zeros(split.gate_logits.shape)
    np.put_along_axis(chosen, _ranking(split.gate_logits)[:, :2], 1, axis=1)
    return Cost(*costs.batch(chosen[batches].sum(1)).mean(0).tolist())
