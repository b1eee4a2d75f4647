"""Picture of a server: how many requests waited, and the batches it sent."""

from dataclasses import dataclass

import numpy as np

HEIGHT, WIDTH, MARGIN = 160, 480, 8
WAITING, LEVELS = (200, 210, 235), ((46, 160, 67), (230, 150, 30), (207, 34, 46), (120, 60, 160))


@dataclass(frozen=True)
class ServingPicture:
    """Decisions so far as (time, rows waiting, rows sent, level), level -1 for waiting; `seconds` of the episode."""

    history: list[tuple[float, int, int, int]]
    seconds: float
    levels: tuple[str, ...]

    def ansi(self) -> str:
        """The last decisions, a line each."""
        lines = [f"{'time':>8} {'waiting':>8}  decision"]
        for time, waiting, rows, level in self.history[-20:]:
            said = "waits" if level < 0 else f"{rows} rows at {self.levels[level]}"
            lines.append(f"{time:8.3f} {waiting:8d}  {said}")
        return "\n".join(lines)

    def rgb_array(self) -> np.ndarray:
        """`[height, width, 3]` uint8: over time, the queue in grey and the batches sent, coloured by level."""
        image = np.full((HEIGHT, WIDTH, 3), 255, dtype=np.uint8)
        most = max([waiting for _, waiting, _, _ in self.history], default=1) or 1
        span, top = WIDTH - 2 * MARGIN, HEIGHT - 2 * MARGIN
        for time, waiting, rows, level in self.history:
            x = MARGIN + min(int(span * time / (1.05 * self.seconds)), span - 2)
            for count, colour in ((waiting, WAITING), (rows, LEVELS[max(level, 0) % len(LEVELS)])):
                height = int(top * min(count / most, 1.0))
                image[HEIGHT - MARGIN - height : HEIGHT - MARGIN, x : x + 2] = colour
        image[HEIGHT - MARGIN, MARGIN:-MARGIN] = 0
        return image
