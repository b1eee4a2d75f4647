"""Result of a stream: accuracies after each task, forgetting, transfer, use of experts, bytes and time.

Shape legend: T tasks, E experts.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cost.files import load_json, save_json
from experts.continual.stream import Stream
from experts.data import DataError


@dataclass(frozen=True)
class Result:
    """`accuracy [T, T]`: row i after task i, column j on task j; NaN above the diagonal.

    `online [T]` is the accuracy on the batches of the first epoch before they are learned, among the task's own
    classes, `scratch` the same of a new network that learns the task alone, and its accuracy on it, `[T, 2]`, if asked
    for. `expert_load [T, E]` is the share of each task's choices that each expert gets in the end. `parameters`,
    `bytes_after` (of what is kept between tasks: the network in float32, the replay and the penalties), `experts` and
    `seconds` are lists of a value after each task.
    """

    stream: str
    scenario: str
    seed: int
    split: str
    tasks: list[str]
    accuracy: np.ndarray
    online: np.ndarray
    expert_load: np.ndarray
    parameters: list[int]
    bytes_after: list[int]
    experts: list[int]
    seconds: list[float]
    scratch: np.ndarray | None = None

    @property
    def final(self) -> float:
        """Mean accuracy over the tasks after the last one."""
        return float(np.mean(self.accuracy[-1]))

    @property
    def average(self) -> float:
        """Mean over time of the mean accuracy on the tasks so far."""
        return float(np.mean([row[: number + 1].mean() for number, row in enumerate(self.accuracy)]))

    @property
    def forgetting(self) -> float:
        """Mean over all tasks but the last of the best accuracy before the end minus the one at the end (Chaudhry et
        al. 2018); 0 for a single task."""
        if len(self.accuracy) < 2:
            return 0.0
        best = np.nanmax(self.accuracy[:-1, :-1], axis=0)
        return float(np.mean(best - self.accuracy[-1, :-1]))

    @property
    def transfer(self) -> float | None:
        """Mean over later tasks of the online accuracy minus that of a network that starts from scratch (forward
        transfer); None without `scratch`."""
        if self.scratch is None or len(self.online) < 2:
            return None
        return float(np.mean(self.online[1:] - self.scratch[1:, 0]))

    @property
    def bytes(self) -> int:
        """Bytes of what is kept after the last task."""
        return self.bytes_after[-1]

    def summary(self) -> dict[str, float]:
        """One row of a table; without an online accuracy where nothing is learned batch by batch."""
        row = {
            "accuracy": self.final, "average accuracy": self.average, "forgetting": self.forgetting,
            "bytes": float(self.bytes),
            "parameters": float(self.parameters[-1]), "experts": float(self.experts[-1]),
            "seconds": float(np.sum(self.seconds)),
        }  # fmt: skip
        online = float(np.mean(self.online))
        more = {"online accuracy": online, "transfer": self.transfer}
        return row | {name: value for name, value in more.items() if value is not None and not np.isnan(value)}

    def save(self, path: str | Path) -> None:
        """Write the result as JSON with a SHA-256."""
        save_json(Path(path), {each.name: _plain(getattr(self, each.name)) for each in fields(self)})

    @classmethod
    def load(cls, path: str | Path) -> Result:
        """Load a result of `save`; raises `DataError` where the file is damaged or foreign."""
        content = load_json(Path(path), DataError, "run the stream again")
        try:
            for name in ("accuracy", "online", "expert_load", "scratch"):
                content[name] = None if content[name] is None else np.array(content[name], dtype=np.float64)
            found = cls(**content)
            count = len(found.tasks)
            if found.accuracy.shape != (count, count) or {len(found.online), len(found.expert_load)} != {count}:
                raise ValueError(f"arrays of other than {count} tasks")
            found.summary()
        except (TypeError, ValueError, KeyError, AttributeError, IndexError) as error:
            raise DataError(f"{path} is no result of a stream: {error}") from error
        return found


@dataclass
class Curves:
    """What is measured while a stream is learned, a value or row for each task so far; `right` and `seen` count the
    present task's training inputs."""

    accuracy: list[list[float]] = field(default_factory=list)
    online: list[float] = field(default_factory=list)
    expert_load: list[list[list[float]]] = field(default_factory=list)
    parameters: list[int] = field(default_factory=list)
    bytes_after: list[int] = field(default_factory=list)
    experts: list[int] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    scratch: list[list[float]] = field(default_factory=list)
    right: int = 0
    seen: int = 0

    def count(self, logits: torch.Tensor, labels: np.ndarray) -> None:
        """Count a training batch, `[B, C]` and `[B]`, before it is learned."""
        self.right += int((logits.argmax(1).numpy() == labels).sum())
        self.seen += len(labels)

    def append(self, **values: Any) -> None:
        """End a task."""
        for name, value in values.items():
            getattr(self, name).append(value)
        self.online.append(self.right / self.seen if self.seen else float("nan"))
        self.right = self.seen = 0

    def latest(self, tasks: int) -> float:
        """Mean accuracy on the first tasks after the last one."""
        return float(np.mean(self.accuracy[-1][:tasks]))

    def result(self, stream: Stream, seed: int, split: str, scratch: bool) -> Result:
        """The result at the end."""
        return Result(
            stream=stream.name, scenario=stream.scenario, seed=seed, split=split,
            tasks=[task.name for task in stream.tasks], accuracy=np.array(self.accuracy, dtype=np.float64),
            online=np.array(self.online), expert_load=np.array(self.expert_load[-1]), parameters=self.parameters,
            bytes_after=self.bytes_after, experts=self.experts, seconds=self.seconds,
            scratch=np.array(self.scratch) if scratch else None,
        )  # fmt: skip

    def content(self) -> dict[str, Any]:
        """As JSON content."""
        return asdict(self)

    @classmethod
    def of(cls, content: dict[str, Any]) -> Curves:
        """Of `content()`; raises `TypeError` or `ValueError` for other content."""
        found = cls(**content)
        if any(not isinstance(getattr(found, name), list) for name in cls.__dataclass_fields__ if name not in COUNTS):
            raise ValueError("curves are lists")
        return found


COUNTS = "right", "seen"


def _plain(value: Any) -> Any:
    """Arrays as lists, with None for NaN, which JSON does not have."""
    if isinstance(value, np.ndarray):
        return np.where(np.isnan(value), None, value).tolist()  # type: ignore[call-overload]
    return value


def as_content(settings: Any) -> dict[str, Any]:
    """A frozen configuration as JSON content."""
    found: dict[str, Any] = json.loads(json.dumps(asdict(settings), default=int))  # of numpy's whole numbers
    return found
