"""Fine-tuning under a plan: each step runs the decompressed weights and updates the full weights.

Straight-through estimation (Bengio et al. 2013); low-rank matrices are projected at each refresh. The
targets are the labels and the uncompressed model (Hinton et al. 2015).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from rich.progress import Progress
from threadpoolctl import threadpool_limits
from torch import nn
from torch.func import functional_call

from experts.compression import LEVELS, compress, effective
from experts.compression.pieces import Piece, pieces
from experts.compression.plan import Plan


@dataclass(frozen=True, kw_only=True)
class FinetuneSettings:
    """AdamW with one cycle of the rate up to `rate`; `alpha` is the share of the uncompressed model in the targets, at
    `temperature`. Quantised forms are searched anew every `refresh` steps."""

    steps: int = 400
    batch_size: int = 128
    rate: float = 1e-3
    alpha: float = 0.9
    temperature: float = 2.0
    refresh: int = 1
    seed: int = 0


def finetune(
    model: nn.Module,
    plan: Plan,
    inputs: np.ndarray,
    labels: np.ndarray,
    settings: FinetuneSettings | None = None,
    importance: Mapping[str, np.ndarray] | None = None,
    augment: Callable[[torch.Tensor], torch.Tensor] = lambda x: x,
    progress: bool = True,
    teacher: nn.Module | None = None,
) -> nn.Module:
    """Return a copy of the model fine-tuned for the plan; compress it by `plan.compress`.

    The targets are those of `teacher`, of the model itself where there is none. One thread: matrices are small.
    """
    settings = settings or FinetuneSettings()
    student, teacher = copy.deepcopy(model).train(), (teacher or model).eval()
    x, y = torch.from_numpy(inputs), torch.from_numpy(labels)
    optimizer = torch.optim.AdamW(student.parameters(), settings.rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, settings.rate, total_steps=settings.steps)
    generator = torch.Generator().manual_seed(settings.seed)
    forms = _Forms(student, plan, importance)
    with Progress(disable=not progress) as bar, torch.random.fork_rng(devices=[]), threadpool_limits(1):
        torch.manual_seed(settings.seed)  # what `augment` draws by
        for step in bar.track(range(settings.steps), description="fine-tuning under the plan"):
            rows = torch.randint(len(x), (settings.batch_size,), generator=generator)
            seen = augment(x[rows])
            if step % settings.refresh == 0:
                forms.refresh()
            logits = functional_call(student, forms.parameters(), (seen,))
            with torch.no_grad():
                wanted = teacher(seen)
            optimizer.zero_grad()
            _loss(logits, wanted, y[rows], settings).backward()
            optimizer.step()
            schedule.step()
    return student.eval()


def _loss(logits: torch.Tensor, wanted: torch.Tensor, labels: torch.Tensor, settings: FinetuneSettings) -> torch.Tensor:
    warm = settings.temperature
    soft = F.kl_div(
        (logits / warm).log_softmax(1), (wanted / warm).log_softmax(1), log_target=True, reduction="batchmean"
    )
    return settings.alpha * warm**2 * soft + (1 - settings.alpha) * F.cross_entropy(logits, labels)


class _Forms:
    """The parameters of a model as its plan decompresses them, with gradients straight through to its own."""

    def __init__(self, model: nn.Module, plan: Plan, importance: Mapping[str, np.ndarray] | None) -> None:
        self.model, self.plan, self.importance = model, plan, importance
        self.shadow = copy.deepcopy(model)  # holds what is decompressed

    def refresh(self) -> None:
        """Compress the weights as they are now."""
        own: dict[str, Piece] = pieces(self.model)
        for name, piece in pieces(self.shadow).items():
            known = None if self.importance is None else self.importance[name]
            weights, level = own[name].read(), self.plan.levels[name]
            if project := LEVELS[effective(piece.shape, level)].project:
                weights = project(weights, known)
                own[name].write(weights)
            piece.write(compress(weights, level, known).weights)

    def parameters(self) -> dict[str, torch.Tensor]:
        """By name: the decompressed values, whose gradients are those of the weights."""
        decompressed = dict(self.shadow.named_parameters())
        of_pieces = {piece.view().untyped_storage().data_ptr() for piece in pieces(self.shadow).values()}
        return {
            name: own + (decompressed[name] - own).detach()
            for name, own in self.model.named_parameters()
            if decompressed[name].untyped_storage().data_ptr() in of_pieces
        }
