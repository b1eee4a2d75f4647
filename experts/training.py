"""Training of the MoE classifier so that any subset of its experts works."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from rich.progress import Progress

from experts.graph import parameter_groups
from experts.losses import load_balancing_loss
from experts.model import MoEClassifier, Standardize, mix
from experts.routers import random_subsets, top_k
from experts.threads import reproducible

Drive = Callable[[MoEClassifier], tuple[torch.optim.Optimizer, Callable[[int, float], object]]]


@dataclass(frozen=True, kw_only=True)
class TrainingSettings:
    """Of the batches, `top1_share` run the top-1 gate, `random_share` random subsets (expert dropout), others top-2.

    With `epochs=None`, an eighth of the inputs is held out, and the training ends when the loss on them has not fallen
    for `patience` epochs (of at least 25 steps), or after `max_steps`; the weights of the lowest loss are kept.
    `standardize` scales each input to mean 0 and variance 1 inside the model. `graph` has the arguments of an
    `ExpertGraph`; `sparsity` is the weight of the L1 of its edges, which learn `edge_rate` times as fast as the rest.
    """

    widths: Sequence[int] = (4, 4, 8, 8, 16, 16, 32, 64)
    trunk: int = 0
    standardize: bool = True
    epochs: int | None = None
    patience: int = 20
    max_steps: int = 20_000
    batch_size: int = 128
    learning_rate: float = 1e-3
    load_balancing: float = 0.1
    top1_share: float = 0.5
    random_share: float = 0.1
    random_max_size: int = 2
    graph: Mapping[str, Any] | None = None
    sparsity: float = 0.01
    edge_rate: float = 10.0
    seed: int = 0


def train(
    inputs: np.ndarray,
    labels: np.ndarray,
    settings: TrainingSettings,
    progress: bool = True,
    drive: Drive | None = None,
) -> MoEClassifier:
    """A classifier trained by Adam on inputs `[n, d]` float32 and labels `[n]`; the same bits for the same seed.

    `drive(model)` gives another optimiser, and what is called after each step with its number and its loss.
    """
    with reproducible(settings.seed):
        return _train(torch.from_numpy(inputs), torch.from_numpy(labels), settings, progress, drive)


def _train(
    x: torch.Tensor, y: torch.Tensor, settings: TrainingSettings, progress: bool, drive: Drive | None
) -> MoEClassifier:
    generator = torch.Generator().manual_seed(settings.seed)
    num_classes = int(y.max()) + 1
    model = MoEClassifier(
        x.shape[1], num_classes, widths=settings.widths, trunk=settings.trunk, graph=settings.graph,
        standardize=settings.standardize,
    )  # fmt: skip
    if settings.standardize:
        model.trunk[0].fit(x)  # type: ignore[operator]
    optimizer, after_step = (drive or (lambda model: (_adam(model, settings), lambda step, loss: None)))(model)
    stopping, rows_of_training = None, torch.arange(len(x))
    if settings.epochs is None:
        held_out, rows_of_training = torch.randperm(len(x), generator=generator).tensor_split([max(1, len(x) // 8)])
        stopping = _Stopping(model, x[held_out], y[held_out], settings)
    step, last = 0, settings.epochs or settings.max_steps
    with Progress(disable=not progress) as bar:
        task = bar.add_task("training the MoE", total=last)
        for epoch in count(1):
            for rows in _batches(rows_of_training, settings, generator):
                loss = _loss(model, x[rows], y[rows], settings, generator)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                step += 1
                after_step(step, loss.item())
            done = epoch if stopping is None else step
            bar.update(task, completed=done)
            if done >= last or (stopping and stopping.look(step)):
                break
    if stopping:
        stopping.restore()
    return model.eval()


def _batches(rows: torch.Tensor, settings: TrainingSettings, generator: torch.Generator) -> tuple[torch.Tensor, ...]:
    """Rows of one epoch in random order; smaller batches for few inputs, if the end is not set by `epochs`."""
    size = settings.batch_size if settings.epochs else min(settings.batch_size, max(8, len(rows) // 16))
    return rows[torch.randperm(len(rows), generator=generator)].split(size)


class _Stopping:
    """Keeps the weights of the lowest held-out loss, the mean of those of the top-1 and of the top-2 gate."""

    def __init__(self, model: MoEClassifier, x: torch.Tensor, y: torch.Tensor, settings: TrainingSettings) -> None:
        self.model, self.x, self.y, self.settings = model, x, y, settings
        self.lowest, self.looks, self.step = float("inf"), 0, 0
        self.weights: dict[str, torch.Tensor] = {}

    def look(self, step: int) -> bool:
        """Measure the loss, at most each 25 steps; returns whether to stop."""
        if step - self.step < 25:
            return False
        self.step = step
        self.model.eval()
        with torch.no_grad():
            loss = sum(float(F.cross_entropy(self.model(self.x, k=k), self.y)) for k in (1, 2))
        self.model.train()
        self.looks += 1
        if loss < self.lowest:
            self.lowest, self.looks = loss, 0
            self.weights = {name: value.clone() for name, value in self.model.state_dict().items()}
        return self.looks >= self.settings.patience

    def restore(self) -> None:
        """Set the kept weights."""
        self.model.load_state_dict(self.weights or self.model.state_dict())


def _adam(model: MoEClassifier, settings: TrainingSettings) -> torch.optim.Optimizer:
    return torch.optim.Adam(parameter_groups(model, settings.learning_rate, settings.edge_rate))


def _loss(
    model: MoEClassifier, x: torch.Tensor, y: torch.Tensor, settings: TrainingSettings, generator: torch.Generator
) -> torch.Tensor:
    h = model.trunk(x)
    gate = model.gate(h)
    draw = float(torch.rand((), generator=generator))
    if draw < settings.random_share:
        members = random_subsets(gate, min(settings.random_max_size, gate.shape[1]), generator)
    else:
        k = 1 if draw < settings.random_share + settings.top1_share else 2
        members = top_k(gate, min(k, gate.shape[1]))
    loss = F.cross_entropy(mix(gate, model.experts(h), members, model.graph), y)
    loss = loss + settings.load_balancing * load_balancing_loss(gate, members)
    return loss if model.graph is None else loss + settings.sparsity * model.graph.sparsity_loss()


def linear_model(inputs: np.ndarray, labels: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
    """A logistic regression on standardised inputs, to judge a model by; returns its classes for other inputs."""
    x, y, scaling = torch.from_numpy(inputs), torch.from_numpy(labels), Standardize(inputs.shape[1])
    scaling.fit(x)
    scaled, weights = scaling(x), torch.zeros(x.shape[1] + 1, int(y.max()) + 1, requires_grad=True)
    optimizer = torch.optim.LBFGS([weights], max_iter=200, line_search_fn="strong_wolfe")

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(scaled @ weights[1:] + weights[0], y) + 0.5 / len(y) * weights[1:].square().sum()
        loss.backward()
        return loss

    with reproducible(0):
        optimizer.step(closure)
    found = weights.detach()
    return lambda more: (scaling(torch.from_numpy(more)) @ found[1:] + found[0]).argmax(1).numpy()
