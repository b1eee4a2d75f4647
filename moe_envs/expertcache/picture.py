"""Picture of a memory: which experts it held, token by token."""

from dataclasses import dataclass

import numpy as np

ABSENT, RESIDENT, USED, LOADED = range(4)
MARKS = " ·o+"
COLOURS = np.array([(255, 255, 255), (205, 215, 245), (60, 90, 200), (230, 120, 30)], dtype=np.uint8)
PIXELS, GAP, SHOWN = 8, 6, 96  # of an expert at a token; between layers; tokens
HIGHEST = 4096  # pixels of all experts, which are lower where there are many, but at least one pixel each


@dataclass(frozen=True)
class CachePicture:
    """What was done with each expert at each token, `[T, L, E]`, of which `done` tokens are over."""

    history: np.ndarray
    done: int

    @property
    def shown(self) -> np.ndarray:
        """The last tokens, `[T', L, E]`."""
        return self.history[max(0, self.done - SHOWN) : max(self.done, 1)]

    def ansi(self) -> str:
        """A line for each expert and a column for each token: `·` in memory, `o` ran, `+` loaded."""
        lines = [f"token {self.done}: · in memory, o runs, + is loaded"]
        for layer in range(self.history.shape[1]):
            lines += [f"layer {layer}"]
            lines += ["".join(MARKS[each] for each in column) for column in self.shown[:, layer].T]
        return "\n".join(lines)

    def rgb_array(self) -> np.ndarray:
        """`[height, width, 3]` uint8: light blue in memory, dark blue runs, orange is loaded; layers one below the
        other, a column for each token."""
        layers, experts = self.history.shape[1:]
        size = min(PIXELS, max(1, HIGHEST // (layers * experts)))
        height = layers * (experts * size + GAP) + GAP
        image = np.full((height, SHOWN * PIXELS + 2 * GAP, 3), 235, dtype=np.uint8)
        for layer in range(layers):
            cells = COLOURS[self.shown[:, layer].T]
            part = cells.repeat(size, 0).repeat(PIXELS, 1)
            if size == PIXELS:  # lines between them
                part[::size] = part[:, ::PIXELS] = 245
            top = GAP + layer * (experts * size + GAP)
            image[top : top + part.shape[0], GAP : GAP + part.shape[1]] = part
        return image
