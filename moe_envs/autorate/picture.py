"""Picture of a training so far."""

from dataclasses import dataclass

import numpy as np

from moe_envs.core.rendering import BLUE, CELL, FONT_SIZE, GREEN, GREY, MARGIN, RED, WHITE

LOSSES, RATES = (0.03, 10.0), (1e-7, 10.0)  # of the vertical axis, logarithmic


@dataclass(frozen=True)
class RatePicture:
    """A training: after each decision (validation loss, learning rate, whether it went back)."""

    decisions: int
    reference: float
    history: list[tuple[float, float, bool]]

    def ansi(self) -> str:
        """One line per decision."""
        lines = [
            f"{number + 1:3d}  validation loss {loss:.4f}  learning rate {rate:.1e}{'  went back' if back else ''}"
            for number, (loss, rate, back) in enumerate(self.history)
        ]
        return "\n".join([*lines, self._caption()])

    def rgb_array(self) -> np.ndarray:
        """`[height, width, 3]` uint8: validation loss green, the best cosine's grey, learning rate blue; red where it
        went back."""
        from PIL import Image, ImageDraw

        width, height = 2 * MARGIN + self.decisions * CELL, 12 * CELL
        image = Image.new("RGB", (width, height + 30), WHITE)
        draw = ImageDraw.Draw(image)

        def y(value: float, limits: tuple[float, float]) -> float:
            low, high = np.log(limits)
            return height * (1 - float(np.clip((np.log(value) - low) / (high - low), 0, 1)))

        level = y(self.reference, LOSSES)
        draw.line([(MARGIN, level), (width - MARGIN, level)], GREY, 2)
        for column, limits, colour in ((0, LOSSES, GREEN), (1, RATES, BLUE)):
            points = [(MARGIN + (place + 0.5) * CELL, y(row[column], limits)) for place, row in enumerate(self.history)]
            draw.line(points, colour, 2)
            for (across, down), row in zip(points, self.history, strict=True):
                draw.ellipse((across - 2, down - 2, across + 2, down + 2), RED if row[2] else colour)
        draw.text((4, height + 6), self._caption(), fill=(0, 0, 0), font_size=FONT_SIZE)
        for place, (name, colour) in enumerate((("validation loss", GREEN), ("learning rate", BLUE), ("back", RED))):
            draw.text((MARGIN + 130 * place, 4), name, fill=colour, font_size=FONT_SIZE)
        return np.asarray(image)

    def _caption(self) -> str:
        loss = f"{self.history[-1][0]:.4f}" if self.history else "-"
        return (
            f"decision {len(self.history)} of {self.decisions}   validation loss {loss}   "
            f"best cosine {self.reference:.4f}"
        )
