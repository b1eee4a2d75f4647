"""Picture of a training so far."""

from dataclasses import dataclass

import numpy as np

from moe_envs.core.rendering import BLUE, CELL, FONT_SIZE, GREEN, GREY, MARGIN, RED, WHITE


@dataclass(frozen=True)
class TrainingPicture:
    """A training: after each decision (validation accuracy, learning rate of the gate, of the experts)."""

    max_actions: int
    target: float
    history: list[tuple[float, float, float]]

    def ansi(self) -> str:
        """One line per decision."""
        lines = [
            f"{number + 1:3d}  accuracy {accuracy:.3f}  learning rate: gate {gate:.1e}, experts {experts:.1e}"
            for number, (accuracy, gate, experts) in enumerate(self.history)
        ]
        return "\n".join([*lines, self._caption()])

    def rgb_array(self) -> np.ndarray:
        """`[height, width, 3]` uint8: accuracy green, the target grey, learning rates blue and red from 1e-5 to 1."""
        from PIL import Image, ImageDraw

        width, height = 2 * MARGIN + self.max_actions * CELL, 12 * CELL
        image = Image.new("RGB", (width, height + 30), WHITE)
        draw = ImageDraw.Draw(image)
        draw.line([(MARGIN, height * (1 - self.target)), (width - MARGIN, height * (1 - self.target))], GREY, 2)
        for column, colour in ((0, GREEN), (1, BLUE), (2, RED)):
            values = np.array([row[column] for row in self.history])
            shares = values if column == 0 else np.log10(values) / 5 + 1
            points = [(MARGIN + (place + 0.5) * CELL, height * (1 - share)) for place, share in enumerate(shares)]
            draw.line(points, colour, 2)
            for x, y in points:
                draw.ellipse((x - 2, y - 2, x + 2, y + 2), colour)
        draw.text((4, height + 6), self._caption(), fill=(0, 0, 0), font_size=FONT_SIZE)
        for place, (name, colour) in enumerate((("accuracy", GREEN), ("learning rate: gate", BLUE), ("experts", RED))):
            draw.text((MARGIN + 130 * place, 4), name, fill=colour, font_size=FONT_SIZE)
        return np.asarray(image)

    def _caption(self) -> str:
        accuracy = self.history[-1][0] if self.history else 0.0
        return (
            f"decision {len(self.history)} of {self.max_actions}   accuracy {accuracy:.3f}   target {self.target:.3f}"
        )
