"""Observations as flat float32 arrays, normalised by running moments if asked for."""

from __future__ import annotations

from typing import Any

import numpy as np
from gymnasium import spaces

CLIP = 10.0  # bound of normalised observations


class Moments:
    """Running mean and variance `[size]` (Chan et al. 1979); 0 and 1 before the first update."""

    def __init__(self, size: int) -> None:
        self.count, self.mean, self.variance = 0.0, np.zeros(size), np.ones(size)

    def update(self, values: np.ndarray) -> None:
        """Take in values `[n, size]`."""
        if not (added := len(values)):
            return
        total, delta = self.count + added, values.mean(0, dtype=np.float64) - self.mean
        squares = self.variance * self.count + values.var(0, dtype=np.float64) * added
        self.variance = (squares + delta**2 * self.count * added / total) / total
        self.mean, self.count = self.mean + delta * added / total, total

    def scale(self) -> np.ndarray:
        """1 / standard deviation, float32."""
        return (1 / np.sqrt(self.variance + 1e-8)).astype(np.float32)


class Preprocessor:
    """Observations of a Box, Discrete or MultiBinary space as float32 `[n, size]`: flat or one-hot, and
    optionally normalised by the moments from `update` and clipped at 10."""

    def __init__(self, space: spaces.Space[Any], normalize: bool = False) -> None:
        if not isinstance(space, spaces.Box | spaces.Discrete | spaces.MultiBinary):
            raise ValueError(
                f"observations must be Box, Discrete or MultiBinary, not {space}; gymnasium's FlattenObservation helps"
            )
        self.space, self.normalize = space, normalize
        self.size = int(space.n) if isinstance(space, spaces.Discrete) else int(np.prod(space.shape))
        self.moments = Moments(self.size)
        self.refresh()

    def flatten(self, observations: np.ndarray) -> np.ndarray:
        """`[n, size]`, not normalised."""
        if isinstance(self.space, spaces.Discrete):
            found = np.zeros((len(observations), self.size), dtype=np.float32)
            found[np.arange(len(observations)), observations - self.space.start] = 1
            return found
        return observations.reshape(len(observations), -1).astype(np.float32, copy=False)

    def __call__(self, flat: np.ndarray) -> np.ndarray:
        """Normalise what `flatten` returned."""
        if not self.normalize:
            return flat
        found: np.ndarray = np.clip((flat - self._shift) * self._scale, -CLIP, CLIP)
        return found

    def update(self, flat: np.ndarray) -> None:
        """Take observations `[n, size]` into the moments."""
        if self.normalize:
            self.moments.update(flat)
            self.refresh()

    def refresh(self) -> None:
        """Normalise by the moments as they are now."""
        self._shift, self._scale = self.moments.mean.astype(np.float32), self.moments.scale()
