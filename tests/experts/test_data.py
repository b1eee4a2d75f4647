"""Data sets: read, checked, split; absent or altered ones say what mends them."""

import gzip
from pathlib import Path

import numpy as np
import pytest

from experts import data
from experts.data import DataError


def idx(array: np.ndarray) -> bytes:
    header = bytes([0, 0, 8, array.ndim]) + b"".join(int(size).to_bytes(4, "big") for size in array.shape)
    return header + array.astype(np.uint8).tobytes()


def test_digits_are_split_into_disjoint_parts() -> None:
    digits = data.load("digits")
    assert {name: len(rows) for name, rows in digits.splits.items()} == {
        "train": 400,
        "rl_train": 800,
        "validation": 237,
        "test": 360,
    }
    assert len(set(np.concatenate(list(digits.splits.values())))) == 1797
    inputs, labels = digits["test"]
    assert (inputs.shape, inputs.min(), inputs.max(), labels.max()) == ((360, 64), 0, 1, 9)


@pytest.mark.needs_data
def test_fashion_mnist_keeps_the_official_test_set_apart() -> None:
    fashion = data.load("fashion-mnist")
    assert [len(fashion.splits[name]) for name in data.SPLITS] == [15_000, 40_000, 5_000, 10_000]
    assert set(fashion.splits["test"]) == set(range(60_000, 70_000))
    assert len(set(np.concatenate(list(fashion.splits.values())))) == 70_000
    np.testing.assert_array_equal(np.bincount(fashion.labels), [7000] * 10)


@pytest.mark.parametrize("compressed", [True, False])
def test_idx_files_are_read_plain_and_compressed(tmp_path: Path, compressed: bool) -> None:
    array = np.arange(24).reshape(2, 3, 4)
    path = tmp_path / ("x.gz" if compressed else "x")
    path.write_bytes(gzip.compress(idx(array)) if compressed else idx(array))
    np.testing.assert_array_equal(data.read_idx(path)[0], array)


@pytest.mark.parametrize(
    ("raw", "message"), [(idx(np.zeros((2, 3)))[:-1], "cut short"), (b"PK\x03\x04zip", "not an IDX")]
)
def test_files_that_are_not_idx_are_named(tmp_path: Path, raw: bytes, message: str) -> None:
    path = tmp_path / "x"
    path.write_bytes(raw)
    with pytest.raises(DataError, match=message):
        data.read_idx(path)


def test_altered_files_are_refused_by_hash_and_shape(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "fashion-mnist"
    folder.mkdir()
    monkeypatch.setenv("MOE_ENVS_DATA", str(tmp_path))
    (folder / "train-images-idx3-ubyte").write_bytes(idx(np.zeros((60_000, 28, 28))))
    with pytest.raises(DataError, match="SHA-256"):
        data.load("fashion-mnist")
    (folder / "train-images-idx3-ubyte").write_bytes(idx(np.zeros((5, 28, 28))))
    with pytest.raises(DataError, match="shape"):
        data.load("fashion-mnist")


def test_an_absent_data_set_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import pooch

    def fail(*arguments: object, **keywords: object) -> None:
        raise OSError("no route to host")

    monkeypatch.setattr(data, "DEBIAN_FOLDER", tmp_path)
    monkeypatch.delenv("MOE_ENVS_DATA", raising=False)
    monkeypatch.setattr(pooch, "retrieve", fail)
    with pytest.raises(DataError, match="apt install dataset-fashion-mnist.*MOE_ENVS_DATA"):
        data.load("fashion-mnist")
    with pytest.raises(ValueError, match="digits, fashion-mnist"):
        data.load("cifar")


def test_splits_need_enough_rows() -> None:
    with pytest.raises(ValueError, match="there are 5"):
        data.split_indices(5, (3, 3))


def test_the_breast_cancer_data_are_scaled_without_the_test_split(monkeypatch: pytest.MonkeyPatch) -> None:
    found = data.load("breast-cancer")
    assert found.inputs.shape == (569, 30)
    assert [len(found.splits[split]) for split in data.SPLITS] == [100, 250, 100, 119]
    known = np.concatenate([found[split][0] for split in data.SPLITS[:3]])
    np.testing.assert_array_equal(known.min(0), 0)
    np.testing.assert_array_equal(known.max(0), 1)
    assert found["test"][0].min() >= 0
    assert found["test"][0].max() <= 1
    monkeypatch.setattr(data, "BREAST_CANCER_SHA256", "0" * 64)
    with pytest.raises(DataError, match="breast cancer data is altered"):
        data.load("breast-cancer")
