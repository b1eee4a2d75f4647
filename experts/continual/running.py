"""Run a stream from start to end, with or without a folder that it goes on from."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np

from cost.files import alone
from experts.continual import checkpoint, closed_form
from experts.continual.learner import Control, StreamLearner
from experts.continual.result import Result
from experts.continual.strategy import NetworkShape, Strategy
from experts.continual.stream import Stream
from experts.data import DataError
from experts.threads import reproducible

RESULT = "result.json"


def run(
    stream: Stream,
    strategy: Strategy | None = None,
    seed: int = 0,
    *,
    shape: NetworkShape | None = None,
    split: str = "test",
    folder: str | Path | None = None,
    save_every: int = 200,
    scratch: bool = False,
    control: Control | None = None,
    progress: Callable[[float, str], object] = lambda share, text: None,
) -> Result:
    """Learn the tasks of a stream; the same result for the same seed, but for its seconds.

    With `folder` the state is written after each task and every `save_every` steps, a run that was interrupted goes on
    from it, and the result is written at the end. `scratch` also trains a new network on each task alone.

    `control(task, strategy)` gives the strategy of each task, called in their order, from the first one again when a
    run goes on. It may change what a task learns by and what it offers to the replay (`keep`, `late`, `confident`), not
    the form of what is kept: `replay.kind`, `replay.size`, `replay.only`, whether logits are kept, `side`, `bits`,
    `all_classes`, `regularizer.kind`. Accuracies are those of `split`,
    "validation" or "test". Raises `ValueError` for a strategy that does not fit the stream, and `DataError` for a
    folder of another run.
    """
    strategy, shape = strategy or Strategy(), shape or NetworkShape()
    if split not in ("validation", "test"):
        raise ValueError(f"split={split!r} is not one of validation, test")
    if save_every < 1:
        raise ValueError(f"save_every={save_every}: must be at least 1")
    with reproducible(seed):
        learner = StreamLearner(stream, strategy, int(seed), shape, split, control, scratch)
        if folder is None:
            learner.run(progress, lambda: None, save_every)
            return learner.result()
        path = Path(folder)
        with alone(path, DataError):
            if (path / closed_form.FILE).exists():
                raise DataError(f"{path} holds a closed form: name another folder")
            checkpoint.restore(learner, path / checkpoint.FILE)
            learner.run(progress, lambda: checkpoint.save(learner, path / checkpoint.FILE), save_every)
            found = learner.result()
            found.save(path / RESULT)
            return found


def predictor(folder: str | Path) -> Callable[[np.ndarray], np.ndarray]:
    """The network that a run with this `folder` has trained so far, or its closed form: inputs `[n, ...]` as the stream
    has them to class logits `[n, C]`. Raises `DataError` where there is none, or where its gate needs the task."""
    form = Path(folder) / closed_form.FILE
    return closed_form.predictor(form) if form.exists() else checkpoint.predictor(Path(folder) / checkpoint.FILE)
