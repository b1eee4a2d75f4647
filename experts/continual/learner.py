"""Learn a stream, task after task, by any combination of the mechanisms of a `Strategy`.

What is drawn in a step depends on the seed and the number of the step alone, so a run that was interrupted goes on
exactly.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from experts.continual.buffer import Buffer
from experts.continual.inputs import Encoding
from experts.continual.network import ContinualNetwork
from experts.continual.objective import Memory, Objective
from experts.continual.penalties import Importance
from experts.continual.result import Curves, Result, as_content
from experts.continual.strategy import NetworkShape, Strategy
from experts.continual.stream import Stream, StreamBatch, steps_of

USED = 0.5  # times an even share: the load from which on an expert counts as used by a task
CLIP = 5.0
LOOKED_AT = 512  # inputs of a new task, for its signature
REMEMBERED = 2048  # inputs of a task that has been learned, for what is kept of it
AT_ONCE = 512  # inputs that are evaluated together; more do not fit the cache
Control = Callable[[int, Strategy], Strategy]


class StreamLearner:
    """State of a run: after `task` whole tasks and `step` steps of the present one."""

    def __init__(
        self, stream: Stream, strategy: Strategy, seed: int, shape: NetworkShape, split: str = "test",
        control: Control | None = None, scratch: bool = False,
    ) -> None:  # fmt: skip
        self.stream, self.whole, self.seed, self.shape = stream, strategy, seed, shape
        self.split, self.control, self.scratch = split, control, scratch
        self.encoding = Encoding(stream.shape, strategy.side, strategy.bits)
        self.task, self.step, self.begun = 0, 0, False
        self.buffer = Buffer(strategy.replay, stream.num_classes) if strategy.replay else None
        self.importance = Importance(strategy.regularizer) if strategy.regularizer else None
        self.snapshot: ContinualNetwork | None = None
        self.network = self._new_network(0)
        self.loads_TE: np.ndarray = np.zeros((0, shape.num_experts))  # of earlier tasks, when they ended
        self.slow_E: np.ndarray = np.zeros(shape.num_experts, bool)  # experts that learn at the rate of `freezing`
        self.chosen: list[dict[str, Any]] = []  # strategies of the tasks so far
        self.curves = Curves()
        self.seconds = 0.0
        self.take(strategy)

    def take(self, strategy: Strategy) -> None:
        """Set the strategy of the present task; raises `ValueError` if it changes what is kept."""
        if _fixed(strategy) != _fixed(self.whole):
            raise ValueError(
                f"the control changed what is kept in task {self.task}: {_fixed(strategy)}, not {_fixed(self.whole)}"
            )
        if strategy.gate == "task" and self.stream.scenario != "task":
            raise ValueError(
                f"gate='task' needs the task at test: the scenario is {self.stream.scenario!r}, use gate='domain'"
            )
        if strategy.expansion and strategy.expansion.budget < self.shape.num_experts:
            budget, count = strategy.expansion.budget, self.shape.num_experts
            raise ValueError(f"expansion.budget={budget}: the network begins with {count} experts")
        self.strategy = strategy
        self.objective = Objective(self.stream, strategy, self.encoding)
        if self.importance and strategy.regularizer:
            self.importance.settings = strategy.regularizer

    def choice(self, task: int) -> Strategy:
        """The strategy of a task."""
        return self.whole if self.control is None else self.control(task, self.whole)

    def run(self, progress: Callable[[float, str], object], save: Callable[[], None], save_every: int) -> None:
        """Learn from the present state to the end."""
        while self.task < len(self.stream.tasks):
            began = time.perf_counter() - self.seconds
            if not self.begun:
                self.begin()
            for batch in self._batches():
                self._learn(batch)
                self.step += 1
                self.seconds = time.perf_counter() - began
                if self.step % save_every == 0:
                    save()
            self._end()
            self.seconds = time.perf_counter() - began
            self._judge()
            self.task, self.step, self.begun, self.seconds = self.task + 1, 0, False, 0.0
            save()
            progress(self.task / len(self.stream.tasks), f"accuracy {self.curves.latest(self.task):.3f}")

    def result(self) -> Result:
        """The result of a run that has ended."""
        return self.curves.result(self.stream, self.seed, self.split, self.scratch)

    def begin(self) -> None:
        """Grow the network for a task, before its first step."""
        self.take(self.choice(self.task))
        self.chosen.append(as_content(self.strategy))
        if not self.only:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(self._drawn(1))
                self._grow()
        self.optimizer = self.new_optimizer()
        self.begun = True

    @property
    def only(self) -> bool:
        """Whether tasks only fill the replay."""
        return self.strategy.replay is not None and self.strategy.replay.only

    def _grow(self) -> None:
        strategy, network = self.strategy, self.network
        self.snapshot = None
        if strategy.distillation and self.task:
            self.snapshot = copy.deepcopy(network).requires_grad_(False)
        network.add_classes(self.classes(self.task))
        x = self._some_inputs(LOOKED_AT)
        with torch.no_grad():
            signature_D = network.features(x).mean(0)
        similar = None
        if strategy.expansion and self.task:
            cosine_T = F.cosine_similarity(network.signatures, signature_D[None])
            similar = int(cosine_T.argmax())
            if float(cosine_T[similar]) < strategy.expansion.similarity:
                similar = None
                self._expand(x)
        used_TE = self.loads_TE >= USED / network.num_experts
        self.slow_E = np.asarray(used_TE.any(0))
        if similar is not None:
            self.slow_E &= ~used_TE[similar]
        network.add_task(signature_D)

    def _expand(self, x: torch.Tensor) -> None:
        """Add an expert for inputs such as these, within the budget."""
        expansion = self.strategy.expansion
        assert expansion is not None
        if self.network.num_experts >= expansion.budget:
            if not expansion.merge or self.network.num_experts < 2:
                return
            self._merge(x)
        self.network.open(self.network.add_expert(), x)
        self.loads_TE = np.pad(self.loads_TE, ((0, 0), (0, 1)))

    def _merge(self, x: torch.Tensor) -> None:
        """Make the two experts one that are most alike."""
        alike_EE = self.network.likeness(x).fill_diagonal_(-torch.inf)
        one, other = sorted(divmod(int(alike_EE.argmax()), len(alike_EE)))
        self.network.merge(one, other, torch.from_numpy(self.loads_TE).mean(0))
        self.loads_TE[:, one] += self.loads_TE[:, other]
        self.loads_TE = np.delete(self.loads_TE, other, 1)
        if self.importance:
            self.importance.merge(one, other, self.network)

    def _batches(self) -> Iterator[StreamBatch]:
        """The batches of the task from the present step on; inputs that are only kept come once."""
        per_epoch = self.per_epoch(self.task)
        for epoch in range(self.step // per_epoch, 1 if self.only else self.strategy.epochs):
            skipped = max(0, self.step - epoch * per_epoch)
            batches = self.stream.batches(self.task, self.strategy.batch_size, seed=self.seed, epoch=epoch)
            yield from (batch for number, batch in enumerate(batches) if number >= skipped)

    def _learn(self, batch: StreamBatch) -> None:
        """One step, which also offers its inputs to the replay."""
        random = np.random.default_rng([self.seed, self.number()])
        rows, logits = self.encoding.encode(batch.inputs), None
        if not self.only:
            memory = Memory(self.buffer, self.importance, self.snapshot)
            loss, logits = self.objective.new(self.network, memory, rows, batch.labels, batch.task, random)
            if self.step < self.per_epoch(self.task):
                own = self.objective.of_task(logits, batch.task, masked=self.stream.scenario != "domain")
                self.curves.count(own, batch.labels)
            self._descend(self.optimizer, loss, 1 - self.step / self.steps(self.task))
        self._offer(rows, batch, random, logits)

    def _offer(
        self, rows: np.ndarray, batch: StreamBatch, random: np.random.Generator, logits: torch.Tensor | None
    ) -> None:
        """Offer inputs to the replay, once a task."""
        replay = self.strategy.replay
        if self.buffer is None or replay is None or not replay.keep:
            return
        late = replay.late or replay.confident > 0
        if self.step // self.per_epoch(self.task) != (self.strategy.epochs - 1 if late else 0):
            return
        kept = np.ones(len(rows), np.bool_)
        if replay.confident:
            assert logits is not None
            own = self.objective.of_task(logits, batch.task, masked=self.stream.scenario != "domain").softmax(1)
            kept = (own.gather(1, torch.from_numpy(batch.labels)[:, None]) >= replay.confident)[:, 0].numpy()
        self.buffer.add(
            rows[kept], batch.labels[kept], batch.task, random, None if logits is None else logits.numpy()[kept]
        )

    def _descend(self, optimizer: torch.optim.Optimizer, loss: torch.Tensor, rate: float) -> None:
        for group in optimizer.param_groups:
            group["lr"] = group["share"] * self.strategy.learning_rate * rate
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.network.parameters(), CLIP)
        optimizer.step()

    @torch.no_grad()
    def _end(self) -> None:
        """Compute what is kept of a task that has been learned."""
        if self.only:
            self._retrain()
            return
        x = self._some_inputs(REMEMBERED)
        self.network.signatures[self.task] = self.network.features(x).mean(0)
        tasks_BT = self.objective.tasks_of(self.network, x, self.task)
        if self.importance:
            generator = torch.Generator().manual_seed(self.number())
            with torch.enable_grad():
                self.importance.update(
                    self.network, x, tasks_BT, generator, lambda logits: self.objective.of_task(logits, self.task)
                )
        load_E = self.network(x, tasks_BT)[1].load.double().numpy()
        self.loads_TE = np.concatenate([self.loads_TE, load_E[None]])

    @torch.enable_grad()
    def _retrain(self) -> None:
        """Train a new network on what is kept, in as many steps as all tasks so far had."""
        assert self.buffer is not None
        if not len(self.buffer):
            return
        random = np.random.default_rng([self.seed, self.number(), 1])
        self.network = self._new_network(self.task)
        optimizer, steps = self.new_optimizer(), sum(self.steps(task) for task in range(self.task + 1))
        for step in range(steps):
            self._descend(optimizer, self.objective.kept(self.network, self.buffer, random), 1 - step / steps)

    def _judge(self) -> None:
        """Measure accuracies, use of experts, bytes and time after a task."""
        accuracy, loads = np.full(len(self.stream.tasks), np.nan), []
        for number in range(self.task + 1):
            accuracy[number], load_E = self._evaluate(number)
            loads.append(load_E.tolist())
        parameters = sum(weights.numel() for weights in self.network.parameters())
        others = [part.nbytes for part in (self.buffer, self.importance) if part is not None]
        self.curves.append(
            accuracy=accuracy.tolist(), expert_load=loads, parameters=parameters,
            bytes_after=4 * parameters + self.network.signatures.nbytes + sum(others),
            experts=self.network.num_experts, seconds=self.seconds,
        )  # fmt: skip
        if self.scratch:
            self.curves.scratch.append(self._from_scratch())

    @torch.no_grad()
    def _evaluate(self, number: int) -> tuple[float, np.ndarray]:
        """Accuracy on a task, and the share of its choices by expert `[E]`."""
        labels, right, loads = self.stream.tasks[number][self.split][1], 0, []
        for start in range(0, len(labels), AT_ONCE):
            x = self._inputs(self.split, number, slice(start, start + AT_ONCE))
            logits, statistics = self.network(x, self.objective.tasks_of(self.network, x, number))
            guesses = self.objective.of_task(logits, number).argmax(1).numpy()
            right += int((guesses == labels[start : start + AT_ONCE]).sum())
            loads.append(statistics.load.numpy() * len(x))
        return right / len(labels), np.sum(loads, 0) / len(labels)

    def _from_scratch(self) -> list[float]:
        """Online accuracy and accuracy of a new network on this task alone."""
        task = self.stream.tasks[self.task]
        moved = {split: (x, np.searchsorted(np.sort(task.classes), y)) for split, (x, y) in task.splits.items()}
        stream = Stream.of_arrays(task.name, [moved], names=[task.name])
        plain = replace(self.strategy, replay=None, regularizer=None, expansion=None, distillation=0.0, gate="input",
                        balance="none")  # fmt: skip
        other = StreamLearner(stream, plain, self.seed, self.shape, self.split)
        other.run(lambda share, text: None, lambda: None, 10**9)
        return [other.curves.online[0], other.curves.accuracy[0][0]]

    def _some_inputs(self, count: int) -> torch.Tensor:
        """A random part of the present task's training inputs."""
        inputs, _ = self.stream.tasks[self.task]["train"]
        rows = np.random.default_rng([self.seed, self.task, count]).permutation(len(inputs))[:count]
        return self.objective.inputs(self.encoding.encode(inputs[rows]))

    def _inputs(self, split: str, number: int, rows: slice) -> torch.Tensor:
        return self.objective.inputs(self.encoding.encode(self.stream.tasks[number][split][0][rows]))

    def _new_network(self, task: int) -> ContinualNetwork:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self._drawn(0))
            return ContinualNetwork(self.encoding.decoded, self.classes(task), self.shape)

    def _drawn(self, use: int) -> int:
        """A seed for first weights of this task."""
        return int(np.random.SeedSequence([self.seed, self.task, use]).generate_state(1)[0])

    def new_optimizer(self) -> torch.optim.Optimizer:
        """All weights in groups by their share of the learning rate."""
        slow_E = np.zeros(self.network.num_experts, bool) if self.only else self.slow_E
        slow = {
            id(weights) for expert, is_slow in zip(self.network.moe.experts, slow_E, strict=True) if is_slow
            for weights in expert.parameters()
        }  # fmt: skip
        every = list(self.network.parameters())
        groups = [
            {"params": [each for each in every if (id(each) in slow) == is_slow], "share": share}
            for is_slow, share in ((False, 1.0), (True, self.strategy.freezing))
        ]
        groups = [group for group in groups if group["params"]]
        if self.strategy.optimizer == "sgd":
            return torch.optim.SGD(groups, lr=self.strategy.learning_rate, momentum=0.9)
        return torch.optim.AdamW(groups, lr=self.strategy.learning_rate, weight_decay=1e-4, fused=True)

    def classes(self, task: int) -> int:
        """Classes of the head in a task."""
        return self.stream.num_classes if self.whole.all_classes else self.stream.classes_until(task)

    def per_epoch(self, task: int) -> int:
        """Steps of an epoch of a task."""
        return steps_of(len(self.stream.tasks[task]["train"][1]), self.strategy.batch_size)

    def steps(self, task: int) -> int:
        """Steps of a task."""
        return self.strategy.epochs * self.per_epoch(task)

    def number(self) -> int:
        """A number of this step that no other step has."""
        return self.task * 10**7 + self.step


def _fixed(strategy: Strategy) -> dict[str, object]:
    """What must not change between tasks."""
    replay, penalty = strategy.replay, strategy.regularizer
    return {
        "side": strategy.side, "bits": strategy.bits, "all_classes": strategy.all_classes,
        "regularizer": None if penalty is None else penalty.kind,
        "replay": None if replay is None else (replay.kind, replay.size, replay.only, bool(replay.logits)),
    }  # fmt: skip
