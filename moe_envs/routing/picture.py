"""Picture of a mini-batch so far."""

from dataclasses import dataclass

import numpy as np

from moe_envs.core.rendering import BLUE, CELL, FONT_SIZE, GREEN, GREY, MARGIN, RED, WHITE


@dataclass(frozen=True)
class RoutingPicture:
    """Mini-batch, columns are inputs, rows experts; `choices` are (subset code, correct) of the inputs so far."""

    num_experts: int
    batch_size: int
    choices: list[tuple[int, int]]
    cost: float

    def ansi(self) -> str:
        """One line per expert: + for a correct answer with the expert, x for a wrong one, . if not used."""
        lines = [
            f"expert {expert:2d} "
            + "".join(("x", "+")[correct] if code >> expert & 1 else "." for code, correct in self.choices)
            for expert in range(self.num_experts)
        ]
        return "\n".join([*lines, self._caption()])

    def rgb_array(self) -> np.ndarray:
        """`[height, width, 3]` uint8: green cells answered correctly, red ones wrongly, experts paid in blue."""
        from PIL import Image, ImageDraw

        height = self.num_experts * CELL
        image = Image.new("RGB", (MARGIN + self.batch_size * CELL + 8, height + 36), WHITE)
        draw = ImageDraw.Draw(image)
        paid = int(np.bitwise_or.reduce([0, *(code for code, _ in self.choices)]))
        for expert in range(self.num_experts):
            top = expert * CELL + 4
            draw.text(
                (4, top - 2), f"expert {expert}", fill=BLUE if paid >> expert & 1 else (0, 0, 0), font_size=FONT_SIZE
            )
            for column in range(self.batch_size):
                code, correct = self.choices[column] if column < len(self.choices) else (0, 0)
                colour = (RED, GREEN)[correct] if code >> expert & 1 else GREY
                left = MARGIN + column * CELL
                draw.rectangle((left, top, left + CELL - 3, top + CELL - 3), fill=colour)
        draw.text((4, height + 12), self._caption(), fill=(0, 0, 0), font_size=FONT_SIZE)
        return np.asarray(image)

    def _caption(self) -> str:
        done = len(self.choices)
        share = sum(correct for _, correct in self.choices) / max(done, 1)
        return f"input {done} of {self.batch_size}   accuracy so far {share:.2f}   cost {self.cost:.3f} (top-2 gate: 1)"
