"""Tables of MoERouting-v0: mini-batches, observations, outcomes and costs, built once per environment."""

from typing import Any, TypeVar

import numpy as np

from cost.model import Cost, CostModel, RelativeCost
from cost.profile import Profile
from experts.bundle import SPLITS, Bundle, Split
from experts.bundle.streams import deal
from moe_envs.core.spaces import layout
from moe_envs.routing.observations import View

Code = TypeVar("Code", int, np.ndarray)
Numbers = TypeVar("Numbers", bound=Any)
ACTIONS = ("expert", "subset", "top-m")
DECK_SIZE = 4_096  # mini-batches that a split is laid out in


class RoutingTables:
    """Look-ups by input index (the last one, `num_inputs`, stands for "no input left"), by batch and by subset code.

    `deck` is flat: batch b's inputs start at b * (batch_size + 1) and end in a "no input left". `correct [n + 1, K]`
    says whether an input is classified correctly under a choice: an expert, an m, or a subset's code, by `action`.
    `subsets [options]` are the codes (bit e = expert e) that a choice can mean: one for each choice, but for top-m all
    codes, of which `options [n + 1, K]` names the one that a choice means for an input.

    An observation is a `record`: one of `seen`, what is seen of an input (`[n + 1, .]`, or `by_place` in the deck), one
    of `summaries [batches, .]`, what is seen of a batch, and what changes in it. `seen_blocks` and `summary_blocks` are
    the same as blocks of bytes, which are copied several times faster than slices of rows.

    `fixed` and `slope` `[2^E, 8]` are the costs of subsets of experts, for a first use in the batch and for an input:
    relative cost, time [s], memory [B], energy [J], then the vector reward (0, -time, -memory, -energy, relative).
    A move is a ledger, (code of the experts not paid yet) * options, + option. `terms [moves, 8]` are its costs; after
    it, `ledger` is the next ledger, `used` the block of what is seen of the experts paid, `num_used` their number. By
    code, `paid` are these blocks, `seen_of_paid` their numbers.
    `first_price [2^E]` of pools and `input_price [E]` are costs in the reward, in units of a correct answer.
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
        self._pay(profile.cost_model(), bundle.split("rl_train"), stream, weights)
        self.edges, singles = bundle.edges, 1 << np.arange(self.num_experts)
        prices = (batch_size * cost_weight * part[:, 0] for part in (self.fixed, self.slope))
        self.first_price, self.input_price = next(prices), next(prices)[singles]
        deck = deal(tables.labels, batch_size, stream, DECK_SIZE, seed=SPLITS.index(split))
        self.deck = np.append(np.pad(deck, ((0, 0), (0, 1)), constant_values=self.num_inputs), self.num_inputs)
        if observation == "estimates":
            chances = bundle.in_batches(split, deck)
            view = View.of_estimates(tables, deck, chances, self.input_price, self.first_price)
        else:
            view = View.of_features(tables, deck)
        self._lay_out(view)
        self.by_place, self.seen, self.summaries = view.by_place, view.seen, view.summaries
        self.seen_blocks, self.summary_blocks = _blocks(self.seen), _blocks(self.summaries)
        self._packed = np.append(tables.outcomes, np.zeros_like(tables.outcomes[:1]), axis=0)
        self._tabulate_moves(action)
        self._tabulate_choices(action, tables.gate_logits)
        self.quality = np.array([0.0, 1 / batch_size])
        self.codes = 1 << np.arange(self.num_experts)
        self.progress = (np.arange(batch_size + 2) / batch_size).astype(np.float32)

    def outcomes(self, inputs: np.ndarray) -> np.ndarray:
        """Whether each subset of experts classifies the inputs correctly, `[n, 2^E]` uint8."""
        return np.unpackbits(self._packed[inputs], axis=1, count=2**self.num_experts, bitorder="little")

    def ledger_of(self, unpaid: Code) -> Code:
        """The first move of a code of experts not paid, or of -1, none paid."""
        return unpaid % 2**self.num_experts * len(self.subsets)

    def batch(self, index: int) -> np.ndarray:
        """The input indices of one batch, with the "no input left" at its end."""
        start = index * (self.batch_size + 1)
        return self.deck[start : start + self.batch_size + 1]

    def _tabulate_moves(self, action: str) -> None:
        codes = np.arange(2**self.num_experts)
        self.subsets = 1 << np.arange(self.num_experts) if action == "expert" else codes
        new = self.subsets & codes[:, None]
        self.terms = (self.fixed[new] + self.slope[self.subsets]).reshape(-1, self.fixed.shape[1])
        unpaid = (codes[:, None] ^ new).ravel()
        members_paid = 1 - (codes[:, None] >> np.arange(self.num_experts) & 1).astype(np.float32)
        seen = [members_paid]
        if self.edges is not None:
            seen.append(edges_of(members_paid, self.edges))
        if self.by_place:
            seen.append(self.input_price + (1 - members_paid) * self.first_price[1 << np.arange(self.num_experts)])
        self.seen_of_paid = np.hstack(seen).astype(np.float32)
        self.paid = _blocks(self.seen_of_paid)
        self.ledger, self.used = self.ledger_of(unpaid), self.paid[unpaid]
        self.num_used = members_paid.sum(1).astype(np.int64)[unpaid]

    def _tabulate_choices(self, action: str, gate_logits: np.ndarray) -> None:
        every = np.arange(self.num_inputs + 1)
        if action == "top-m":
            self.options = np.pad((1 << _ranking(gate_logits)).cumsum(axis=1), ((0, 1), (0, 0)))
            self.correct = np.take_along_axis(self.outcomes(every), self.options, axis=1)
        else:
            self.correct = np.ascontiguousarray(self.outcomes(every)[:, self.subsets])

    def _pay(self, costs: CostModel, split: Split, stream: str, weights: Cost) -> None:
        self.reference = _top_2_cost(costs, split, self.batch_size, stream)
        self.relative = RelativeCost(self.reference, weights)
        ratio = np.array([-1 / self.reference.time, -1 / self.reference.memory, -1 / self.reference.energy])
        self.fixed, self.slope = (
            np.column_stack([self.relative(*terms.T), terms, np.zeros(len(terms)), terms * ratio])
            for terms in costs.subsets()
        )
        self.max_cost = float(self.fixed[-1, 0] + self.batch_size * self.slope[-1, 0])

    def _lay_out(self, view: View) -> None:
        experts = self.num_experts
        edges = [("edges", experts, 0, 1, "mean edge from the experts already paid to each, in the expert graph")]
        highest = float((self.first_price[1 << np.arange(experts)] + self.input_price).max()) * 1.001 + 1e-6
        prices = [("prices", experts, 0, highest, "price of running each expert now, in correct answers")]
        self.layout = layout(
            [
                *view.of_input,
                *view.of_batch,
                ("experts_used", experts, 0, 1, "1 for experts already paid in this batch"),
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


def edges_of(chosen: Numbers, edges: Numbers) -> Numbers:
    """The mean edge from the chosen experts, ones of `[..., E]`, to each, of edges `[E, E]`; arrays or tensors."""
    total = chosen.sum(-1)[..., None]
    return chosen @ edges / (total + (total == 0))


def _blocks(rows: np.ndarray) -> np.ndarray:
    """Rows `[n, k]` of float32 as `[n]` blocks of bytes."""
    return rows.view(f"V{4 * rows.shape[1]}").ravel()


def _ranking(gate_logits: np.ndarray) -> np.ndarray:
    return np.argsort(-gate_logits, axis=1, kind="stable")


def _top_2_cost(costs: CostModel, split: Split, batch_size: int, stream: str) -> Cost:
    """The mean cost of a batch under the model's own top-2 gate, over 1,024 batches."""
    batches = deal(split.labels, batch_size, stream, count=1024)
    chosen = np.zeros(split.gate_logits.shape)
    np.put_along_axis(chosen, _ranking(split.gate_logits)[:, :2], 1, axis=1)
    return Cost(*costs.batch(chosen[batches].sum(1)).mean(0).tolist())
