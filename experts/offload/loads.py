"""What loading experts costs: measured on this machine's disk, or simulated for slower storage."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import cycle
from pathlib import Path
from typing import Any, get_args

import numpy as np

from cost import profile as profiles
from cost.energy import JOULES_PER_WEIGHT_BYTE
from cost.operations import Operation
from cost.profile import Profile
from experts import zoo
from experts.language.model import LanguageModel
from experts.offload.pool import ExpertPool
from experts.offload.store import ExpertFile, Weights, write

log = logging.getLogger("moe_envs")
# Simulated: seconds until an answer begins, bytes a second. Orders of magnitude of such devices, not measurements.
SLOW = {
    "simulated disk": (1e-4, 2e9),
    "simulated hard disk": (8e-3, 150e6),
    "simulated memory card": (1e-3, 40e6),
    "simulated network": (5e-4, 110e6),
}


def load_costs(storage: Operation | tuple[float, float], size: int, most: int) -> np.ndarray:
    """What loading 0 to `most` experts of `size` bytes at once costs, `[most + 1, 3]` in s, B and J: times as measured,
    or of a storage with a delay and a speed, one after the other; energy is a proxy, what the bytes take to be moved.
    """
    count = np.arange(most + 1)
    if isinstance(storage, tuple):
        delay, speed = storage
        seconds = count * (delay + size / speed)
    else:
        seconds = np.interp(count, [0, *storage.sizes], [0.0, *storage.median])
    return np.stack([seconds, count * size, count * size * JOULES_PER_WEIGHT_BYTE], axis=1)


def measure_loads(model: LanguageModel, most: int, progress: bool = False) -> Profile:
    """Measure loads of 1 to `most` experts of a layer at once, in each precision, by a pool that holds no more than
    these, from the disk of the user's cache; past the page cache, where the file system offers that."""
    (place := zoo.cache_folder()).mkdir(parents=True, exist_ok=True)
    folder = tempfile.TemporaryDirectory(prefix="moe-loads-", dir=place)
    with folder as name, _pools(model, Path(name), most) as pools:
        if not all(pool.file.direct for pool in pools.values()):
            log.warning("%s cannot be read past the page cache: loads are measured from memory", place)
        works = {f"load {weights}": _loads(pool) for weights, pool in pools.items()}
        return profiles.measure(works, sizes=range(1, most + 1), progress=progress)


@contextmanager
def _pools(model: LanguageModel, folder: Path, most: int) -> Iterator[dict[str, ExpertPool]]:
    blocks: Any = model.network.blocks
    layers, pools, files = [block.moe for block in blocks], dict[str, ExpertPool](), list[ExpertFile]()
    try:
        for weights in get_args(Weights):
            path = folder / f"{weights}.bin"
            write(path, layers, weights)
            files.append(ExpertFile(path))
            pools[weights] = ExpertPool(files[-1], most * files[-1].size(0, 0))
        yield pools
    finally:
        for pool in pools.values():
            pool.close()
        for file in files:
            file.close()


def _loads(pool: ExpertPool) -> Callable[[int], Callable[[], object]]:
    own = pool.file.header

    def work(count: int) -> Callable[[], object]:
        groups = cycle(
            (layer, [(first + each) % own.num_experts for each in range(count)])
            for layer in range(own.layers) for first in range(0, own.num_experts, count)
        )  # fmt: skip

        def run() -> None:
            layer, experts = next(groups)
            pool.take(layer, experts)

        return run

    return work
