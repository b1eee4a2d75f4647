"""Continual learning: streams of tasks, and a Mixture of Experts that learns them without forgetting."""

from experts.continual.closed_form import ClosedForm
from experts.continual.result import Result
from experts.continual.running import predictor, run
from experts.continual.strategy import Expansion, NetworkShape, Penalty, Replay, Strategy
from experts.continual.stream import Stream, StreamTask, load

__all__ = [
    "ClosedForm",
    "Expansion",
    "NetworkShape",
    "Penalty",
    "Replay",
    "Result",
    "Strategy",
    "Stream",
    "StreamTask",
    "load",
    "predictor",
    "run",
]
