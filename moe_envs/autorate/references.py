"""What each context is compared with: the best of eight cosine schedules, and the rate that a range test finds."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
from filelock import FileLock

from cost.files import read_arrays, sealed, write_bytes
from experts import tasks
from experts.data import DataError
from experts.tasks import Task
from experts.zoo import cache_folder
from moe_envs.autorate.signals import DIVERGED, cosine, found_rate, sweep_rates
from moe_envs.autorate.trainings import CONTEXTS, SPLITS, Trainings, draw
from moe_envs.core.threads import one_thread

VERSION = 1
RATES = {False: np.geomspace(1e-4, 0.3, 8), True: np.geomspace(1e-3, 3.0, 8)}  # of AdamW, of SGD
CHUNK = 16  # contexts at once
LARGEST = 1e6  # loss or rate in a file
SHIPPED = tuple((name, 10, 32) for name in tasks.SHIPPED)
log = logging.getLogger("moe_envs")


class References(NamedTuple):
    """Of each context, `[contexts]`: validation loss before the training, judged loss and rate of the best cosine, and
    the rate that a range test finds."""

    first: np.ndarray
    judged: np.ndarray
    tuned: np.ndarray
    found: np.ndarray


def load(task: Task, steps: int, batch_size: int, split: str) -> References:
    """The references of a split; those that are not shipped are computed once, which takes a minute or more."""
    path = shipped_path(task.name, steps, batch_size)
    if (task.name, steps, batch_size) not in SHIPPED or not path.exists():
        name = f"{task.name}-{task.sha256[:12]}-{steps}-{batch_size}-{VERSION}.safetensors"
        path = cache_folder() / "autorate" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{path}.lock"):  # one process computes, the others wait and read
            if not path.exists():
                log.warning("training the references of %r, %s steps a decision, into %s", task.name, steps, path)
                save(task, steps, batch_size, path)
    return _read(path, _settings(task, steps, batch_size))[split]


def shipped_path(name: str, steps: int = 10, batch_size: int = 32) -> Path:
    """Path of the references of a shipped task."""
    return tasks.FOLDER / f"{name}.autorate-{steps}-{batch_size}.safetensors"


def _settings(task: Task, steps: int, batch_size: int) -> str:
    """What references are of."""
    return f"{task.sha256} {steps} {batch_size} {VERSION}"


def save(
    task: Task, steps: int, batch_size: int, path: Path, report: Callable[[float], object] = lambda share: None
) -> None:
    """Compute the references of all splits and write them."""
    from safetensors.numpy import save as to_bytes

    arrays: dict[str, np.ndarray] = {}
    for number, split in enumerate(SPLITS):
        found = compute(task, steps, batch_size, split)
        arrays |= {f"{split}/{name}": value for name, value in found._asdict().items()}
        report((number + 1) / len(SPLITS))
    write_bytes(path, to_bytes(arrays, sealed(arrays, _settings(task, steps, batch_size))))


@cache
def _read(path: Path, settings: str) -> dict[str, References]:
    metadata, arrays = read_arrays(path, DataError, "delete it, and it is computed again")
    shapes = {f"{split}/{name}": (CONTEXTS[split],) for split in SPLITS for name in References._fields}
    fits = {key: value.shape for key, value in arrays.items()} == shapes
    if metadata.get("settings") != settings or not fits or not all(map(_are_losses, arrays.values())):
        raise DataError(f"{path} is of other data: delete it, and it is computed again")
    return {split: References(*(arrays[f"{split}/{name}"] for name in References._fields)) for split in SPLITS}


def _are_losses(values: np.ndarray) -> bool:
    return values.dtype == np.float32 and bool(((values > 0) & (values < LARGEST)).all())


def compute(task: Task, steps: int, batch_size: int, split: str) -> References:
    """Train what the references of a split are."""
    numbers = np.arange(CONTEXTS[split])
    decisions = np.array([draw(split, number, len(task.labels))[0].decisions for number in numbers.tolist()])
    found = np.zeros((4, len(numbers)), dtype=np.float32)
    chunks = np.array_split(np.argsort(decisions, kind="stable"), -(-len(numbers) // CHUNK))  # alike in length
    for chunk in chunks:
        with one_thread(), np.errstate(all="ignore"):
            found[:, chunk] = _of_chunk(task, steps, batch_size, split, numbers[chunk], decisions[chunk])
    return References(*found)


def _of_chunk(
    task: Task, steps: int, batch_size: int, split: str, numbers: np.ndarray, decisions: np.ndarray
) -> np.ndarray:
    count, rates = len(numbers), len(RATES[True])
    sweep = Trainings(count, task, batch_size)
    sweep.begin(np.arange(count), split, numbers)
    losses = []
    for rate in sweep_rates():
        sweep.set(np.full(count, rate))
        losses.append(sweep.step())
    many = Trainings(count * rates, task, batch_size)
    contexts = many.begin(np.arange(count * rates), split, numbers.repeat(rates))
    tried = np.stack([RATES[context.sgd] for context in contexts[::rates]]).ravel()
    horizon, taken = decisions.repeat(rates), np.zeros(count * rates)
    first, judged = many.validate()
    best, before, rate = first.copy(), many.training.state(), tried.copy()
    for _ in range(int(decisions.max())):
        many.set(rate * cosine(np.minimum(taken / horizon, 1)))
        for _ in range(steps):
            many.step()
        validation, other = many.validate()
        taken += 1
        better = (validation < best) & (taken <= horizon)
        best, judged = np.where(better, validation, best), np.where(better, other, judged)
        lost = ~(np.log(validation / first) < DIVERGED)
        many.training.restore(before, lost)  # such a training goes on from its first weights, without moving
        rate = np.where(lost, 0.0, rate)
    judged = judged.reshape(count, rates)
    place = judged.argmin(1)
    one = np.arange(count)
    tuned, swept = tried.reshape(count, rates)[one, place], found_rate(np.stack(losses, axis=1))
    return np.stack([first[::rates], judged[one, place], tuned, swept])
