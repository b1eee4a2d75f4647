"""Picture of a passage: its text, coloured by the experts that each token got."""

from dataclasses import dataclass

import numpy as np

from moe_envs.core.rendering import CELL, FONT_SIZE, WHITE

WIDTH, LETTER = 640, 9  # pixels
BLOCKS = " ▁▂▃▄▅▆▇█"


@dataclass(frozen=True)
class TextPicture:
    """Texts of the tokens, and for those done the share of the experts that ran, 0..1."""

    pieces: list[str]
    shares: np.ndarray

    def ansi(self) -> str:
        """The text so far, a block after each token: the higher, the more experts."""
        marks = [BLOCKS[round(float(share) * (len(BLOCKS) - 1))] for share in self.shares]
        return "".join(f"{piece}{mark}" for piece, mark in zip(self.pieces, marks, strict=False))

    def rgb_array(self) -> np.ndarray:
        """`[height, width, 3]` uint8: the darker the blue behind a token, the more experts."""
        from PIL import Image, ImageDraw

        places, x, line = [], 4, 0
        for piece in self.pieces:
            length = LETTER * len(piece)
            if x + length > WIDTH - 4:
                x, line = 4, line + 1
            places.append((x, line, length))
            x += length
        image = Image.new("RGB", (WIDTH, (line + 1) * (CELL + 4) + 8), WHITE)
        draw = ImageDraw.Draw(image)
        for number, (left, row, length) in enumerate(places):
            top = 4 + row * (CELL + 4)
            if number < len(self.shares):
                rest = round(235 * (1 - 0.75 * float(self.shares[number])))
                draw.rectangle((left, top, left + length - 1, top + CELL), fill=(rest, rest, 245))
            ink = (0, 0, 0) if number < len(self.shares) else (150, 150, 150)
            draw.text((left + 1, top + 2), self.pieces[number], fill=ink, font_size=FONT_SIZE - 1)
        return np.asarray(image)
