"""Gradient descent on a network: passes in numpy or torch, whichever is faster, and Adam."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from agents.networks import Network
from agents.set_network import SetNetwork

CHUNK = 8192  # observations in one pass without gradients


class Descent:
    """Forward and backward passes and AdamW steps; numpy for small networks on a CPU, torch for others or a GPU."""

    def __init__(self, network: Network | SetNetwork, device: str = "cpu") -> None:
        if device.startswith("cuda") and not torch.cuda.is_available():
            raise ValueError("device='cuda', but torch sees no CUDA device here; device='cpu' works everywhere")
        self.network, self.device = network, device
        self._in_numpy: Network | None = None
        if isinstance(network, Network) and not network.gru and device == "cpu":
            self._in_numpy = network
        self._leaf = network.flat.detach().to(device).requires_grad_(self._in_numpy is None)
        self._gradient, self._flat = network.flat_gradient.to(device), network.flat_gradient.numpy()
        self._moments = [torch.zeros_like(self._leaf), torch.zeros_like(self._leaf), torch.zeros((), device=device)]
        self._outputs: tuple[torch.Tensor, ...] = ()

    def forward(self, inputs: np.ndarray, starts: np.ndarray, state: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Heads and values for inputs `[n, inputs]`, or `[time, rows, inputs]` from a GRU state `[rows, gru]`; stores
        what `backward` needs."""
        if self._in_numpy:
            return self._in_numpy.forward(inputs)
        parts = (torch.from_numpy(each).to(self.device) for each in (inputs, starts.astype(np.float32), state))
        self._outputs = self.network.torch_forward(self._leaf, *parts)[:2]
        head, values = (each.numpy(force=True) for each in self._outputs)
        return head, values

    def evaluate(self, inputs: np.ndarray, starts: np.ndarray, state: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """`forward` without gradients, for any number of inputs."""
        with torch.no_grad():
            if self.network.gru:
                return self.forward(inputs, starts, state)
            flat = inputs.reshape(-1, inputs.shape[-1])
            pieces = [self.forward(flat[at : at + CHUNK], starts, state) for at in range(0, max(1, len(flat)), CHUNK)]
        head, values = (np.concatenate(part) for part in zip(*pieces, strict=True))
        return head.reshape(*inputs.shape[:-1], head.shape[-1]), values.reshape(inputs.shape[:-1])

    def backward(self, of_head: np.ndarray, of_values: np.ndarray) -> None:
        """Backpropagate the gradients of head and values of the last `forward`."""
        if self._in_numpy:
            self._in_numpy.backward(of_head, of_values)
            return
        wanted = [torch.from_numpy(each).to(self.device) for each in (of_head, of_values)]
        self._gradient.copy_(torch.autograd.grad(self._outputs, [self._leaf], wanted)[0])

    def step(self, rate: float, max_norm: float, weight_decay: float = 0.0) -> float:
        """Clip the gradient norm and take one AdamW step; returns the norm, and skips the step if it is not finite."""
        on_cpu, flat = self.device == "cpu", self._flat
        norm = float(flat.dot(flat)) ** 0.5 if on_cpu else float(torch.linalg.vector_norm(self._gradient))
        if not norm < np.inf:
            return norm
        if norm > max_norm and on_cpu:
            flat *= np.float32(max_norm / (norm + 1e-6))
        elif norm > max_norm:
            self._gradient *= max_norm / (norm + 1e-6)
        first, second, step = self._moments
        step += 1
        # The operation below torch.optim.AdamW(fused=True), whose own call takes several times longer.
        torch._fused_adamw_(
            [self._leaf.detach()], [self._gradient], [first], [second], [], [step], amsgrad=False, beta1=0.9,
            beta2=0.999, lr=rate, weight_decay=weight_decay, eps=1e-5, maximize=False,
        )  # fmt: skip
        if not on_cpu:
            self.network.flat.copy_(self._leaf.detach())
        return norm

    def state(self) -> dict[str, Any]:
        """State of weights and moments for `restore`."""
        return {"weights": dict(self.network.weights), "adam": [each.numpy(force=True) for each in self._moments]}

    def restore(self, state: dict[str, Any]) -> None:
        """Restore a `state()` of a network of the same shape; raises `ValueError` for another one's."""
        shapes = [{name: each.shape for name, each in net.items()} for net in (self.network.weights, state["weights"])]
        if shapes[0] != shapes[1] or [each.shape for each in state["adam"]] != [each.shape for each in self._moments]:
            raise ValueError("the weights are of another network")
        for name, values in state["weights"].items():
            self.network.weights[name][:] = values
        if self.device != "cpu":
            self._leaf.detach().copy_(self.network.flat)
        for mine, saved in zip(self._moments, state["adam"], strict=True):
            mine.copy_(torch.from_numpy(saved.copy()))
