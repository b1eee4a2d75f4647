"""Action distributions parametrised by a network head, with gradients for policy-gradient methods.

All is batched numpy. `head [n, size]` has logits, or means and log standard deviations; actions are float or int arrays
`[n, ...]` in the form of the action space. `masks [n, size]` is True for allowed actions.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
from gymnasium import spaces

NEVER = np.float32(-1e8)  # logit of a masked action


class Evaluation(NamedTuple):
    """`log_prob [n]` and `entropy [n]` of actions, and what `gradient` needs."""

    log_prob: np.ndarray
    entropy: np.ndarray
    kept: tuple[np.ndarray, ...]


class Categorical:
    """Discrete and MultiDiscrete: k independent softmax distributions, concatenated in the head."""

    free = 0  # number of outputs that do not depend on the observation
    shape: tuple[int, ...]

    def __init__(self, space: spaces.Discrete | spaces.MultiDiscrete) -> None:
        if isinstance(space, spaces.Discrete):
            sizes, self.start, self.shape = np.array([space.n]), np.array([space.start]), ()
        else:
            sizes, self.start, self.shape = space.nvec.ravel(), space.start.ravel(), space.nvec.shape
        self.size, self.choices, self.width = int(sizes.sum()), len(sizes), int(sizes.max())
        self.dtype = space.dtype
        self._even = bool((sizes == self.width).all())
        self._firsts = np.cumsum(sizes) - sizes
        columns = np.arange(self.width) + self._firsts[:, None]
        self._pads = np.arange(self.width) >= sizes[:, None]
        self._columns = np.where(self._pads, 0, columns)
        self._places = (np.arange(self.choices)[:, None] * self.width + np.arange(self.width))[~self._pads]

    def sample(self, head: np.ndarray, generator: np.random.Generator, masks: np.ndarray | None = None) -> np.ndarray:
        """Sample actions by inverse transform; actions of probability 0 are never drawn."""
        logits = self._logits(head, masks)
        sums = np.exp(logits - logits.max(-1, keepdims=True)).cumsum(-1)
        below = generator.random((len(head), self.choices, 1)) * sums[..., -1:]
        return self._actions((sums <= below).sum(-1))

    def mode(self, head: np.ndarray, masks: np.ndarray | None = None) -> np.ndarray:
        """Most probable actions."""
        return self._actions(self._logits(head, masks).argmax(-1))

    def evaluate(self, head: np.ndarray, actions: np.ndarray, masks: np.ndarray | None = None) -> Evaluation:
        """Log probabilities and entropies."""
        logits = self._logits(head, masks)
        logits = logits - np.maximum.reduce(logits, -1, keepdims=True)
        probabilities = np.exp(logits)
        sums = np.add.reduce(probabilities, -1, keepdims=True)
        probabilities /= sums
        logits -= np.log(sums, out=sums)
        flat = (actions.reshape(len(head), self.choices) - self.start).astype(np.intp, copy=False)
        flat = flat + np.arange(0, logits.size, self.width).reshape(flat.shape)
        entropies = np.negative(np.add.reduce(probabilities * logits, -1))
        log_prob = logits.take(flat)
        if self.choices == 1:
            totals = log_prob[:, 0], entropies[:, 0]
        else:
            totals = np.add.reduce(log_prob, -1), np.add.reduce(entropies, -1)
        return Evaluation(*totals, (probabilities, logits, entropies, flat))

    def gradient(self, evaluation: Evaluation, of_log_prob: np.ndarray, of_entropy: float) -> np.ndarray:
        """Gradient `[n, size]` with respect to the head, from those with respect to `log_prob [n]` and entropies."""
        probabilities, logits, entropies, flat = evaluation.kept
        found = -of_log_prob[:, None, None] * probabilities
        if of_entropy:
            found -= np.float32(of_entropy) * probabilities * (logits + entropies[..., None])
        found.reshape(-1)[flat] += of_log_prob[:, None]
        found = found.reshape(len(of_log_prob), -1)
        return found if self._even else found[:, self._places]

    def _logits(self, head: np.ndarray, masks: np.ndarray | None) -> np.ndarray:
        if masks is not None:
            masks = masks.reshape(head.shape)
            if not (some := np.logical_or.reduceat(masks, self._firsts, axis=1).all(1)).all():
                raise ValueError(f"the mask of row {int(some.argmin())} allows no action")
            head = np.where(masks, head, NEVER)
        if self._even:
            return head.reshape(len(head), self.choices, self.width)
        picked = head.take(self._columns.ravel(), axis=1).reshape(len(head), self.choices, self.width)
        return np.where(self._pads, NEVER, picked)

    def _actions(self, chosen: np.ndarray) -> np.ndarray:
        found: np.ndarray = (chosen + self.start).astype(self.dtype, copy=False)
        return found.reshape(len(chosen), *self.shape)


class Bernoulli:
    """MultiBinary: independent bits."""

    free = 0

    def __init__(self, space: spaces.MultiBinary) -> None:
        self.shape, self.size, self.dtype = space.shape, int(np.prod(space.shape)), space.dtype

    def sample(self, head: np.ndarray, generator: np.random.Generator, masks: np.ndarray | None = None) -> np.ndarray:
        """Sample bits; masked bits are 0."""
        drawn = generator.random(head.shape) < _sigmoid(self._logits(head, masks))
        return drawn.astype(self.dtype).reshape(len(head), *self.shape)

    def mode(self, head: np.ndarray, masks: np.ndarray | None = None) -> np.ndarray:
        """Bits with probability above one half."""
        return (self._logits(head, masks) > 0).astype(self.dtype).reshape(len(head), *self.shape)

    def evaluate(self, head: np.ndarray, actions: np.ndarray, masks: np.ndarray | None = None) -> Evaluation:
        """Log probabilities and entropies."""
        logits, bits = self._logits(head, masks), actions.reshape(head.shape)
        probabilities, softplus = _sigmoid(logits), np.logaddexp(0, logits)
        log_prob = (bits * logits - softplus).sum(-1)
        entropy = (softplus - probabilities * logits).sum(-1)
        return Evaluation(log_prob, entropy, (probabilities, logits, bits))

    def gradient(self, evaluation: Evaluation, of_log_prob: np.ndarray, of_entropy: float) -> np.ndarray:
        """Gradient `[n, size]` with respect to the head, from those with respect to `log_prob [n]` and entropies."""
        probabilities, logits, bits = evaluation.kept
        of_entropies = of_entropy * -logits * probabilities * (1 - probabilities)
        return (bits - probabilities) * of_log_prob[:, None] + of_entropies

    def _logits(self, head: np.ndarray, masks: np.ndarray | None) -> np.ndarray:
        return head if masks is None else np.where(masks.reshape(head.shape), head, NEVER)


class Gaussian:
    """Box: independent normals with free log standard deviations; actions are clipped to the space."""

    def __init__(self, space: spaces.Box) -> None:
        self.shape, self.free = space.shape, int(np.prod(space.shape))
        self.size, self.dtype = 2 * self.free, space.dtype

    def sample(self, head: np.ndarray, generator: np.random.Generator, masks: np.ndarray | None = None) -> np.ndarray:
        """Sample values without clipping."""
        mean, log_std = np.split(head, 2, axis=1)
        drawn = mean + np.exp(log_std) * generator.standard_normal(mean.shape, dtype=np.float32)
        return drawn.reshape(len(head), *self.shape)

    def mode(self, head: np.ndarray, masks: np.ndarray | None = None) -> np.ndarray:
        """The means."""
        return head[:, : self.free].reshape(len(head), *self.shape)

    def evaluate(self, head: np.ndarray, actions: np.ndarray, masks: np.ndarray | None = None) -> Evaluation:
        """Log densities and entropies."""
        mean, log_std = np.split(head, 2, axis=1)
        deviation = np.exp(log_std)
        z = (actions.reshape(mean.shape) - mean) / deviation
        log_prob = (-0.5 * (z**2 + math.log(2 * math.pi)) - log_std).sum(-1)
        entropy = (log_std + 0.5 * math.log(2 * math.pi * math.e)).sum(-1)
        return Evaluation(log_prob, entropy, (z, deviation))

    def gradient(self, evaluation: Evaluation, of_log_prob: np.ndarray, of_entropy: float) -> np.ndarray:
        """Gradient `[n, size]` with respect to the head, from those with respect to `log_prob [n]` and entropies."""
        z, deviation = evaluation.kept
        weight = of_log_prob[:, None]
        return np.concatenate([weight * z / deviation, weight * (z**2 - 1) + of_entropy], axis=1)


Distribution = Categorical | Bernoulli | Gaussian
KINDS: dict[type[Any], Any] = {
    spaces.Discrete: Categorical,
    spaces.MultiDiscrete: Categorical,
    spaces.MultiBinary: Bernoulli,
    spaces.Box: Gaussian,
}


def distribution(space: spaces.Space[Any]) -> Distribution:
    """Distribution for an action space; raises `ValueError` if the space is not supported."""
    for kind, found in KINDS.items():
        if isinstance(space, kind):
            return found(space)
    raise ValueError(f"actions must be Discrete, MultiDiscrete, MultiBinary or Box, not {space}")


def _sigmoid(values: np.ndarray) -> np.ndarray:
    return 0.5 * (np.tanh(0.5 * values) + 1)
