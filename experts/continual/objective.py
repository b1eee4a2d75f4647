"""The loss of one step: new inputs, replayed ones, distance from a snapshot, and penalties.

Shape legend: B inputs, T tasks, C classes.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

from experts.continual.buffer import Buffer
from experts.continual.inputs import Encoding, shifted
from experts.continual.network import EXCLUDED, ContinualNetwork
from experts.continual.penalties import Importance
from experts.continual.strategy import Strategy
from experts.continual.stream import Stream
from experts.losses import load_balancing_loss

BALANCE = 0.01  # weight of the load-balancing loss
TEMPERATURE = 2.0  # of distillation


class Memory(NamedTuple):
    """What is kept of earlier tasks, each if the strategy asks for it."""

    buffer: Buffer | None
    importance: Importance | None
    snapshot: ContinualNetwork | None


class Objective:
    """Losses of a stream's batches under a strategy."""

    def __init__(self, stream: Stream, strategy: Strategy, encoding: Encoding) -> None:
        self.stream, self.strategy, self.encoding = stream, strategy, encoding
        self.allowed_TC = np.zeros((len(stream.tasks), stream.num_classes), bool)
        for number, task in enumerate(stream.tasks):
            self.allowed_TC[number, list(task.classes)] = True

    def new(
        self, network: ContinualNetwork, memory: Memory, rows: np.ndarray, labels: np.ndarray, task: int,
        random: np.random.Generator,
    ) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
        """Loss of new inputs of a task and of a draw from the replay, and the new inputs' logits, detached."""
        replay = self.strategy.replay
        drawn = [np.zeros(0, np.int64), np.zeros(0, np.int64)]
        if replay is not None and memory.buffer is not None and task and len(memory.buffer):
            even = self.strategy.balance == "sampling"
            for number, weight in enumerate((replay.weight, replay.logits)):
                if weight:
                    drawn[number] = memory.buffer.draw(replay.batch_size, random, even)
        numbers = np.full(len(labels), task)
        if drawn_rows := [places for places in drawn if len(places)]:
            assert memory.buffer is not None
            rows = np.concatenate([rows, *(memory.buffer.rows[places] for places in drawn_rows)])
            numbers = np.concatenate([numbers, *(memory.buffer.tasks[places] for places in drawn_rows)])
        x = self.inputs(rows, random)
        logits, balance = self._forward(network, x, numbers)
        own, again, matched = logits.split([len(labels), len(drawn[0]), len(drawn[1])])
        loss = BALANCE * balance + self._cross_entropy(own, torch.from_numpy(labels), task)
        if len(again):
            assert memory.buffer is not None
            assert replay is not None
            loss = loss + replay.weight * self._of_replay(again, memory.buffer, drawn[0])
        if len(matched):
            assert memory.buffer is not None
            assert replay is not None
            loss = loss + replay.logits * mismatch(matched, memory.buffer.logits[drawn[1]])
        if memory.snapshot is not None:
            known = self._known(memory.snapshot, x[: len(labels)], numbers[: len(labels)])
            loss = loss + self.strategy.distillation * self.divergence(own, known, task)
        if memory.importance is not None and memory.importance.anchor:
            loss = loss + memory.importance.loss(network)
        return loss, own.detach()

    def kept(self, network: ContinualNetwork, buffer: Buffer, random: np.random.Generator) -> torch.Tensor:
        """Loss of a draw from the replay alone."""
        assert self.strategy.replay is not None
        places = buffer.draw(self.strategy.replay.batch_size, random, self.strategy.balance == "sampling")
        logits, balance = self._forward(network, self.inputs(buffer.rows[places], random), None)
        return BALANCE * balance + self._of_replay(logits, buffer, places)

    def inputs(self, rows: np.ndarray, random: np.random.Generator | None = None) -> torch.Tensor:
        """Decoded inputs, moved by a few pixels for training."""
        x = self.encoding.decode(rows)
        if random is None or not self.strategy.shift or x.ndim != 4:
            return x
        return shifted(x, self.strategy.shift, random)

    def tasks_of(
        self, network: ContinualNetwork, x: torch.Tensor, tasks: int | np.ndarray | None
    ) -> torch.Tensor | None:
        """Weights of the tasks' vectors in the gate, `[B, T]`."""
        if self.strategy.gate == "input" or not len(network.signatures) or tasks is None:
            return None
        if self.strategy.gate == "domain":
            return network.similar_tasks(x)
        known = len(network.signatures)
        return F.one_hot(torch.as_tensor(tasks).long().expand(len(x)).clamp_max(known - 1), known).float()

    def of_task(self, logits: torch.Tensor, task: int | np.ndarray, masked: bool = False) -> torch.Tensor:
        """Logits without the classes of other tasks, where the scenario gives the task, or with `masked`."""
        if not (masked or self.stream.scenario == "task"):
            return logits
        allowed = torch.from_numpy(self.allowed_TC[task])[..., : logits.shape[1]]
        return logits.masked_fill(~allowed, EXCLUDED)

    def _forward(
        self, network: ContinualNetwork, x: torch.Tensor, tasks: np.ndarray | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        with self._autocast():
            logits, statistics = network(x, self.tasks_of(network, x, tasks))
        return logits.float(), load_balancing_loss(statistics.logits.float(), statistics.chosen)

    def _autocast(self) -> AbstractContextManager[Any]:
        return torch.autocast("cpu", dtype=torch.bfloat16) if self.strategy.precision == "bfloat16" else nullcontext()

    def _cross_entropy(self, logits: torch.Tensor, y: torch.Tensor, task: int) -> torch.Tensor:
        """Of new inputs, among the task's own classes where it is asymmetric."""
        logits = self.of_task(logits, task, self.strategy.asymmetric and self.stream.scenario != "domain")
        if self.strategy.balance != "weights":
            return F.cross_entropy(logits, y)
        counts = np.bincount(self.stream.tasks[task]["train"][1], minlength=logits.shape[1])
        inverse = np.where(counts, counts.sum() / np.maximum(counts, 1) / np.count_nonzero(counts), 0)
        return F.cross_entropy(logits, y, weight=torch.from_numpy(inverse).float())

    def _of_replay(self, logits: torch.Tensor, buffer: Buffer, places: np.ndarray) -> torch.Tensor:
        y = torch.from_numpy(buffer.labels[places].astype(np.int64))
        return F.cross_entropy(self.of_task(logits, buffer.tasks[places].astype(np.int64)), y)

    def divergence(self, logits: torch.Tensor, known: torch.Tensor, task: int) -> torch.Tensor:
        """Kullback-Leibler divergence from a snapshot's classes; of each earlier task's where the task is given."""
        groups = [sorted({label for each in self.stream.tasks[:task] for label in each.classes})]
        if self.stream.scenario == "task":
            groups = [list(each.classes) for each in self.stream.tasks[:task]]
        total = logits.new_zeros(())
        for group in groups:
            now, before = ((each[:, group] / TEMPERATURE).log_softmax(-1) for each in (logits, known))
            total = total + F.kl_div(now, before, log_target=True, reduction="batchmean") / len(groups)
        return TEMPERATURE**2 * total

    @torch.no_grad()
    def _known(self, snapshot: ContinualNetwork, x: torch.Tensor, tasks: np.ndarray) -> torch.Tensor:
        found: torch.Tensor = snapshot(x, self.tasks_of(snapshot, x, tasks))[0]
        return found


def mismatch(logits: torch.Tensor, kept: np.ndarray) -> torch.Tensor:
    """Mean squared distance from kept logits, of the classes known then."""
    wanted = torch.from_numpy(kept)[:, : logits.shape[1]]
    known = ~wanted.isnan()
    return torch.where(known, logits - wanted.nan_to_num(), 0.0).square().sum() / known.sum().clamp_min(1)
