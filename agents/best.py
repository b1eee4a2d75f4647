"""Keeping the weights of a training that are best on the split `validation`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from agents import checkpoints
from agents.evaluate import evaluate
from agents.learner import Learner

CHECKS, EPISODES = 10, 1000


class Best:
    """A callback of our learners: evaluates at ten moments and at the end, saves the best learner so far in `folder`.

    It goes on after `resume` as if the training had never stopped.
    """

    def __init__(self, folder: Path, learner: Learner, env_id: str, env_kwargs: dict[str, Any]) -> None:
        self.folder, self.env_id, self.env_kwargs = folder, env_id, {**env_kwargs, "split": "validation"}
        self.mean, self._checked = -float("inf"), learner.num_timesteps
        if learner.num_timesteps and (folder / checkpoints.MANIFEST).exists():
            self.mean = checkpoints.load(folder)["validation"]

    def __call__(self, learner: Learner) -> None:
        before, now = (each * CHECKS // learner.goal for each in (self._checked, learner.num_timesteps))
        self._checked = learner.num_timesteps
        if now == before:
            return
        frame = evaluate(learner, self.env_id, EPISODES, **self.env_kwargs)
        learner.logs["eval/mean_reward"] = mean = float(frame["return"].mean())
        if mean > self.mean:
            self.mean = mean
            learner.save(self.folder, validation=mean)
