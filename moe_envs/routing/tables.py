"""Tables of MoERouting-v0: mini-batches, observations, outcomes and costs, built once per environment."""

from typing import Any, TypeVar

import numpy as np

from cost.model import Cost, CostModel, RelativeCost
from cost.profile import Profile
from experts.bundle import FEATURE_BOUND, SPLITS, Bundle, Split
from moe_envs.core.spaces import layout

Code = TypeVar("Code", int, np.ndarray)
Numbers = TypeVar("Numbers", bound=Any)
STREAMS = ("topical", "iid")
ACTIONS = ("expert", "subset", "top-m")
DECK_SIZE = 16_384  # mini-batches that a split is laid out in
TOPIC_CONCENTRATION = 0.15  # of the Dirichlet over classes: most of a topical batch is of one to three classes
GATE_BOUND = 10.0
BATCH_SCALE = 3.0  # brings the mean features of topical batches to a spread of about 1


def deal(labels: np.ndarray, batch_size: int, stream: str, count: int = DECK_SIZE, seed: int = 0) -> np.ndarray:
    """`count` mini-batches `[count, batch_size]` of indices into `labels`, drawn with replacement.

    "iid": uniformly; "topical": from classes whose shares are drawn for each batch from a Dirichlet distribution. The
    deck belongs to the environment, not to an episode's seed: it is the same for everyone, and another for each split.
    """
    generator = np.random.default_rng(seed)
    if stream == "iid":
        return generator.integers(len(labels), size=(count, batch_size))
    classes, sizes = np.unique(labels, return_counts=True)
    shares = generator.dirichlet(np.full(len(classes), TOPIC_CONCENTRATION), size=count).cumsum(axis=1)
    uniform = generator.random((count, batch_size))
    drawn = np.zeros((count, batch_size), dtype=np.int64)
    for boundary in shares.T[:-1]:
        drawn += uniform > boundary[:, None]
    position = (generator.random((count, batch_size)) * sizes[drawn]).astype(np.int64)
    return np.argsort(labels, kind="stable")[(sizes.cumsum() - sizes)[drawn] + position]


class RoutingTables:
    """Look-ups by input index (the last one, `num_inputs`, stands for "no input left"), by batch and by subset code.

    `deck` is flat: batch b's inputs start at b * (batch_size + 1) and end in a "no input left". `correct [n + 1, K]`
    says whether an input is classified correctly under a choice: an expert, an m, or a subset's code, by `action`.
    `subsets [options]` are the codes (bit e = expert e) that a choice can mean: one for each choice, but for top-m all
    codes, of which `options [n + 1, K]` names the one that a choice means for an input.

    An observation is a `record`: one of `seen [n + 1, F + E]`, what is seen of an input, one of `summaries`
    `[batches, E + F]`, what is seen of a batch, and what changes in it. Blocks of bytes are copied several times faster
    than slices of rows, whence `seen_blocks` and `summary_blocks`.

    `fixed` and `slope` `[2^E, 8]` are the costs of subsets of experts, for a first use in the batch and for an input:
    relative cost, time [s], memory [B], energy [J], then the vector reward (0, -time, -memory, -energy, relative).
    A move is a ledger, (code of the experts not paid yet) * options, + option. `terms [moves, 8]` are its costs; after
    it, `ledger` is the next ledger, `used` the block of `experts_used` (and of `edges`, where the model has an expert
    graph), `num_used` their number. By code, `paid` are these blocks and `seen_of_paid` their numbers.
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
    ) -> None:
        tables = bundle.split(split)
        self.batch_size, self.num_experts, self.num_inputs = batch_size, bundle.num_experts, len(tables.labels)
        self._pay(profile.cost_model(), bundle.split("rl_train"), stream, weights)
        features, self.edges = tables.features.astype(np.float32), bundle.edges
        self._lay_out(features.shape[1])
        deck = deal(tables.labels, batch_size, stream, seed=SPLITS.index(split))
        self.deck = np.append(np.pad(deck, ((0, 0), (0, 1)), constant_values=self.num_inputs), self.num_inputs)
        self._summarise(deck, features, tables.gate_logits)
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
        self.seen_of_paid = members_paid
        if self.edges is not None:
            self.seen_of_paid = np.hstack([members_paid, edges_of(members_paid, self.edges)]).astype(np.float32)
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

    def _lay_out(self, num_features: int) -> None:
        experts, summary_bounds = self.num_experts, (-FEATURE_BOUND * BATCH_SCALE, FEATURE_BOUND * BATCH_SCALE)
        edges = [("edges", experts, 0, 1, "mean edge from the experts already paid to each, in the expert graph")]
        if self.edges is None:
            edges = []
        self.layout = layout(
            [
                ("features", num_features, -FEATURE_BOUND, FEATURE_BOUND, "principal components of the present input"),
                ("gate_logits", experts, -GATE_BOUND, GATE_BOUND, "the gate's logits for it, less their mean"),
                ("batch_gate", experts, 0, experts, "mean gate probability over the whole batch, times E: 1 if even"),
                ("batch_features", num_features, *summary_bounds, "mean features over the whole batch, times 3"),
                ("experts_used", experts, 0, 1, "1 for experts already paid in this batch"),
                *edges,
                ("cost", 1, 0, self.max_cost * 1.001, "cost of this batch so far, relative to the top-2 gate's"),
                ("progress", 1, 0, 1, "share of the batch that is done"),
            ]
        )
        sizes = {name: part.slice.stop - part.slice.start for name, part in self.layout.items()}
        self.record = np.dtype(
            [
                ("input", f"V{4 * (sizes['features'] + sizes['gate_logits'])}"),
                ("batch", f"V{4 * (sizes['batch_gate'] + sizes['batch_features'])}"),
                ("experts_used", f"V{4 * (sizes['experts_used'] + sizes.get('edges', 0))}"),
                ("cost", np.float32),
                ("progress", np.float32),
            ]
        )
        self.width = self.layout["progress"].slice.stop
        self.of_input = slice(0, self.layout["gate_logits"].slice.stop)
        self.of_batch = slice(self.of_input.stop, self.layout["batch_features"].slice.stop)

    def _summarise(self, deck: np.ndarray, features: np.ndarray, gate_logits: np.ndarray) -> None:
        gate = np.clip(gate_logits - gate_logits.mean(1, keepdims=True), -GATE_BOUND, GATE_BOUND)
        seen = np.hstack([features, gate])
        self.seen = np.append(seen, np.zeros_like(seen[:1]), axis=0).astype(np.float32)
        odds = np.exp(gate)
        gate_share = odds / odds.sum(1, keepdims=True) * self.num_experts
        averaged = np.hstack([gate_share, features * BATCH_SCALE])
        parts = np.array_split(deck, max(1, len(deck) // 1024))
        self.summaries = np.concatenate([averaged[part].mean(1) for part in parts]).astype(np.float32)
        self.seen_blocks, self.summary_blocks = _blocks(self.seen), _blocks(self.summaries)


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
