"""Interface for rendering episodes."""

from typing import Protocol

import numpy as np

CELL, MARGIN, FONT_SIZE = 20, 80, 15  # pixels
GREY, GREEN, RED, BLUE, WHITE = (225, 225, 225), (46, 160, 67), (207, 34, 46), (9, 105, 218), (255, 255, 255)


class Picture(Protocol):
    """Rendering of the episode so far."""

    def ansi(self) -> str:
        """As text."""

    def rgb_array(self) -> np.ndarray:
        """`[height, width, 3]` uint8."""
