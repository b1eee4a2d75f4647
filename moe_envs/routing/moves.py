"""What the choice of experts for an input costs and changes, given the experts already paid in the batch.

Shape legend: n rows, E experts, K options, S tabulated subsets.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np

from experts.bundle import subsets

Numbers = TypeVar("Numbers", bound=Any)
KEPT = 2**14  # rows of what is seen of the experts paid


@dataclass(eq=False)
class Moves:
    """Moves of any number of experts, worked out in each step.

    `options [K]` are the codes of the subsets that can be chosen (bit e = expert e). `fixed` and `slope` `[S, 8]` are
    the costs of the subsets `codes [S]`, for a first use in the batch and for an input. A ledger stands for the experts
    not paid yet; here, it is their code. `prices` are those of an input and of a first use, `[E]` each.

    What is seen of the experts paid: ones for them, the mean of their `edges [E, E]`, if there are any, and what each
    expert costs now, if there are prices.
    """

    options: np.ndarray
    codes: np.ndarray
    fixed: np.ndarray
    slope: np.ndarray
    edges: np.ndarray | None
    prices: tuple[np.ndarray, np.ndarray] | None
    experts: int

    def __post_init__(self) -> None:
        self.none_paid = 2**self.experts - 1
        self._slope_of_option = self.slope[np.searchsorted(self.codes, self.options)]

    def ledger_of(self, unpaid: int) -> int:
        """The ledger of a code of experts not paid."""
        return unpaid

    def unpaid_of(self, ledger: int) -> int:
        """The inverse of `ledger_of`."""
        return ledger

    def block_of(self, unpaid: int) -> np.ndarray:
        """What is seen of the experts paid, as one block of bytes `[1]`."""
        return blocks(self.seen(np.array([unpaid])))

    def rows(self) -> list[np.ndarray] | SeenRows:
        """What is seen of the experts paid, by the code of those not paid."""
        return SeenRows(self)

    def pay(self, ledger: np.ndarray, option: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Costs `[n, 8]` of an option in each row; then the ledgers, blocks and numbers of the experts paid, `[n]`."""
        new = ledger & self.options.take(option)
        unpaid = ledger ^ new
        used = self.experts - np.bitwise_count(unpaid).astype(np.int64)
        return self.costs(new, option), unpaid, blocks(self.seen(unpaid)), used

    def costs(self, new: int | np.ndarray, option: int | np.ndarray) -> np.ndarray:
        """Costs `[..., 8]` of an option, of which the experts `new` are not paid yet."""
        return self.fixed.take(np.searchsorted(self.codes, new), axis=0) + self._slope_of_option.take(option, axis=0)

    def seen(self, unpaid: np.ndarray) -> np.ndarray:
        """What is seen of the experts paid, `[n, .]` float32."""
        paid = 1 - subsets.members(unpaid, self.experts).astype(np.float32)
        return self._seen(paid[:, None])[:, 0]  # products of single rows: the same bits in any number of rows

    def _seen(self, paid: np.ndarray) -> np.ndarray:
        parts = [paid]
        if self.edges is not None:
            parts.append(edges_of(paid, self.edges))
        if self.prices is not None:
            price, first_price = self.prices
            parts.append(price + (1 - paid) * first_price)
        return np.concatenate(parts, axis=-1).astype(np.float32)


class TabulatedMoves(Moves):
    """The same from tables over all 2^E ledgers, about twice as fast.

    A ledger is (code of the experts not paid yet) * K; a move is a ledger + option. `terms [moves, 8]` are its costs;
    after it, `ledger` is the next ledger, `used` the block of what is seen of the experts paid, and `num_used` their
    number. `seen_of_paid [2^E, .]` is what is seen, by code.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        new = self.options & self.codes[:, None]
        unpaid = (self.codes[:, None] ^ new).ravel()
        self.terms = self.costs(new, np.arange(len(self.options))).reshape(len(unpaid), -1)
        paid = 1 - subsets.members(self.codes, self.experts).astype(np.float32)
        self.seen_of_paid = self._seen(paid)
        self.ledger, self.used = unpaid * len(self.options), blocks(self.seen_of_paid)[unpaid]
        self.num_used = paid.sum(1).astype(np.int64)[unpaid]

    def ledger_of(self, unpaid: int) -> int:
        """The first move of a code of experts not paid."""
        return unpaid * len(self.options)

    def unpaid_of(self, ledger: int) -> int:
        """The inverse of `ledger_of`."""
        return ledger // len(self.options)

    def seen(self, unpaid: np.ndarray) -> np.ndarray:
        """What is seen of the experts paid, `[n, .]` float32."""
        return self.seen_of_paid[unpaid]

    def rows(self) -> list[np.ndarray]:
        """What is seen of the experts paid, by the code of those not paid."""
        return list(self.seen_of_paid)

    def pay(self, ledger: np.ndarray, option: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Costs `[n, 8]` of an option in each row; then the ledgers, blocks and numbers of the experts paid, `[n]`."""
        move = ledger + option
        terms = self.terms.take(move, axis=0)
        return terms, self.ledger.take(move), self.used.take(move), self.num_used.take(move)


class SeenRows(dict[int, np.ndarray]):
    """Rows of `Moves.seen` by code, kept once they were asked for."""

    def __init__(self, moves: Moves) -> None:
        super().__init__()
        self.moves = moves

    def __missing__(self, unpaid: int) -> np.ndarray:
        if len(self) == KEPT:
            self.clear()
        row: np.ndarray = self.moves.seen(np.array([unpaid]))[0]
        self[unpaid] = row
        return row

    def __reduce__(self) -> tuple[type[SeenRows], tuple[Moves]]:
        return SeenRows, (self.moves,)


def edges_of(chosen: Numbers, edges: Numbers) -> Numbers:
    """The mean edge from the chosen experts, ones of `[..., E]`, to each, of edges `[E, E]`; arrays or tensors."""
    total = chosen.sum(-1)[..., None]
    return chosen @ edges / (total + (total == 0))


def blocks(rows: np.ndarray) -> np.ndarray:
    """Rows `[n, k]` of float32 as `[n]` blocks of bytes."""
    return rows.view(f"V{4 * rows.shape[1]}").ravel()
