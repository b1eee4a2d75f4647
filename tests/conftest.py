"""What all tests share: a cache of their own, one torch thread, skips without data, a clock, comparison of results."""

import os
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import platformdirs
import pytest
import torch
from hypothesis import settings

from cost.profile import Profile
from experts import bundle, data
from experts.bundle import Bundle
from experts.training import TrainingSettings

torch.set_num_threads(1)
settings.register_profile("whatever the machine's speed", deadline=None)
settings.load_profile("whatever the machine's speed")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip the tests marked `needs_data` where the raw Fashion-MNIST files are absent; nothing is downloaded."""
    if _raw_fashion_mnist_is_here():
        return
    skip = pytest.mark.skip(reason="needs the raw Fashion-MNIST files: apt-get install dataset-fashion-mnist")
    for item in items:
        if item.get_closest_marker("needs_data"):
            item.add_marker(skip)


def _raw_fashion_mnist_is_here() -> bool:
    """Whether each file is in a folder that `experts.data` reads, an earlier download included."""
    own = Path(os.environ.get("MOE_ENVS_DATA", data.DEBIAN_FOLDER))
    downloads = platformdirs.user_cache_path("moe-envs") / "data" / "fashion-mnist"
    folders = (own, own / "fashion-mnist", data.DEBIAN_FOLDER, downloads)
    return all(
        any((folder / f"{name}{suffix}").is_file() for folder in folders for suffix in ("", ".gz"))
        for name in data.FASHION_MNIST_FILES
    )


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The user's cache is never touched by a test."""
    monkeypatch.setenv("MOE_ENVS_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(scope="session")
def twelve(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """A bundle of 12 experts, of digits: more than all subsets are tabulated of. Its costs are those of the 8 shipped
    experts, and of four of them again."""
    source, shipped = data.load("digits"), Profile.model_validate(bundle.load("digits").profile)
    several = [*shipped.operations.values()]
    operations = {f"expert {number}": each for number, each in enumerate([*several, *several[::2]])}
    settings = TrainingSettings(widths=(4, 4, 8, 8, 16, 16, 32, 64, 4, 8, 16, 32), epochs=12, batch_size=32)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # a linear model is better
        return bundle.build(
            "twelve", source.inputs, source.labels, splits=source.splits, settings=settings, progress=False,
            folder=tmp_path_factory.mktemp("bundles"),
            profile=lambda model, inputs: shipped.model_copy(update={"operations": operations}),
        )  # fmt: skip


class Clock:
    """Time that passes by sleeping alone, and by `TICK` for each reading: no duration is 0."""

    TICK = 1e-6

    def __init__(self) -> None:
        self.seconds = 0.0

    def sleep(self, seconds: float) -> None:
        self.seconds += seconds

    def read(self) -> float:
        self.seconds += self.TICK
        return self.seconds

    def read_ns(self) -> int:
        return round(self.read() * 1e9)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """The module `time` has a clock that does not depend on the machine; its CPU times stand still."""
    made = Clock()
    monkeypatch.setattr(time, "sleep", made.sleep)
    monkeypatch.setattr(time, "perf_counter", made.read)
    monkeypatch.setattr(time, "perf_counter_ns", made.read_ns)
    monkeypatch.setattr(time, "thread_time_ns", lambda: 0)
    return made


@pytest.fixture
def assert_same() -> Callable[[Any, Any], None]:
    """Exact equality of nested dicts, tuples, arrays and numbers, types, dtypes and shapes included."""
    return _assert_same


def _assert_same(first: Any, second: Any, path: str = "") -> None:
    assert type(first) is type(second), f"{path}: {type(first)} and {type(second)}"
    if isinstance(first, dict):
        assert first.keys() == second.keys(), path
        for key in first:
            _assert_same(first[key], second[key], f"{path}/{key}")
    elif isinstance(first, tuple | list):
        assert len(first) == len(second), path
        for index, pair in enumerate(zip(first, second, strict=True)):
            _assert_same(*pair, f"{path}/{index}")
    elif isinstance(first, np.ndarray):
        assert (first.dtype, first.shape) == (second.dtype, second.shape), path
        if first.dtype == object:
            _assert_same(list(first), list(second), path)
        else:
            np.testing.assert_array_equal(first, second, err_msg=path)
    else:
        assert first == second, path
