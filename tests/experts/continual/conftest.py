"""Small networks, strategies and streams."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from experts.continual import (
    Expansion,
    NetworkShape,
    Penalty,
    Replay,
    Strategy,
    Stream,
    load,
)
from experts.continual.network import ContinualNetwork

SMALL = NetworkShape(trunk="linear", d_model=8, d_ff=4, num_experts=2, k=2)
QUICK = Strategy(epochs=1, batch_size=16, learning_rate=1e-2)
EVERYTHING = replace(
    QUICK, replay=Replay("balanced", 30, batch_size=8, logits=0.1), regularizer=Penalty("ewc", 1.0, samples=4),
    expansion=Expansion(3, similarity=1.0, merge=True), distillation=0.5, freezing=0.1, gate="domain", asymmetric=True,
    balance="sampling", shift=1, side=8, bits=4,
)  # fmt: skip


@pytest.fixture(scope="module")
def blobs() -> Stream:
    """Four tasks of two Gaussian classes each in six dimensions."""
    random = np.random.default_rng(0)
    centres = 3 * random.standard_normal((8, 6))

    def drawn(task: int, count: int) -> tuple[np.ndarray, np.ndarray]:
        labels = random.integers(2, size=count)
        return (centres[2 * task + labels] + random.standard_normal((count, 6))).astype(np.float32), labels

    return Stream.of_arrays(
        "blobs",
        [{"train": drawn(task, 96), "validation": drawn(task, 40), "test": drawn(task, 40)} for task in range(4)],
    )


@pytest.fixture(scope="module")
def digits() -> Stream:
    """A tenth of split digits."""
    whole = load("split-digits")
    tasks = [
        {split: (x[::10] if split == "train" else x, (y[::10] if split == "train" else y) - 2 * number)
         for split, (x, y) in task.splits.items()}
        for number, task in enumerate(whole.tasks)
    ]  # fmt: skip
    return Stream.of_arrays("few digits", tasks)


def network(num_experts: int = 3, k: int = 2, graph: str | None = None) -> ContinualNetwork:
    torch.manual_seed(0)
    shape = NetworkShape(trunk="linear", d_model=8, d_ff=4, num_experts=num_experts, k=k, graph=graph)
    made = ContinualNetwork((6,), 4, shape)
    made.add_task(torch.ones(8))
    return made
