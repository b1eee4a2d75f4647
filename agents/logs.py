"""Training logs: means over the last episodes, TensorBoard, and a table on the terminal."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from agents.episodes import Episodes
from agents.rollouts import Rollout

WINDOW = 100  # number of episodes in rollout/ep_rew_mean


class Logs:
    """Latest `values` by SB3's names and their outputs."""

    def __init__(self, rows: int, tensorboard_log: str | Path | None, verbose: int) -> None:
        self.values: dict[str, float] = {}
        self.tensorboard_log, self.verbose = tensorboard_log, verbose
        self.episodes, self.window = Episodes(rows), pd.DataFrame()
        self._writer: Any = None

    def count(self, rollout: Rollout, done: np.ndarray, entropy: np.ndarray, timesteps: int) -> None:
        """Add the episodes of a rollout; `timesteps` is the number of training steps after it."""
        valid = rollout.valid.astype(np.float64)
        steps = {"length": valid, "return": rollout.rewards, "entropy": entropy * valid}
        actions = rollout.actions.reshape(*done.shape, -1)
        steps["action"] = actions.sum(-1) * valid
        for key, values in rollout.infos.items():
            steps[key if key.startswith(Episodes.SUMMED) else f"last:{key}"] = values
        taken = valid.sum(1).cumsum().astype(np.int64)
        ended = self.episodes.add(steps, done, timesteps - taken[-1] + taken)
        self.window = pd.concat([self.window, ended]).tail(WINDOW) if len(ended) else self.window
        if len(self.window):
            self.values["rollout/ep_rew_mean"] = float(self.window["return"].mean())
            self.values["rollout/ep_len_mean"] = float(self.window["length"].mean())
        for key in ended.columns if len(ended) else ():
            if "/" in key:
                self.values[key] = float(ended[key].mean())

    def open(self, name: str, anew: bool, timesteps: int) -> None:
        """Open `tensorboard_log`/NAME_N with the next N for a new training, or the last N otherwise."""
        if self.tensorboard_log is None or (self._writer is not None and not anew):
            return
        from torch.utils.tensorboard import SummaryWriter

        self.close()
        folder = Path(self.tensorboard_log)
        taken = [re.fullmatch(rf"{re.escape(name)}_(\d+)", path.name) for path in folder.glob(f"{name}_*")]
        last = max((int(found[1]) for found in taken if found), default=0)
        self._writer = SummaryWriter(
            str(folder / f"{name}_{last + 1 if anew or not last else last}"), purge_step=timesteps
        )

    def write(self, timesteps: int, shown: bool) -> None:
        """Write the values, evaluation results only once; `shown` prints them if `verbose` is 1."""
        if self.verbose and shown:
            from agents.console import show

            show(self.values)
        if self._writer is not None:
            for key, value in self.values.items():
                self._writer.add_scalar(key, value, timesteps)
            self._writer.flush()
            self.values = {key: value for key, value in self.values.items() if not key.startswith("eval/")}

    def close(self) -> None:
        """Close the TensorBoard file."""
        if self._writer is not None:
            self._writer.close()
            self._writer = None
