"""Save, checkpoint, load and resume learners without pickle; resuming is bit for bit."""

from __future__ import annotations

import json
import os
from operator import index
from pathlib import Path
from typing import Any, ClassVar, Self

import gymnasium
import numpy as np
import pandas as pd

from agents import checkpoints
from agents.batches import RewardScale
from agents.checkpoints import CheckpointError
from agents.descent import Descent
from agents.episodes import Episodes
from agents.logs import Logs
from agents.preprocessing import Preprocessor
from agents.rollouts import Collector, Rows
from agents.settings import Settings
from agents.updates import Updates
from cost.arguments import one_line
from cost.files import alone, sha256_of
from cost.trust import require_env

EPISODES = "episodes.csv"
LARGEST = 1e10  # weight of a network
# What arguments and state that do not fit an environment raise.
UNFIT = (
    ValueError, KeyError, TypeError, AttributeError, IndexError, OverflowError, gymnasium.error.Error, RuntimeError,
    MemoryError,
)  # fmt: skip


class Resumable:
    """Mixin for saving and loading learners."""

    name: ClassVar[str]
    env_id: str | None
    arguments: dict[str, Any]
    settings: Settings
    rows: Rows
    preprocessor: Preprocessor
    descent: Descent
    generator: np.random.Generator
    updates: Updates
    collector: Collector
    reward_scale: RewardScale
    log: Logs
    num_timesteps: int
    goal: int
    _temperature: np.float32
    # Checkpoint folder, identifier of its newest checkpoint, and size and SHA-256 of episodes.csv.
    _run: tuple[Path, str | None] | None = None
    _episodes_size = 0
    _episodes_sha256: str | None = None

    @property
    def episodes(self) -> Episodes:
        """All episodes so far; `episodes.frame()` has one row per episode."""
        return self.log.episodes

    def save(self, path: str | Path, **more: Any) -> None:
        """Write all that `load` and `resume` need, and `more`, into the folder `path`; nothing is pickled.

        Raises `ValueError` if the folder has anything but a checkpoint.
        """
        self._check_saveable()
        checkpoints.save(Path(path), self._content() | more)

    def checkpoint(self, run: str | Path) -> None:
        """Save as the newest checkpoint of the folder `run`, keep the last two, and append to its episodes.csv.

        An environment without `state` and `restore` starts new episodes here, as it does when resumed.
        """
        run = Path(run)
        with alone(run, ValueError):
            self._claim(run)
            if not self.rows.has_state:
                self.collector.begin(int(self.generator.integers(2**31)))
                self._forget()
            self._episodes_size = self.episodes.append_to(run / EPISODES, self._episodes_size)
            self._episodes_sha256 = sha256_of((run / EPISODES).read_bytes())
            self.save(checkpoints.numbered(run, self.num_timesteps))
            checkpoints.prune(run)
            self._run = run.resolve(), checkpoints.newest(run)

    @classmethod
    def load(cls, path: str | Path, device: str | None = None, allow_import: bool = False, env: Any = None) -> Self:
        """Load a learner from a folder of `save` or the newest intact checkpoint of a run; it starts new episodes. One
        that was made with an environment instead of an id needs such an `env` again.

        Raises `CheckpointError` if it is damaged or of another algorithm, and `ValueError` if its environment is of a
        package that is not imported yet, unless `allow_import` is set: importing runs the package's code.
        """
        found = cls._load(Path(path), device, allow_import, env)
        found.collector.observations = found.log.tensorboard_log = None
        found._forget()
        return found

    @classmethod
    def resume(
        cls,
        path: str | Path,
        tensorboard_log: str | Path | None = None,
        device: str | None = None,
        allow_import: bool = False,
        env: Any = None,
    ) -> Self:
        """Load a learner with its full training state, as `load` does: `learn()` continues bit for bit.

        An environment without `state` and `restore` starts new episodes, as did the training that wrote the
        `checkpoint`.
        """
        found = cls._load(Path(path), device, allow_import, env)
        found.log.tensorboard_log = tensorboard_log or found.log.tensorboard_log
        if newest := checkpoints.newest(Path(path)):
            found._run = Path(path).resolve(), newest
        return found

    @classmethod
    def _load(cls, path: Path, device: str | None, allow_import: bool, env: Any) -> Self:
        content = checkpoints.find(path)
        if content.get("algorithm") != cls.name:
            raise CheckpointError(f"{path} holds a checkpoint of {content.get('algorithm')}, not of {cls.name}")
        if env is None and content.get("env") is None:
            raise ValueError(
                f"{path} was trained in an environment that was given as an object: give env=, such as that"
            )
        if env is None:
            require_env(content["env"], path, allow_import)
        made: Any = cls
        try:
            arguments = content["arguments"] | ({"device": device} if device else {})
            given = content["env"] if env is None else env
            found = made(arguments.pop("policy"), given, **arguments, **content["settings"])
            found._restore(content)
        except UNFIT as error:
            raise CheckpointError(
                f"{path} does not fit {content['env'] or 'env'} as it is made here: {one_line(error)}"
            ) from error
        return found

    def _forget(self) -> None:
        """Start new episodes in all rows and discard unfinished ones."""
        self.episodes.forget()
        self.reward_scale.forget()

    def _check_saveable(self) -> None:
        try:
            json.dumps(self.arguments)
        except TypeError as error:
            raise ValueError(f"env_kwargs cannot be saved: {error}; use numbers, strings and lists") from error

    def _claim(self, run: Path) -> None:
        """Claim a folder for this training; it must have its episodes and no checkpoints of another training."""
        self._check_saveable()
        newest, size = checkpoints.newest(run), (run / EPISODES).stat().st_size if (run / EPISODES).exists() else 0
        if self._run != (run.resolve(), newest):
            if newest is not None or size:
                raise ValueError(
                    f"{run} holds what another training wrote ({newest.split()[0] if newest else EPISODES}): "
                    f"{self.name}.resume goes on with its newest checkpoint; for a new one name another folder"
                )
            self._run, self._episodes_size, self._episodes_sha256 = (run.resolve(), None), 0, None
            self.episodes.rewind()
        self.check_episodes(run)

    def check_episodes(self, run: Path) -> None:
        """Raise `CheckpointError` if the episodes of the run are not those at its last checkpoint; cut off what a
        training that was killed wrote after them."""
        path, size = run / EPISODES, self._episodes_size
        there = path.stat().st_size if path.exists() else 0
        if size > there:
            raise CheckpointError(
                f"{path} had {size} bytes and has {there}: put it back, or checkpoint to another folder"
            )
        if size and self._episodes_sha256:
            with path.open("rb") as file:
                if sha256_of(file.read(size)) != self._episodes_sha256:
                    raise CheckpointError(f"{path} was altered: put it back, or checkpoint to another folder")
        if there > size:
            os.truncate(path, size)

    def _content(self) -> dict[str, Any]:
        log = self.log.tensorboard_log
        return {
            "algorithm": self.name,
            "env": self.env_id,
            "arguments": self.arguments,
            "settings": vars(self.settings),
            "tensorboard_log": None if log is None else str(log),
            "descent": self.descent.state(),
            "generator": self.generator.bit_generator.state,
            "observations": vars(self.preprocessor.moments),
            "returns": self.reward_scale.state(),
            "episodes_sha256": self._episodes_sha256,
            "counts": [self.num_timesteps, self.goal, self.updates.count, self._episodes_size],
            "temperature": float(self._temperature),
            "collector": self.collector.state(),
            "episodes": self.episodes.carry,
            "window": {name: column.to_numpy() for name, column in self.log.window.items()},
        }

    def _restore(self, content: dict[str, Any]) -> None:
        if not _finite(content["descent"]):
            raise ValueError("weights or moments are not finite")
        self.descent.restore(content["descent"])
        self.generator.bit_generator.state = content["generator"]
        vars(self.preprocessor.moments).update(content["observations"])
        self.preprocessor.refresh()
        self.reward_scale.restore(content["returns"])
        self.num_timesteps, self.goal, self.updates.count, self._episodes_size = map(index, content["counts"])
        self._episodes_sha256 = content.get("episodes_sha256")  # older checkpoints have none
        self._temperature = np.float32(content["temperature"])
        self.collector.restore(content["collector"])
        self.episodes.restore(content["episodes"])
        self.log.window = pd.DataFrame(content["window"])
        log = content["tensorboard_log"]
        self.log.tensorboard_log = None if log is None else Path(log)
        if content["collector"]["env"] is None:
            self._forget()


def _finite(value: Any) -> bool:
    """Whether all arrays in nested dicts and lists are finite, and small enough to stay so in a network."""
    if isinstance(value, dict | list):
        return all(map(_finite, value.values() if isinstance(value, dict) else value))
    return not isinstance(value, np.ndarray) or bool((np.abs(value) < LARGEST).all())
