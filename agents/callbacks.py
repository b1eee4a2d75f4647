"""Training callbacks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any


class Callback:
    """Base class of callbacks; `learner` has `num_timesteps`, `goal`, `logs`, `predict` and `save`."""

    def on_training_start(self, learner: Any) -> None:
        """Called before the first rollout."""

    def on_update(self, learner: Any) -> bool | None:
        """Called after each rollout and update; return False to stop the training."""

    def on_training_end(self, learner: Any) -> None:
        """Called after the last update, however the training ends."""


Callbacks = Callback | Callable[[Any], object] | Sequence["Callbacks"] | None


class _Function(Callback):
    def __init__(self, function: Callable[[Any], object]) -> None:
        self.function = function

    def on_update(self, learner: Any) -> bool | None:
        return self.function(learner) is not False


class _Several(Callback):
    def __init__(self, callbacks: Sequence[Callbacks]) -> None:
        self.callbacks = [callback_of(each) for each in callbacks]

    def on_training_start(self, learner: Any) -> None:
        for each in self.callbacks:
            each.on_training_start(learner)

    def on_update(self, learner: Any) -> bool | None:
        return all([each.on_update(learner) is not False for each in self.callbacks])  # call all of them

    def on_training_end(self, learner: Any) -> None:
        for each in self.callbacks:
            each.on_training_end(learner)


def callback_of(given: Callbacks) -> Callback:
    """Combine the callback argument of `learn` into one `Callback`: None, a `Callback`, a function called after each
    update, or several.

    Raises `TypeError` for SB3's callbacks, which depend on SB3's algorithms.
    """
    if given is None:
        return Callback()
    if isinstance(given, Callback):
        return given
    if isinstance(given, Sequence):
        return _Several(given)
    if hasattr(given, "init_callback") or not callable(given):
        raise TypeError(f"callback={given!r}: pass agents.callbacks.Callback, or a function of the learner")
    return _Function(given)
