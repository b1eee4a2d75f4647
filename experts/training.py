"""Training of the MoE classifier so that any subset of its experts works."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from rich.progress import Progress

from experts.graph import parameter_groups
from experts.losses import load_balancing_loss
from experts.model import MoEClassifier, mix
from experts.routers import random_subsets, top_k

Drive = Callable[[MoEClassifier], tuple[torch.optim.Optimizer, Callable[[int, float], object]]]


@dataclass(frozen=True, kw_only=True)
class TrainingSettings:
    """Of the batches, `top1_share` run the top-1 gate, `random_share` random subsets (expert dropout), others top-2.

    `graph` has the arguments of an `ExpertGraph`; `sparsity` is the weight of the L1 of its edges, which learn
    `edge_rate` times as fast as the rest.
    """

    widths: Sequence[int] = (4, 4, 8, 8, 16, 16, 32, 64)
    trunk: int = 0
    epochs: int = 5
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
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(settings.seed)
            return _train(torch.from_numpy(inputs), torch.from_numpy(labels), settings, progress, drive)
    finally:
        torch.set_num_threads(threads)


def _train(
    x: torch.Tensor, y: torch.Tensor, settings: TrainingSettings, progress: bool, drive: Drive | None
) -> MoEClassifier:
    generator = torch.Generator().manual_seed(settings.seed)
    num_classes = int(y.max()) + 1
    model = MoEClassifier(x.shape[1], num_classes, widths=settings.widths, trunk=settings.trunk, graph=settings.graph)
    optimizer, after_step = (drive or (lambda model: (_adam(model, settings), lambda step, loss: None)))(model)
    step = 0
    with Progress(disable=not progress) as bar:
        for _ in bar.track(range(settings.epochs), description="training the MoE"):
            for rows in torch.randperm(len(x), generator=generator).split(settings.batch_size):
                loss = _loss(model, x[rows], y[rows], settings, generator)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                step += 1
                after_step(step, loss.item())
    return model.eval()


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
