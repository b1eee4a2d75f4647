"""Updates of a policy-gradient learner: epochs of minibatches."""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np

from agents.batches import Batch, normalized
from agents.descent import Descent
from agents.distributions import Distribution, Evaluation
from agents.rollouts import NotFiniteError
from agents.settings import Settings

Logs = dict[str, float]


class Algorithm(Protocol):
    """Interface of a policy-gradient algorithm."""

    def gradient(self, evaluation: Evaluation, log_prob: np.ndarray, advantages: np.ndarray) -> tuple[np.ndarray, bool]:
        """Gradient of the summed policy loss by the log probabilities `[n]`, and whether to stop the update."""

    def losses(self, evaluation: Evaluation, log_prob: np.ndarray, advantages: np.ndarray) -> Logs:
        """`train/policy_gradient_loss` and other values to log."""


class Updates:
    """Updates of one training; `count` is the number of epochs so far."""

    def __init__(self, algorithm: Algorithm, settings: Settings, descent: Descent, distribution: Distribution) -> None:
        self.algorithm, self.settings, self.descent, self.distribution = algorithm, settings, descent, distribution
        self.recurrent, self.count = bool(descent.network.gru), 0

    def __call__(self, batch: Batch, generator: np.random.Generator, rate: float, temperature: np.float32) -> Logs:
        """Update on a batch; logs are averages over the last minibatch of each epoch."""
        if not batch.valid.any():
            return {}
        places, size = self._places(batch)
        found, stop = list[Logs](), False
        for _ in range(self.settings.epochs):
            shuffled = batch.take(generator.permutation(places))
            for start in range(0, len(places), size):
                minibatch, last = shuffled.take(slice(start, start + size)), start + size >= len(places)
                logs, stop = self._minibatch(minibatch, rate, temperature, last)
                found += [logs] if logs else []
                if stop:
                    break
            self.count += 1
            if stop:
                break
        means = {key: float(np.mean([each[key] for each in found])) for key in found[0]} if found else {}
        return means | {"train/learning_rate": rate, "train/n_updates": self.count}

    def _places(self, batch: Batch) -> tuple[np.ndarray, int]:
        """Indices to sample (transitions, or rows of a recurrent batch) and minibatch size."""
        size = self.settings.batch_size
        if not self.recurrent:
            places = batch.valid.nonzero()[0]
            return places, size or len(places)
        places = np.arange(batch.inputs.shape[1])
        return places, max(1, round(size / len(batch.inputs))) if size else len(places)

    def _minibatch(self, batch: Batch, rate: float, temperature: np.float32, wanted: bool) -> tuple[Logs, bool]:
        """One optimiser step unless the policy has changed too much; returns logs if requested."""
        settings, n = self.settings, batch.advantages.size
        head, values = self.descent.forward(batch.inputs, batch.starts, batch.state)
        shapes, keep = (head.shape, values.shape), np.zeros(0, dtype=np.bool_)
        if self.recurrent:  # take the valid transitions out of the sequences
            keep = batch.valid.ravel()
            if not (n := int(keep.sum())):
                return {}, False
            batch, head, values = _kept(batch, head, values, keep)
        advantages = normalized(batch.advantages) if settings.normalize_advantage and n > 1 else batch.advantages
        scaled = head if temperature == 1 else head / temperature
        evaluation = self.distribution.evaluate(scaled, batch.actions, batch.masks)
        of_log_prob, stop = self.algorithm.gradient(evaluation, batch.log_prob, advantages)
        errors = values - batch.returns
        logs = self._losses(evaluation, batch.log_prob, advantages, errors) if wanted or stop else {}
        if stop:
            return logs, True
        of_head = self.distribution.gradient(evaluation, of_log_prob * np.float32(1 / n), -settings.ent_coef / n)
        of_values = errors * np.float32(2 * settings.vf_coef / n)
        if temperature != 1:
            of_head /= temperature
        if self.recurrent:
            of_head, of_values = (
                _spread(each, keep, shape) for each, shape in zip((of_head, of_values), shapes, strict=True)
            )
        self.descent.backward(of_head, of_values)
        if not self.descent.step(rate, settings.max_grad_norm, settings.weight_decay) < np.inf:
            raise NotFiniteError(
                "the gradient is not finite; the weights are those before it: lower learning_rate, or normalise "
                "observations and rewards"
            )
        return logs, False

    def _losses(self, evaluation: Evaluation, log_prob: np.ndarray, advantages: np.ndarray, errors: np.ndarray) -> Logs:
        found = self.algorithm.losses(evaluation, log_prob, advantages)
        policy = found["train/policy_gradient_loss"]
        value, entropy = float(np.square(errors).mean()), float(evaluation.entropy.mean())
        total = policy - self.settings.ent_coef * entropy + self.settings.vf_coef * value
        return found | {"train/value_loss": value, "train/entropy_loss": -entropy, "train/loss": total}


def _kept(batch: Batch, head: np.ndarray, values: np.ndarray, keep: np.ndarray) -> tuple[Batch, np.ndarray, np.ndarray]:
    flat: Any = (None if e is None else e.reshape(len(keep), *e.shape[2:])[keep] for e in (*batch[:-1], head, values))
    *parts, head, values = flat
    return Batch._make([*parts, batch.state]), head, values


def _spread(values: np.ndarray, places: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Array of `shape` with values at given indices and 0 elsewhere."""
    found = np.zeros((len(places), *values.shape[1:]), dtype=np.float32)
    found[places] = values
    return found.reshape(shape)
