"""Reproducible torch: one thread, which is also fastest for small networks, and a seeded generator."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from cost.timing import torch_threads


@contextmanager
def reproducible(seed: int) -> Iterator[None]:
    """Use one torch thread and torch's generator from a seed, and restore both afterwards."""
    with torch_threads(1), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield
