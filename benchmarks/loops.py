"""Plain torch trainings of several models on real data, to compare what sets their learning rate."""

from __future__ import annotations

import sysconfig
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from benchmarks.experiments.unseen import sources
from experts import data
from experts.model import MoEClassifier

VALIDATED, TESTED, CONTEXT, TEXT = 1_000, 5_000, 64, 4_000_000  # inputs; bytes of a text's window, and of all texts
PACKAGED = {**sources.SEEN, **sources.UNSEEN}
CHECKS, WORST = 45, 100.0  # validations in a training; the loss of one that diverges


class Loop(NamedTuple):
    """A training: `model` on `data`, inputs times `scale`. With `shift`, the first half of the steps sees half of the
    classes only; with `growing`, the batch is four times larger in the second half."""

    model: str
    data: str
    optimizer: str
    scale: float
    steps: int
    batch_size: int
    shift: bool = False
    growing: bool = False


LOOPS = {
    "MoE, Fashion-MNIST, AdamW": Loop("moe", "fashion-mnist", "adamw", 1.0, 600, 128),
    "MoE, Fashion-MNIST x 10, SGD": Loop("moe", "fashion-mnist", "sgd", 10.0, 600, 128),
    "MLP, Fashion-MNIST x 0.1, AdamW": Loop("mlp", "fashion-mnist", "adamw", 0.1, 600, 128),
    "MLP, Fashion-MNIST, SGD": Loop("mlp", "fashion-mnist", "sgd", 1.0, 600, 128),
    "CNN, Fashion-MNIST, AdamW": Loop("cnn", "fashion-mnist", "adamw", 1.0, 400, 64),
    "CNN, Fashion-MNIST x 0.1, SGD": Loop("cnn", "fashion-mnist", "sgd", 0.1, 400, 64),
    "MLP, digits x 10, AdamW": Loop("mlp", "digits", "adamw", 10.0, 300, 32),
    "MoE, digits, SGD": Loop("moe", "digits", "sgd", 1.0, 300, 32),
    "MoE, digits x 0.1, AdamW": Loop("moe", "digits", "adamw", 0.1, 300, 32),
    "transformer, text, AdamW": Loop("transformer", "text", "adamw", 1.0, 2_000, 16),
    "MLP, letter, AdamW": Loop("mlp", "letter", "adamw", 1.0, 600, 64),
    "MLP, MNIST-1D, SGD": Loop("mlp", "mnist1d", "sgd", 1.0, 600, 64),
}
HELD_OUT = {  # nothing was chosen by these, though a first table was seen before AutoRate's last change
    "CNN, MNIST-5k, SGD": Loop("cnn", "mnist-5k", "sgd", 1.0, 400, 32),
    "MLP, satimage x 10, AdamW": Loop("mlp", "satimage", "adamw", 10.0, 400, 32),
    "MoE, texture x 0.1, SGD": Loop("moe", "texture", "sgd", 0.1, 400, 32),
    "MoE, magic, AdamW": Loop("moe", "magic", "adamw", 1.0, 600, 64),
}
CHANGING = {
    "new classes in mid-run, AdamW": Loop("mlp", "fashion-mnist", "adamw", 1.0, 600, 128, shift=True),
    "new classes in mid-run, SGD": Loop("mlp", "fashion-mnist", "sgd", 1.0, 600, 128, shift=True),
    "growing batch, AdamW": Loop("mlp", "fashion-mnist", "adamw", 1.0, 600, 32, growing=True),
    "growing batch, SGD": Loop("mlp", "fashion-mnist", "sgd", 1.0, 600, 32, growing=True),
}


class Parts(NamedTuple):
    """Inputs and labels to train, validate and test on."""

    train: tuple[torch.Tensor, torch.Tensor]
    validation: tuple[torch.Tensor, torch.Tensor]
    test: tuple[torch.Tensor, torch.Tensor]


class Driver(NamedTuple):
    """What sets a training's learning rate: the optimiser, a callback with each training loss after its step, and one
    at the end, which restores the best state if it `keeps_best`."""

    optimizer: torch.optim.Optimizer
    after_step: Callable[[torch.Tensor], object]
    finish: Callable[[], object] = lambda: None
    keeps_best: bool = False


Drive = Callable[[nn.Module, Loop, Callable[[], float]], Driver]


@cache
def parts(name: str, scale: float) -> Parts:
    """The data of a loop, standardised and then scaled."""
    if name == "text":
        return _text()
    if name in PACKAGED:
        all_inputs, labels = PACKAGED[name]()
        order = np.random.default_rng(0).permutation(len(labels))
        held_out = min(VALIDATED, len(labels) // 10)
        validation, test, rows = np.split(order, [held_out, min(5 * VALIDATED, len(labels) // 3)])
    else:
        found = data.load(name)
        all_inputs, labels, splits = found.inputs, found.labels, found.splits
        rows, validation = np.concatenate([splits["train"], splits["rl_train"]]), splits["validation"][:VALIDATED]
        test = splits["test"][:TESTED]
    mean, deviation = float(all_inputs[rows].mean()), float(all_inputs[rows].std())

    def part(indices: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        inputs = (all_inputs[indices] - mean) / deviation * scale
        return torch.from_numpy(inputs.astype(np.float32)), torch.from_numpy(labels[indices])

    return Parts(part(rows), part(validation), part(test))


def _text() -> Parts:
    """Windows of bytes of Python's own modules; whole files are held out."""
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    order = np.random.default_rng(0).permutation(len(files))
    shares = np.array_split(order, [int(0.8 * len(order)), int(0.9 * len(order))])
    found = []
    for place, share in enumerate(shares):
        text = b"".join(files[file].read_bytes() for file in share)[:TEXT]
        raw = np.frombuffer(text, dtype=np.uint8).astype(np.int64)
        starts = np.arange(0, len(raw) - CONTEXT - 1, CONTEXT)
        if place:
            starts = np.random.default_rng(place).permutation(starts)[: (64, 256)[place - 1]]
        windows = torch.from_numpy(raw[starts[:, None] + np.arange(CONTEXT + 1)])
        found.append((windows[:, :-1], windows[:, 1:]))
    return Parts(*found)


class SmallTransformer(nn.Module):
    """A small causal transformer on bytes."""

    def __init__(self, width: int = 64, layers: int = 2, heads: int = 4) -> None:
        super().__init__()
        self.embedding, self.places = nn.Embedding(256, width), nn.Parameter(torch.zeros(CONTEXT, width))
        layer = nn.TransformerEncoderLayer(width, heads, 4 * width, 0.0, batch_first=True, norm_first=True)
        self.layers = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
        self.head = nn.Linear(width, 256)
        self.register_buffer("mask", nn.Transformer.generate_square_subsequent_mask(CONTEXT), persistent=False)

    def forward(self, bytes_BT: torch.Tensor) -> torch.Tensor:
        """Logits `[B, 256, T]` of the next byte."""
        hidden = self.embedding(bytes_BT) + self.places
        found: torch.Tensor = self.head(self.layers(hidden, mask=self.mask, is_causal=True)).transpose(1, 2)
        return found


def model_of(loop: Loop) -> nn.Module:
    """A fresh model, from torch's generator."""
    if loop.model == "transformer":
        return SmallTransformer()
    found = parts(loop.data, loop.scale).train
    inputs, classes = found[0].shape[1], int(found[1].max()) + 1
    if loop.model == "moe":
        return MoEClassifier(inputs, classes, widths=(64,) * 8 if loop.data == "fashion-mnist" else (16,) * 4)
    if loop.model == "mlp":
        return nn.Sequential(nn.Linear(inputs, 128), nn.ReLU(), nn.Linear(128, classes))
    return nn.Sequential(
        nn.Unflatten(1, (1, 28, 28)), nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(8, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(784, classes),
    )  # fmt: skip


def run(loop: Loop, drive: Drive, seed: int) -> dict[str, Any]:
    """Train once; returns test and validation loss of the state with the lowest validation loss of `CHECKS`, and the
    CPU seconds of all, of the validations and of what sets the rate."""
    found = parts(loop.data, loop.scale)
    torch.manual_seed(seed)
    model, spent = model_of(loop), {"validation": 0.0, "driver": 0.0}

    def validation() -> float:
        begun = time.process_time()
        loss = _loss_on(model, found.validation)
        spent["validation"] += time.process_time() - begun
        return loss

    first, begun = _loss_on(model, found.validation), time.process_time()
    driver = drive(model, loop, validation)
    spent["driver"] += time.process_time() - begun
    best, kept, checks = np.inf, None, set(np.linspace(0, loop.steps, CHECKS + 1).round().astype(int)[1:].tolist())
    for step, rows in enumerate(_batches(loop, found.train[1], seed)):
        loss = F.cross_entropy(model(found.train[0][rows]), found.train[1][rows])
        driver.optimizer.zero_grad()
        loss.backward()
        driver.optimizer.step()
        before = time.process_time()
        driver.after_step(loss.detach())
        spent["driver"] += time.process_time() - before
        if step + 1 in checks and not driver.keeps_best:
            _switch(driver.optimizer, "eval")
            if (now := validation()) < best:
                best, kept = now, {name: each.clone() for name, each in model.state_dict().items()}
            _switch(driver.optimizer, "train")
    driver.finish()
    if driver.keeps_best:
        _switch(driver.optimizer, "eval")
        best = validation()
    elif kept is not None:
        model.load_state_dict(kept)
    test = _loss_on(model, found.test)
    failed = not (np.isfinite(test) and best < first)
    return {
        "test": min(test, WORST) if np.isfinite(test) else WORST, "validation": min(best, WORST), "failed": failed,
        "seconds": time.process_time() - begun, "in_validation": spent["validation"], "in_driver": spent["driver"],
    }  # fmt: skip


def _switch(optimizer: torch.optim.Optimizer, mode: str) -> None:
    """Schedule-Free's optimisers hold other weights in training than in use."""
    getattr(optimizer, mode, lambda: None)()


def _batches(loop: Loop, labels: torch.Tensor, seed: int) -> Any:
    generator, order, rows = torch.Generator().manual_seed(seed), torch.zeros(0, dtype=torch.int64), labels
    for step in range(loop.steps):
        late = 2 * step >= loop.steps
        size = loop.batch_size * (4 if loop.growing and late else 1)
        if len(order) < size or (loop.shift and 2 * step == loop.steps):
            order = torch.randperm(len(labels), generator=generator)
            if loop.shift and not late:
                order = order[labels[order] < 5]
        rows, order = order[:size], order[size:]
        yield rows


@torch.no_grad()
def _loss_on(model: nn.Module, part: tuple[torch.Tensor, torch.Tensor]) -> float:
    model.eval()
    loss = float(F.cross_entropy(model(part[0]), part[1]))
    model.train()
    return loss
