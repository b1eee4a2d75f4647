"""Many independent trainings of small MoE classifiers as batched products with manual backward pass.

Each training has its own weights, data, learning rate and weight decay for gate and experts. A model is that of
`experts.model.MoEClassifier` without a trunk: a linear gate whose `top_k` experts, two-layer perceptrons, are mixed by
the softmax over them. The bits of a training do not depend on the other trainings in the batch.

Shape legend: K trainings, B inputs of a mini-batch, D features, E experts, H hidden units of each, C classes, P
weights.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch

from experts.model import MoEClassifier

ABSENT = -1e9  # gate logit of an expert that a training does not have
MOMENTUM_SCALE = 10  # the mean of gradients that AdamW keeps, with beta1 0.9, is a tenth of SGD's momentum


class Passed(NamedTuple):
    """Result of a forward pass: `loss [K]`, `accuracy [K]`, mean gate entropy `[K]` in nats, and share of inputs per
    expert, `[K, E]`."""

    loss: np.ndarray
    accuracy: np.ndarray
    entropy: np.ndarray
    load: np.ndarray


class BatchedTraining:
    """K trainings by AdamW (Loshchilov & Hutter 2019), or by SGD with momentum 0.9 in the rows of `sgd`. Weights and
    moments are float32 `[K, P]`; `rates` and `decays` `[K, 2]` are for gate and experts."""

    SETTINGS = ("count", "num_inputs", "num_classes", "num_experts", "width", "top_k")
    STATE = ("weights", "first", "second", "steps", "sgd", "absent", "rates", "decays")

    def __init__(
        self,
        count: int,
        num_inputs: int,
        num_classes: int,
        *,
        num_experts: int = 4,
        width: int = 16,
        top_k: int = 2,
    ) -> None:
        if not 1 <= top_k <= num_experts:
            raise ValueError(f"top_k must be from 1 to {num_experts}, got {top_k}")
        self.count, self.num_inputs, self.num_classes = count, num_inputs, num_classes
        self.num_experts, self.width, self.top_k = num_experts, width, top_k
        hidden = num_experts * width
        self.shapes = {
            "into": (num_inputs, num_experts + hidden),  # of the gate, then of the experts' hidden units
            "into_bias": (1, num_experts + hidden),
            "out": (hidden, num_classes),
            "out_bias": (num_experts, num_classes),
        }
        sizes = [int(np.prod(shape)) for shape in self.shapes.values()]
        self.num_weights = sum(sizes)
        of_gate = np.arange(num_experts + hidden) < num_experts
        gate = np.concatenate([np.tile(of_gate, num_inputs + 1), np.zeros(sizes[2] + sizes[3], dtype=np.bool_)])
        self.gate_columns, self._group = gate.nonzero()[0], (~gate).astype(np.intp)
        shape = (count, self.num_weights)
        self.weights, self.first, self.second, self._gradient, self._update = (
            np.zeros(shape, dtype=np.float32) for _ in range(5)
        )
        self._rate, self._keep = np.zeros(shape, dtype=np.float32), np.ones(shape, dtype=np.float32)
        self.steps = np.zeros(count, dtype=np.float32)
        self.sgd = np.zeros(count, dtype=np.bool_)
        self.absent = np.zeros((count, 1, num_experts), dtype=np.float32)  # added to the gate's logits
        self.rates, self.decays = np.full((2, count, 2), 1e-3)
        self._of, self._of_gradient = self._views(self.weights), self._views(self._gradient)
        tensors = [torch.from_numpy(each) for each in (self._update, self._gradient, self.first, self.second)]
        self._rows = [
            list(tensor) for tensor in tensors
        ]  # gradients and moments are contiguous, as the operation needs
        self._step_tensors = list(torch.from_numpy(self.steps))
        self._spaces: dict[str, np.ndarray] = {}

    def _views(self, flat: np.ndarray) -> dict[str, np.ndarray]:
        views, start = {}, 0
        for name, shape in self.shapes.items():
            size = int(np.prod(shape))
            views[name] = flat[:, start : start + size].reshape(len(flat), *shape)
            start += size
        return views

    def begin(
        self,
        rows: np.ndarray,
        generators: list[np.random.Generator],
        widths: np.ndarray | None = None,
        experts: np.ndarray | None = None,
        sgd: np.ndarray | None = None,
    ) -> None:
        """Initialise rows as torch's `nn.Linear` does, each from its own generator.

        Experts may be narrower than `width`, and fewer than `num_experts`: units beyond `widths [rows]` and experts
        beyond `experts [rows]` are 0, and remain so. Rows are trained by SGD where `sgd [rows]` says so.
        """
        widths = np.full(len(rows), self.width) if widths is None else widths
        experts = np.full(len(rows), self.num_experts) if experts is None else experts
        for row, generator, width, present in zip(
            rows.tolist(), generators, widths.tolist(), experts.tolist(), strict=True
        ):
            bounds = self.num_inputs**-0.5, width**-0.5
            drawn = generator.uniform(-1, 1, self.num_weights).astype(np.float32)
            self.weights[row] = drawn
            for name, values in self._of.items():
                values[row] *= bounds[name.startswith("out")]
            absent = np.arange(self.num_experts) >= present
            beyond = np.tile(np.arange(self.width) >= width, self.num_experts) | absent.repeat(self.width)
            columns = np.concatenate([absent, beyond])
            self._of["into"][row][:, columns] = 0
            self._of["into_bias"][row][:, columns] = 0
            self._of["out"][row][beyond] = 0
            self._of["out_bias"][row][absent] = 0
            self.absent[row] = np.where(absent, ABSENT, 0)
        self.first[rows], self.second[rows], self.steps[rows] = 0, 0, 0
        self.sgd[rows] = False if sgd is None else sgd

    def set(self, rates: np.ndarray, decays: np.ndarray) -> None:
        """Set learning rates and weight decays `[K, 2]`."""
        self.rates, self.decays = rates.copy(), decays.copy()
        np.take(rates.astype(np.float32), self._group, axis=1, out=self._rate)
        keep = (1 - rates * decays).astype(np.float32)
        np.take(keep, self._group, axis=1, out=self._keep)

    def step(self, inputs: np.ndarray, labels: np.ndarray) -> Passed:
        """One step of all trainings on their mini-batches, `[K, B, D]` float32 and `[K, B]`."""
        found = self._forward(inputs, labels, "train")
        self._backward(inputs, labels)
        self._update.fill(0)
        self.steps += 1
        # The operation below torch.optim.AdamW(fused=True): with a rate of 1 and weights of 0 it gives the update.
        torch._fused_adamw_(
            self._rows[0], self._rows[1], self._rows[2], self._rows[3], [], self._step_tensors, amsgrad=False,
            beta1=0.9, beta2=0.999, lr=1.0, weight_decay=0.0, eps=1e-8, maximize=False,
        )  # fmt: skip
        if self.sgd.any():
            self._update[self.sgd] = self.first[self.sgd] * -MOMENTUM_SCALE
        self._update *= self._rate
        self.weights *= self._keep
        self.weights += self._update
        return found

    def evaluate(self, inputs: np.ndarray, labels: np.ndarray) -> Passed:
        """Forward pass on inputs `[n, D]` and labels `[n]` that all trainings share, or of `[K, n, D]` and `[K, n]`."""
        return self._forward(inputs, np.broadcast_to(labels, (self.count, labels.shape[-1])), "evaluate")

    def gradient_norms(self) -> np.ndarray:
        """Of the last step, `[K, 2]` for gate and experts."""
        return self._norms(self._gradient)

    def weight_norms(self) -> np.ndarray:
        """`[K, 2]` for gate and experts."""
        return self._norms(self.weights)

    def update_norms(self) -> np.ndarray:
        """Of the last step, learning rates included, without weight decay; `[K, 2]`."""
        return self._norms(self._update)

    def update_norm(self) -> np.ndarray:
        """The same of all weights, `[K]`."""
        found: np.ndarray = np.sqrt(np.square(self._update).sum(1))
        return found

    def module(self, row: int) -> MoEClassifier:
        """A copy of one training's model; where its experts are narrower than `width`, the units beyond are 0."""
        experts = self.num_experts
        model = MoEClassifier(self.num_inputs, self.num_classes, widths=(self.width,) * experts)
        of = {name: torch.from_numpy(values[row].copy()) for name, values in self._of.items()}
        with torch.no_grad():
            model.gate.weight.copy_(of["into"][:, :experts].T)
            model.gate.bias.copy_(of["into_bias"][0, :experts])
            model.experts.hidden.weight.copy_(of["into"][:, experts:].T)
            model.experts.hidden.bias.copy_(of["into_bias"][0, experts:])
            model.experts.out_HC.copy_(of["out"])
            model.experts.bias_EC.copy_(of["out_bias"])
        return model

    def state(self) -> dict[str, np.ndarray]:
        """Copy of the full state."""
        return {name: getattr(self, name).copy() for name in self.STATE}

    def fits(self, state: Any) -> bool:
        """Whether this is a `state()` of as many trainings of the same model."""
        if not isinstance(state, dict) or set(state) != {*self.STATE}:
            return False
        return all(np.shape(state[name]) == getattr(self, name).shape for name in self.STATE)

    def restore(self, state: dict[str, np.ndarray], rows: np.ndarray | slice = slice(None)) -> None:
        """Restore a `state()` for all or some trainings."""
        for name in self.STATE[:-2]:
            getattr(self, name)[rows] = state[name][rows]
        rates, decays = self.rates.copy(), self.decays.copy()
        rates[rows], decays[rows] = state["rates"][rows], state["decays"][rows]
        self.set(rates, decays)

    def __getstate__(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in self.SETTINGS} | {"state": self.state()}

    def __setstate__(self, content: dict[str, Any]) -> None:
        state = content.pop("state")
        BatchedTraining.__init__(self, **content)  # makes the views and tensors that share the arrays' memory
        self.restore(state)

    def _norms(self, flat: np.ndarray) -> np.ndarray:
        squares = np.square(flat)  # summed along rows that are contiguous, in an order that K does not change
        of_gate, total = np.take(squares, self.gate_columns, axis=1).sum(1), squares.sum(1)
        return np.sqrt(np.stack([of_gate, np.maximum(total - of_gate, 0)], axis=1))

    def _forward(self, inputs: np.ndarray, labels: np.ndarray, use: str) -> Passed:
        """Forward pass that stores what `_backward` needs in `self._spaces`."""
        n, experts = labels.shape[1], self.num_experts
        into = self._space(f"{use} into", n, experts + experts * self.width)
        np.matmul(inputs, self._of["into"], out=into)
        into += self._of["into_bias"]
        share_EKB, chosen_EKB, entropy = _mix(into[..., :experts] + self.absent, self.top_k)
        hidden = into[..., experts:]
        np.maximum(hidden, 0, out=hidden)
        weighed = self._space(f"{use} weighed", n, experts * self.width)
        of_expert = (self.count, n, experts, self.width)
        share = np.ascontiguousarray(share_EKB.transpose(1, 2, 0))
        np.multiply(hidden.reshape(of_expert), share[..., None], out=weighed.reshape(of_expert))
        logits = self._space(f"{use} logits", n, self.num_classes)
        np.matmul(weighed, self._of["out"], out=logits)
        logits += share @ self._of["out_bias"]
        self._spaces[f"{use} share"] = share
        loss, right = _cross_entropy(logits, labels)
        return Passed(loss, right, entropy, chosen_EKB.mean(2).T)

    def _backward(self, inputs: np.ndarray, labels: np.ndarray) -> None:
        n, experts = labels.shape[1], self.num_experts
        into, weighed, share = (self._spaces[f"train {name}"] for name in ("into", "weighed", "share"))
        delta = self._spaces["train logits"]  # softmax, left by the forward pass
        delta.reshape(-1)[np.arange(0, delta.size, self.num_classes) + labels.ravel()] -= 1
        delta *= np.float32(1 / n)
        found = self._of_gradient
        np.matmul(weighed.transpose(0, 2, 1), delta, out=found["out"])
        np.matmul(share.transpose(0, 2, 1), delta, out=found["out_bias"])
        back = self._space("back", n, experts + experts * self.width)
        of_hidden = back[..., experts:]
        np.matmul(delta, self._of["out"].transpose(0, 2, 1), out=weighed)
        of_expert = (self.count, n, experts, self.width)
        by_share = np.einsum("kneh,kneh->kne", weighed.reshape(of_expert), into[..., experts:].reshape(of_expert))
        by_share += delta @ self._of["out_bias"].transpose(0, 2, 1)
        by_share -= np.einsum("kne,kne->kn", by_share, share)[..., None]
        np.multiply(by_share, share, out=back[..., :experts])
        np.multiply(weighed.reshape(of_expert), share[..., None], out=of_hidden.reshape(of_expert))
        of_hidden *= into[..., experts:] > 0
        np.matmul(inputs.transpose(0, 2, 1), back, out=found["into"])
        np.add.reduce(back, 1, out=found["into_bias"][:, 0])

    def _space(self, name: str, n: int, width: int) -> np.ndarray:
        """Reused buffer `[K, n, width]`; allocating new memory would take longer than the arithmetic."""
        if name not in self._spaces or self._spaces[name].shape[1] != n:
            self._spaces[name] = np.empty((self.count, n, width), dtype=np.float32)
        return self._spaces[name]


def _mix(gate_KBE: np.ndarray, top_k: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The softmax over the `top_k` largest logits and whether they are, `[E, K, B]`; mean entropy of all, `[K]`."""
    gate = np.ascontiguousarray(gate_KBE.transpose(2, 0, 1))
    gate -= gate.max(0)
    odds = np.exp(gate)
    totals = odds.sum(0)
    entropy = np.log(totals) - (odds * gate).sum(0) / totals
    chosen = np.ones(gate.shape, dtype=np.bool_)
    if top_k < len(gate):
        for expert, logit in enumerate(gate):
            larger = (gate[:expert] >= logit).sum(0) + (gate[expert + 1 :] > logit).sum(0)
            chosen[expert] = larger < top_k
        odds *= chosen
        totals = odds.sum(0)
    odds /= totals
    return odds, chosen, entropy.mean(1)


def _cross_entropy(logits: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean loss and accuracy, `[K]`; the logits `[K, n, C]` become the softmax."""
    logits -= np.maximum.reduce(logits, -1, keepdims=True)
    places = np.arange(0, logits.size, logits.shape[-1]) + labels.ravel()
    picked = logits.take(places).reshape(labels.shape)
    np.exp(logits, out=logits)
    totals = np.add.reduce(logits, -1, keepdims=True)
    loss = np.log(totals[..., 0]) - picked
    right = logits.argmax(-1) == labels
    logits /= totals
    return loss.mean(1), right.mean(1)
