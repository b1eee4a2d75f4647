"""Recorded routing: which experts each token asked for in each layer.

Shape legend: N events (a token in a layer), K experts of a token, L layers.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from cost.arguments import one_line
from experts.data import DataError
from experts.language.model import LanguageModel
from experts.language.transformer import Experts

HEADER = "# route_trace v1"
PROMPT = 0  # the phase of the tokens that are given
COLUMNS = {name: np.int64 for name in ("turn", "phase", "step", "layer", "slot", "expert")}


@dataclass(frozen=True)
class Trace:
    """Events in the order in which they happened: `layer [N]`, and `experts [N, K]`, -1 for none, that a token needs at
    once, the most important first. `expert_bytes [L]` is the size of an expert. Events of prompts are not
    `counted [N]`."""

    layer: np.ndarray
    experts: np.ndarray
    num_experts: int
    expert_bytes: np.ndarray
    counted: np.ndarray

    @property
    def layers(self) -> int:
        """Layers with experts."""
        return len(self.expert_bytes)

    @property
    def requests(self) -> int:
        """Experts that are asked for and counted."""
        return int((self.experts[self.counted] >= 0).sum())


def read(path: Path | str) -> Trace:
    """A file of the format route_trace v1 (BigMoeOnEdge): a row for each expert of a token in a layer, with sizes in
    comments. Raises `DataError` for another file."""
    try:
        text = Path(path).read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read: {one_line(error)}") from error
    head = [line for line in text.splitlines() if line.startswith("#")]
    try:
        if not head or head[0] != HEADER:
            raise ValueError(f"its first line is not {HEADER!r}")
        said = dict(word.split("=", 1) for word in head[1].split() if "=" in word)
        layers, experts = int(said["n_layer"]), int(said["n_expert"])
        sizes = {int(line.split("layer=")[1].split()[0]): int(line.split("expert_bytes=")[1].split()[0])
                 for line in head[2:]}  # fmt: skip
        frame = pd.read_csv(io.StringIO(text), comment="#", usecols=list(COLUMNS), dtype=COLUMNS)
        frame = frame.sort_values(["turn", "phase", "step", "layer", "slot"], kind="stable")
        if set(sizes) != set(range(layers)) or not len(frame):
            raise ValueError(f"{len(sizes)} sizes for {layers} layers, {len(frame)} rows")
        if not (frame["expert"].between(0, experts - 1) & frame["layer"].between(0, layers - 1)).all():
            raise ValueError("an expert or a layer is out of range")
        if frame.duplicated(["turn", "phase", "step", "layer", "expert"]).any():
            raise ValueError("an expert stands twice in a layer of a token")
    except (ValueError, KeyError, IndexError) as error:
        raise DataError(f"{path} is no trace of routing: {one_line(error)}") from error
    keys = frame[["turn", "phase", "step", "layer"]].to_numpy()
    event = np.concatenate([[0], (np.diff(keys, axis=0) != 0).any(1).cumsum()])
    place = np.arange(len(event)) - np.searchsorted(event, event)
    found = np.full((int(event[-1]) + 1, int(place.max()) + 1), -1)
    found[event, place] = frame["expert"]
    first = np.searchsorted(event, np.arange(len(found)))
    counted = keys[first, 1] != PROMPT
    return Trace(keys[first, 3], found, experts, np.array([sizes[layer] for layer in range(layers)]), counted)


def record(model: LanguageModel, texts: Sequence[Sequence[int]], k: Experts | None = None) -> Trace:
    """The routing of a language model on texts (ids), one after the other."""
    parts: list[np.ndarray] = []
    settings = model.settings
    for ids in texts:
        with torch.inference_mode():
            routing = model.network(torch.tensor([list(ids)]), k).routing
        chosen = [each.logits.masked_fill(~each.members, -torch.inf) for each in routing]
        order = torch.stack(chosen, 1).sort(dim=-1, descending=True)
        parts.append(order.indices.masked_fill(order.values.isneginf(), -1).flatten(0, 1).numpy())
    found = np.concatenate(parts)
    found = found[:, : max(1, int((found >= 0).sum(1).max()))]
    block: Any = model.network.blocks[0]
    size = sum(weight.nbytes for weight in block.moe.experts[0].parameters())
    layer = np.tile(np.arange(settings.layers), len(found) // settings.layers)
    return Trace(layer, found, settings.num_experts, np.full(settings.layers, size), np.ones(len(found), dtype=bool))
