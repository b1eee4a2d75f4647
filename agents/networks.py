"""Separate policy and value networks with forward and backward passes in numpy and torch.

All parameters are in one flat vector, so that the optimiser is one fused call and gradients are contiguous. The numpy
passes are used for small networks on a CPU; torch with autograd for recurrent networks, GPUs and exports.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import pairwise
from typing import Any

import numpy as np
import torch

from agents.preprocessing import Preprocessor


class Parameters:
    """All parameters of given shapes in one flat vector, with views of them and of their gradients by name."""

    residual: np.ndarray | None = None
    gru = 0

    def __init__(self, shapes: dict[str, tuple[int, ...]]) -> None:
        self.shapes = shapes
        self.flat = torch.zeros(sum(int(np.prod(shape)) for shape in shapes.values()))
        self.flat_gradient = torch.zeros_like(self.flat)
        self.weights, self.gradients = self._views(self.flat.numpy()), self._views(self.flat_gradient.numpy())

    def _views(self, flat: Any) -> dict[str, Any]:
        """The parameters in a flat numpy array or torch tensor, by name."""
        views, start = {}, 0
        for name, shape in self.shapes.items():
            size = int(np.prod(shape))
            views[name] = flat[start : start + size].reshape(shape)
            start += size
        return views

    def begin(self, rows: int) -> np.ndarray:
        """Initial state `[rows, gru]` of an episode."""
        return np.zeros((rows, self.gru), dtype=np.float32)


class Network(Parameters):
    """Tanh networks `net_arch` for policy and value, stacked `[2, in, out]`, after a shared GRU if `gru` > 0.

    `outputs` is the size of the policy's head, of which the last `free` do not depend on the observation. `residual`
    `[inputs, outputs]` is a fixed linear map added to the head: the policy learns what to add to a known rule (residual
    policy learning, Silver et al. 2018).
    Initialised orthogonally as in SB3, with gain sqrt(2), 0.01 for the policy head and 1 for the value head.
    """

    def __init__(
        self, inputs: int, outputs: int, net_arch: Iterable[int] = (64, 64), gru: int = 0, free: int = 0, seed: int = 0,
        residual: np.ndarray | None = None,
    ) -> None:  # fmt: skip
        self.inputs, self.outputs, self.net_arch, self.gru, self.free = inputs, outputs, tuple(net_arch), gru, free
        self.residual = residual
        sizes = [gru or inputs, *self.net_arch]
        self.depth = len(self.net_arch)
        shapes: dict[str, tuple[int, ...]] = {}
        if gru:
            shapes |= {"gru.weight": (inputs, 3 * gru), "gru.bias": (3 * gru,)}
            shapes |= {"gru.state_weight": (gru, 3 * gru), "gru.state_bias": (3 * gru,)}
        for place, (before, after) in enumerate(pairwise(sizes)):
            shapes |= {f"{place}.weight": (2, before, after), f"{place}.bias": (2, 1, after)}
        shapes |= {"policy.weight": (sizes[-1], outputs - free), "policy.bias": (outputs - free,)}
        shapes |= {"value.weight": (sizes[-1],), "value.bias": (1,), "log_std": (free,)}
        super().__init__(shapes)
        self._layers = [(self.weights[f"{place}.weight"], self.weights[f"{place}.bias"]) for place in range(self.depth)]
        self._kept: list[np.ndarray] = []
        self._spaces: dict[int, np.ndarray] = {}
        generator = np.random.default_rng([seed, 0])
        for name, gain in {"policy.weight": 0.01, "value.weight": 1.0}.items():
            array = self.weights[name].reshape(sizes[-1], -1)
            array[:] = gain * orthogonal(array.shape, generator)
        for name in shapes:
            if name.endswith("weight") and name[:6] not in ("policy", "value."):
                matrices = self.weights[name].reshape(-1, *shapes[name][-2:])
                for matrix in matrices:
                    matrix[:] = (1.0 if name.startswith("gru") else 2**0.5) * orthogonal(matrix.shape, generator)

    def act(self, inputs: np.ndarray, state: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Policy head `[n, outputs]` and next state, without the value."""
        hidden = inputs
        if self.gru:
            hidden = state = self._gru(inputs, state)
        for weight, bias in self._layers:
            hidden = hidden @ weight[0]
            hidden += bias[0]
            np.tanh(hidden, out=hidden)
        return self._head(hidden, inputs), state

    def forward(self, inputs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Policy head `[n, outputs]` and values `[n]`, without a GRU; stores what `backward` needs."""
        self._kept, hidden = [inputs[None]], inputs[None]
        for place, (weight, bias) in enumerate(self._layers):
            hidden = np.matmul(hidden, weight, out=self._space(place, len(inputs)))
            hidden += bias
            np.tanh(hidden, out=hidden)
            self._kept.append(hidden)
        return self._head(hidden[0], inputs), hidden[-1] @ self.weights["value.weight"] + self.weights["value.bias"]

    def backward(self, of_head: np.ndarray, of_values: np.ndarray) -> None:
        """Compute parameter gradients from those of head `[n, outputs]` and values `[n]` of the last `forward`."""
        found, hidden, n = self.gradients, self._kept[-1], len(of_values)
        if self.free:
            of_head, of_free = of_head[:, : -self.free], of_head[:, -self.free :]
            of_free.sum(0, out=found["log_std"])
        ones = np.ones((1, n), dtype=np.float32)
        np.matmul(hidden[0].T, of_head, out=found["policy.weight"])
        np.matmul(ones[0], of_head, out=found["policy.bias"])
        np.matmul(of_values, hidden[-1], out=found["value.weight"])
        found["value.bias"][0] = of_values.sum()
        if not self.depth:
            return
        delta = self._space(self.depth, n)
        np.matmul(of_head, self.weights["policy.weight"].T, out=delta[0])
        np.multiply(of_values[:, None], self.weights["value.weight"], out=delta[1])
        for place in reversed(range(self.depth)):
            hidden, before = self._kept[place + 1], self._kept[place]
            np.multiply(hidden, hidden, out=hidden)  # the derivative of tanh: 1 - hidden^2
            np.subtract(1, hidden, out=hidden)
            hidden *= delta
            np.matmul(before.transpose(0, 2, 1), hidden, out=found[f"{place}.weight"])
            np.matmul(ones, hidden, out=found[f"{place}.bias"])
            if place:
                delta = self._space(self.depth + place, n)
                np.matmul(hidden, self.weights[f"{place}.weight"].transpose(0, 2, 1), out=delta)

    def _space(self, name: int, n: int) -> np.ndarray:
        """Reused buffer `[2, n, width]`; allocating new memory would take longer than the arithmetic."""
        width = self.net_arch[name] if name < self.depth else self.net_arch[(name - self.depth or self.depth) - 1]
        if name not in self._spaces or self._spaces[name].shape[1] < n:
            self._spaces[name] = np.empty((2, n, width), dtype=np.float32)
        return self._spaces[name][:, :n]

    def torch_forward(
        self, flat: torch.Tensor, inputs: torch.Tensor, starts: torch.Tensor | None = None, state: Any = None
    ) -> tuple[torch.Tensor, torch.Tensor, Any]:
        """`forward` in torch: head, values and the last state, for inputs `[..., inputs]`.

        With a GRU inputs are `[time, rows, inputs]`, `starts [time, rows]` is 1 where an episode begins and `state
        [rows, gru]` is the one before the first step.
        """
        weights = self._views(flat)
        if self.gru:
            states, gates = [], inputs @ weights["gru.weight"] + weights["gru.bias"]
            for step in range(len(inputs)):
                if starts is not None:
                    state = state * (1 - starts[step])[:, None]
                of_state = state @ weights["gru.state_weight"] + weights["gru.state_bias"]
                state = _gates(torch, gates[step], of_state, state)
                states.append(state)
            inputs = torch.stack(states)
        policy = value = inputs
        if self.residual is not None:
            known = inputs @ torch.from_numpy(self.residual).to(inputs)
        for place in range(self.depth):
            weight, bias = weights[f"{place}.weight"], weights[f"{place}.bias"]
            policy, value = (torch.tanh(each @ weight[k] + bias[k]) for k, each in enumerate((policy, value)))
        head = policy @ weights["policy.weight"] + weights["policy.bias"]
        if self.residual is not None:
            head = head + known
        if self.free:
            head = torch.cat([head, weights["log_std"].expand(*head.shape[:-1], self.free)], dim=-1)
        return head, value @ weights["value.weight"] + weights["value.bias"], state

    def _head(self, hidden: np.ndarray, inputs: np.ndarray) -> np.ndarray:
        head: np.ndarray = hidden @ self.weights["policy.weight"]
        head += self.weights["policy.bias"]
        if self.residual is not None:
            head += inputs @ self.residual
        if self.free:
            free = np.broadcast_to(self.weights["log_std"], (len(head), self.free))
            return np.concatenate([head, free], axis=1)
        return head

    def _gru(self, inputs: np.ndarray, state: np.ndarray) -> np.ndarray:
        gates = inputs @ self.weights["gru.weight"] + self.weights["gru.bias"]
        of_state = state @ self.weights["gru.state_weight"] + self.weights["gru.state_bias"]
        found: np.ndarray = _gates(np, gates, of_state, state)
        return found


def residual_of(env: Any, preprocessor: Preprocessor, outputs: int) -> np.ndarray | None:
    """`advice_of` an environment for a network's inputs, which must not be normalised; None without advice."""
    if not getattr(env, "advice", {}):
        return None
    if preprocessor.normalize:
        raise ValueError("policy_kwargs residual=True: advice is in observations that are not normalised")
    return advice_of(env, preprocessor.size, outputs)


def advice_of(env: Any, inputs: int, outputs: int) -> np.ndarray:
    """The `advice` of an environment as a linear map `[inputs, outputs]` from observations to the head.

    Advice maps parts of the `observation_layout` to their weights, if they have one number for each action, or to
    matrices `[size, outputs]`.
    """
    found = np.zeros((inputs, outputs), dtype=np.float32)
    for name, weight in env.advice.items():
        found[env.observation_layout[name].slice] += weight * np.eye(outputs) if np.ndim(weight) == 0 else weight
    return found


def _gates(library: Any, of_inputs: Any, of_state: Any, state: Any) -> Any:
    """Next state of a GRU (Cho et al. 2014), in numpy or torch."""
    size = state.shape[-1]
    both = of_inputs[..., : 2 * size] + of_state[..., : 2 * size]
    both = 0.5 * (library.tanh(0.5 * both) + 1)
    reset, update = both[..., :size], both[..., size:]
    new = library.tanh(of_inputs[..., 2 * size :] + reset * of_state[..., 2 * size :])
    return new + update * (state - new)


def orthogonal(shape: tuple[int, ...], generator: np.random.Generator) -> np.ndarray:
    rows, columns = shape
    drawn = generator.standard_normal((max(shape), min(shape)))
    orthogonal, triangle = np.linalg.qr(drawn)
    orthogonal *= np.sign(np.diag(triangle))
    return orthogonal if rows >= columns else orthogonal.T
