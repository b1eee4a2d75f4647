"""The language model, the passages and the costs of MoELayerTopK-v0."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

import numpy as np

from cost.model import Cost
from experts import profiles
from experts.language import LanguageModel
from experts.language.passages import Passages
from moe_envs.core.stepped import SteppedModel, located, read
from moe_envs.layertopk.observations import projection


class PricedModel(SteppedModel):
    """A model over passages, with the costs of each number of experts.

    `costs [L, K + 1, 3]` are a row's in s, B, J for a token in a layer, in a batch of `batch` rows; `reference` is the
    cost of a passage with K experts.
    """

    def __init__(self, model: LanguageModel, passages: Passages, costs: np.ndarray) -> None:
        super().__init__(model, passages)
        self.costs = costs
        self.reference = Cost(*(costs[:, self.k].sum(0) * self.size).tolist())
        self.projection = projection(self.width)

    @classmethod
    def of(cls, model: str, text: str | None, split: str, tokens: int, costs: str, batch: int) -> PricedModel:
        """The same for the same arguments, as long as the files of the model are the same."""
        return _made(*located(model), text, split, tokens, costs, batch)


@lru_cache(maxsize=8)
def _made(path: str, stamp: int, text: str | None, split: str, tokens: int, costs: str, batch: int) -> PricedModel:
    model, passages = read(path, stamp, text, split, tokens)
    return PricedModel(model, passages, profiles.of_language(model, Path(path), costs, batch))
