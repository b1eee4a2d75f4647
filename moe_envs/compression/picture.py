"""Picture of a plan so far."""

from dataclasses import dataclass

import numpy as np

from moe_envs.core.rendering import BLUE, CELL, FONT_SIZE, GREEN, GREY, RED, WHITE


@dataclass(frozen=True)
class PlanPicture:
    """A plan: for each matrix done its level and the share of its float32 bytes that it takes there."""

    names: list[str]
    done: list[tuple[int, float]]
    spent: int
    budget: int

    def ansi(self) -> str:
        """One line per matrix."""
        width = max(map(len, self.names))
        lines = [
            f"{name:{width}}  level {level:2d}  {share:6.1%}"
            for name, (level, share) in zip(self.names, self.done, strict=False)
        ]
        return "\n".join([*lines, self._caption()])

    def rgb_array(self) -> np.ndarray:
        """`[height, width, 3]` uint8: a row a matrix; the longer the blue bar, the more of its bytes are kept."""
        from PIL import Image, ImageDraw

        left, width = 190, 320
        image = Image.new("RGB", (left + width + 90, len(self.names) * CELL + 36), WHITE)
        draw = ImageDraw.Draw(image)
        for row, name in enumerate(self.names):
            top = row * CELL + 4
            draw.text((4, top - 2), name[-20:], fill=(0, 0, 0), font_size=FONT_SIZE)
            draw.rectangle((left, top, left + width, top + CELL - 4), fill=GREY)
            if row < len(self.done):
                level, share = self.done[row]
                draw.rectangle((left, top, left + width * share, top + CELL - 4), fill=BLUE)
                draw.text((left + width + 8, top - 2), f"level {level}", fill=(0, 0, 0), font_size=FONT_SIZE)
        colour = GREEN if self.spent <= self.budget else RED
        draw.text((4, len(self.names) * CELL + 12), self._caption(), fill=colour, font_size=FONT_SIZE)
        return np.asarray(image)

    def _caption(self) -> str:
        done = f"matrix {len(self.done)} of {len(self.names)}"
        return f"{done}   {self.spent:,} of {self.budget:,} bytes"
