"""Pictures and text of an episode so far."""

from dataclasses import dataclass

import numpy as np

CELL, MARGIN = 16, 48
GREY, GREEN, RED, BLUE, WHITE = (225, 225, 225), (46, 160, 67), (207, 34, 46), (9, 105, 218), (255, 255, 255)


@dataclass(frozen=True)
class RoutingPicture:
    """A mini-batch: an input a column, an expert a row; `choices` are (subset code, correct) of the inputs so far."""

    num_experts: int
    batch_size: int
    choices: list[tuple[int, int]]
    cost: float

    def ansi(self) -> str:
        """A line an expert: + where it took part in a correct answer, x in a wrong one, . where it was not asked."""
        lines = [
            f"expert {expert:2d} "
            + "".join(("x", "+")[correct] if code >> expert & 1 else "." for code, correct in self.choices)
            for expert in range(self.num_experts)
        ]
        return "\n".join([*lines, self._caption()])

    def rgb_array(self) -> np.ndarray:
        """`[height, width, 3]` uint8: green cells answered correctly, red ones wrongly, blue marks experts paid."""
        from PIL import Image, ImageDraw

        height = self.num_experts * CELL
        image = Image.new("RGB", (MARGIN + self.batch_size * CELL + 8, height + 32), WHITE)
        draw = ImageDraw.Draw(image)
        paid = int(np.bitwise_or.reduce([0, *(code for code, _ in self.choices)]))
        for expert in range(self.num_experts):
            top = expert * CELL + 4
            draw.text((4, top), f"e{expert}", fill=BLUE if paid >> expert & 1 else (0, 0, 0))
            if paid >> expert & 1:
                draw.rectangle((28, top + 1, 38, top + CELL - 4), fill=BLUE)
            for column in range(self.batch_size):
                code, correct = self.choices[column] if column < len(self.choices) else (0, 0)
                colour = (RED, GREEN)[correct] if code >> expert & 1 else GREY
                left = MARGIN + column * CELL
                draw.rectangle((left, top, left + CELL - 3, top + CELL - 3), fill=colour)
        draw.text((4, height + 12), self._caption(), fill=(0, 0, 0))
        return np.asarray(image)

    def _caption(self) -> str:
        done = len(self.choices)
        share = sum(correct for _, correct in self.choices) / max(done, 1)
        return f"input {done} of {self.batch_size}   accuracy so far {share:.2f}   cost {self.cost:.3f} (top-2 gate: 1)"


@dataclass(frozen=True)
class TrainingPicture:
    """A training: after each decision (validation accuracy, learning rate of the gate, of the experts)."""

    max_actions: int
    target: float
    history: list[tuple[float, float, float]]

    def ansi(self) -> str:
        """A line a decision."""
        lines = [
            f"{number + 1:3d}  accuracy {accuracy:.3f}  learning rate: gate {gate:.1e}, experts {experts:.1e}"
            for number, (accuracy, gate, experts) in enumerate(self.history)
        ]
        return "\n".join([*lines, self._caption()])

    def rgb_array(self) -> np.ndarray:
        """`[height, width, 3]` uint8: accuracy green, the target grey, learning rates blue and red from 1e-5 to 1."""
        from PIL import Image, ImageDraw

        width, height = 2 * MARGIN + self.max_actions * CELL, 12 * CELL
        image = Image.new("RGB", (width, height + 24), WHITE)
        draw = ImageDraw.Draw(image)
        draw.line([(MARGIN, height * (1 - self.target)), (width - MARGIN, height * (1 - self.target))], GREY, 2)
        for column, colour in ((0, GREEN), (1, BLUE), (2, RED)):
            values = np.array([row[column] for row in self.history])
            shares = values if column == 0 else np.log10(values) / 5 + 1
            points = [(MARGIN + (place + 0.5) * CELL, height * (1 - share)) for place, share in enumerate(shares)]
            draw.line(points, colour, 2)
            for x, y in points:
                draw.ellipse((x - 2, y - 2, x + 2, y + 2), colour)
        draw.text((4, height + 6), self._caption(), fill=(0, 0, 0))
        for place, (name, colour) in enumerate((("accuracy", GREEN), ("gate's rate", BLUE), ("experts' rate", RED))):
            draw.text((MARGIN + 90 * place, 4), name, fill=colour)
        return np.asarray(image)

    def _caption(self) -> str:
        accuracy = self.history[-1][0] if self.history else 0.0
        return (
            f"decision {len(self.history)} of {self.max_actions}   accuracy {accuracy:.3f}   target {self.target:.3f}"
        )


@dataclass(frozen=True)
class PlanPicture:
    """A plan: for each matrix done its level and the share of its float32 bytes that it takes there."""

    names: list[str]
    done: list[tuple[int, float]]
    spent: int
    budget: int

    def ansi(self) -> str:
        """A line a matrix."""
        width = max(map(len, self.names))
        lines = [
            f"{name:{width}}  level {level:2d}  {share:6.1%}"
            for name, (level, share) in zip(self.names, self.done, strict=False)
        ]
        return "\n".join([*lines, self._caption()])

    def rgb_array(self) -> np.ndarray:
        """`[height, width, 3]` uint8: a row a matrix; the longer the blue bar, the more of its bytes are kept."""
        from PIL import Image, ImageDraw

        left, width = 130, 320
        image = Image.new("RGB", (left + width + 70, len(self.names) * CELL + 32), WHITE)
        draw = ImageDraw.Draw(image)
        for row, name in enumerate(self.names):
            top = row * CELL + 4
            draw.text((4, top), name[-20:], fill=(0, 0, 0))
            draw.rectangle((left, top, left + width, top + CELL - 4), fill=GREY)
            if row < len(self.done):
                level, share = self.done[row]
                draw.rectangle((left, top, left + width * share, top + CELL - 4), fill=BLUE)
                draw.text((left + width + 8, top), f"level {level}", fill=(0, 0, 0))
        colour = GREEN if self.spent <= self.budget else RED
        draw.text((4, len(self.names) * CELL + 12), self._caption(), fill=colour)
        return np.asarray(image)

    def _caption(self) -> str:
        done = f"matrix {len(self.done)} of {len(self.names)}"
        return f"{done}   {self.spent:,} of {self.budget:,} bytes"
