"""Policies that serve any number of actions."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from gymnasium.spaces import MultiDiscrete, Space

from agents.distributions import distribution
from agents.networks import Parameters, orthogonal


class SetNetwork(Parameters):
    """Networks of any number of actions: weights are shared by the actions (deep sets, Zaheer et al. 2017).

    `columns [k, actions]` are the places of those parts of an observation that have one number for each action, and
    `common` the other places. Each action's numbers pass tanh layers of `net_arch` units. A layer also takes the common
    numbers, from the second on the mean of the layer before over all actions. Policy and value are stacked `[2, ...]`.

    With `extra` > 0 each action is a choice of two, no or yes, and one more choice among `extra`, made from the mean,
    follows them: the head is `[n, 2 * actions + extra]`.
    """

    def __init__(
        self, columns: np.ndarray, common: np.ndarray, net_arch: Iterable[int] = (64, 64), seed: int = 0,
        residual: np.ndarray | None = None, extra: int = 0,
    ) -> None:  # fmt: skip
        self.columns, self.common, self.net_arch, self.residual = columns, common, tuple(net_arch), residual
        self.depth, self.extra = len(self.net_arch), extra
        sizes, shapes = [len(columns), *self.net_arch], dict[str, tuple[int, ...]]()
        for place, (before, after) in enumerate(pairwise(sizes)):
            around = len(common) if place == 0 else before
            shapes |= {f"{place}.weight": (2, 1, before, after), f"{place}.around": (2, around, after)}
            shapes[f"{place}.bias"] = (2, 1, after)
        for head in ("policy", "value"):
            shapes |= {f"{head}.weight": (sizes[-1],), f"{head}.bias": (1,)}
        if extra:
            shapes |= {"extra.weight": (sizes[-1], extra), "extra.bias": (extra,)}
        super().__init__(shapes)
        generator = np.random.default_rng([seed, 0])
        for name in shapes:
            array = self.weights[name]
            if name in ("policy.weight", "value.weight", "extra.weight"):
                flat = array.reshape(len(array), -1)
                flat[:] = (1.0 if name[0] == "v" else 0.01) * orthogonal(flat.shape, generator)
            elif not name.endswith("bias"):
                for matrix in array.reshape(-1, *array.shape[-2:]):
                    matrix[:] = 2**0.5 * orthogonal(matrix.shape, generator)

    def act(self, inputs: np.ndarray, state: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Policy head and the state as it was."""
        return self._heads(np, self.weights, inputs, slice(0, 1))[0], state

    def torch_forward(
        self, flat: torch.Tensor, inputs: torch.Tensor, starts: torch.Tensor | None = None, state: Any = None
    ) -> tuple[torch.Tensor, torch.Tensor, Any]:
        """Head and values `[n]` in torch."""
        head, values = self._heads(torch, self._views(flat), inputs, slice(0, 2))
        return head, values, state

    def _heads(self, library: Any, weights: dict[str, Any], inputs: Any, which: slice) -> tuple[Any, Any]:
        """Policy head and values of the networks `which` of (policy, value), in numpy or torch."""
        rows, actions = len(inputs), self.columns.shape[1]
        # Flat, as many small products are slow.
        hidden = inputs[:, self.columns.T.ravel()].reshape(1, rows * actions, len(self.columns))
        around = inputs[:, self.common][None]
        for place in range(self.depth):
            weight, of_around, bias = (weights[f"{place}.{name}"][which] for name in ("weight", "around", "bias"))
            own = (hidden @ weight[:, 0]).reshape(len(weight), rows, actions, weight.shape[-1])
            own = library.tanh(own + (around @ of_around + bias)[:, :, None])
            hidden, around = own.reshape(len(weight), rows * actions, own.shape[-1]), own.mean(2)
        head = (hidden[0] @ weights["policy.weight"] + weights["policy.bias"]).reshape(rows, actions)
        if self.extra:
            pairs = library.stack([library.zeros_like(head), head], 2).reshape(rows, 2 * actions)
            more = around[0] @ weights["extra.weight"] + weights["extra.bias"]
            head = library.concatenate([pairs, more], 1)
        if self.residual is not None:
            known = self.residual if library is np else torch.from_numpy(self.residual).to(inputs)
            head = head + inputs @ known
        return head, around[-1] @ weights["value.weight"] + weights["value.bias"]


def set_network(env: Any, space: Space[Any], **arguments: Any) -> SetNetwork:
    """A `SetNetwork` for an environment with an `observation_layout`; raises `ValueError` without one.

    Parts with one number for each action are columns, unless the environment names them among its `common_parts`. In a
    MultiDiscrete space of pairs and one more choice, each pair counts as an action.
    """
    actions, extra = distribution(space).size, 0
    if isinstance(space, MultiDiscrete) and space.nvec.ndim == 1 and (space.nvec[:-1] == 2).all():
        actions, extra = len(space.nvec) - 1, int(space.nvec[-1])
    layout: Any = getattr(env, "observation_layout", None) or {}
    shared = getattr(env, "common_parts", ())
    columns, common = list[np.ndarray](), list[np.ndarray]()
    for name, part in layout.items():
        places = np.arange(part.slice.start, part.slice.stop)
        (columns if name not in shared and len(places) == actions > 1 else common).append(places)
    if not columns:
        raise ValueError("policy_kwargs equivariant=True: no part of the observation has one number for each action")
    all_common = np.concatenate([*common, np.zeros(0, dtype=np.int64)])
    return SetNetwork(np.stack(columns), all_common, extra=extra, **arguments)
