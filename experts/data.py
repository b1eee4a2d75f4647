"""Data sets, checked by count and SHA-256 and cut into four disjoint splits: train, rl_train, validation, test."""

import gzip
import hashlib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import platformdirs

SPLITS = ("train", "rl_train", "validation", "test")
DEBIAN_FOLDER = Path("/usr/share/datasets/fashion-mnist")
DOWNLOAD_URL = "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/"

# IDX file -> (SHA-256 of its decompressed bytes, shape, MD5 of the publisher's .gz for the download)
FASHION_MNIST_FILES = {
    "train-images-idx3-ubyte": (
        "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
        (60_000, 28, 28),
        "8d4fb7e6c68d591d4c3dfef9ec88bf0d",
    ),
    "train-labels-idx1-ubyte": (
        "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
        (60_000,),
        "25c81989df183df01b3e8a0aad5dffbe",
    ),
    "t10k-images-idx3-ubyte": (
        "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
        (10_000, 28, 28),
        "bef4ecab320f06d8554ea6380940ec79",
    ),
    "t10k-labels-idx1-ubyte": (
        "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
        (10_000,),
        "bb300cfdad3c16e7a12a480ee83cd310",
    ),
}
DIGITS_SHA256 = "65e5b4619795efb40c1082f4c350c049e4ad552200d369b6ae99e21eef5e72c5"
BREAST_CANCER_SHA256 = "25e2eb7b7a8745b1bde5ba18bc4969983d2e2f403291ecd5bde4a29ef30c3859"


class DataError(RuntimeError):
    """A data set is absent or altered; the message names the file and the fix."""


@dataclass(frozen=True)
class Dataset:
    """Inputs `[n, d]` float32 in 0..1, labels `[n]` int64, and indices of each split."""

    name: str
    inputs: np.ndarray
    labels: np.ndarray
    splits: dict[str, np.ndarray]
    sha256: str

    def __getitem__(self, split: str) -> tuple[np.ndarray, np.ndarray]:
        """Inputs and labels of one split."""
        rows = self.splits[split]
        return self.inputs[rows], self.labels[rows]


def load(name: str) -> Dataset:
    """Load `digits`, `fashion-mnist` or `breast-cancer`; raises `DataError` if it is absent or altered."""
    loaders = {"digits": digits, "fashion-mnist": fashion_mnist, "breast-cancer": breast_cancer}
    if name not in loaders:
        raise ValueError(f"unknown data set {name!r}; there are {', '.join(loaders)}")
    return loaders[name]()


def digits() -> Dataset:
    """scikit-learn's 1,797 digits of 8 x 8 pixels: 400 train, 800 rl_train, 237 validation, 360 test."""
    bunch = of_sklearn("load_digits")
    inputs, labels = bunch.data.astype(np.float32) / 16, bunch.target.astype(np.int64)
    _check("scikit-learn's digits", (bunch.data.astype(np.uint8).tobytes() + labels.tobytes()), DIGITS_SHA256)
    return Dataset("digits", inputs, labels, split_indices(len(labels), (400, 800, 237, 360)), DIGITS_SHA256)


def breast_cancer() -> Dataset:
    """scikit-learn's 569 tumours of 30 measures (Wolberg et al. 1995), benign or not: 100 train, 250 rl_train,
    100 validation, 119 test. Each measure is scaled to 0..1 by what the first three splits have, and clipped."""
    bunch = of_sklearn("load_breast_cancer")
    labels = bunch.target.astype(np.int64)
    _check("scikit-learn's breast cancer data", bunch.data.tobytes() + labels.tobytes(), BREAST_CANCER_SHA256)
    splits = split_indices(len(labels), (100, 250, 100, 119))
    known = bunch.data[np.concatenate([splits[name] for name in SPLITS[:3]])]
    low, high = known.min(0), known.max(0)
    inputs = ((bunch.data - low) / (high - low)).clip(0, 1).astype(np.float32)
    return Dataset("breast-cancer", inputs, labels, splits, BREAST_CANCER_SHA256)


def fashion_mnist() -> Dataset:
    """Fashion-MNIST (Xiao et al. 2017), 70,000 images of 28 x 28: 15,000 train, 40,000 rl_train, 5,000 validation
    out of the official training set, and the official 10,000 test images."""
    arrays = {name: _read_fashion_mnist_file(name) for name in FASHION_MNIST_FILES}
    images = np.concatenate([arrays["train-images-idx3-ubyte"], arrays["t10k-images-idx3-ubyte"]])
    labels = np.concatenate([arrays["train-labels-idx1-ubyte"], arrays["t10k-labels-idx1-ubyte"]])
    splits = split_indices(60_000, (15_000, 40_000, 5_000)) | {"test": np.arange(60_000, 70_000)}
    sha256 = hashlib.sha256("".join(entry[0] for entry in FASHION_MNIST_FILES.values()).encode()).hexdigest()
    inputs = images.reshape(len(images), -1).astype(np.float32) / 255
    return Dataset("fashion-mnist", inputs, labels.astype(np.int64), splits, sha256)


def split_indices(count: int, sizes: tuple[int, ...], seed: int = 0) -> dict[str, np.ndarray]:
    """Disjoint random indices below `count` for the first `len(sizes)` of `SPLITS`, the same for the same seed."""
    if sum(sizes) > count or min(sizes) < 1:
        raise ValueError(f"splits of sizes {sizes} need at least one row each and {sum(sizes)} rows; there are {count}")
    order = np.random.default_rng(seed).permutation(count)[: sum(sizes)]
    parts = np.split(order, np.cumsum(sizes)[:-1])
    return {name: np.sort(part) for name, part in zip(SPLITS[: len(sizes)], parts, strict=True)}


def read_idx(path: Path) -> tuple[np.ndarray, bytes]:
    """The uint8 array of an IDX file (plain or .gz, LeCun's format), and its decompressed bytes."""
    raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    if len(raw) < 4 or raw[:3] != b"\x00\x00\x08":
        raise DataError(f"{path} is not an IDX file of bytes")
    header = 4 + 4 * raw[3]
    shape = tuple(int(size) for size in np.frombuffer(raw[4:header], ">u4"))
    if len(raw) != header + int(np.prod(shape)):
        raise DataError(f"{path} is cut short or too long: {len(raw)} bytes for the shape {shape}")
    return np.frombuffer(raw, np.uint8, offset=header).reshape(shape), raw


def _read_fashion_mnist_file(name: str) -> np.ndarray:
    sha256, shape, _ = FASHION_MNIST_FILES[name]
    path = _find(name)
    array, raw = read_idx(path)
    if array.shape != shape:
        raise DataError(f"{path} holds an array of shape {array.shape}, not {shape}")
    _check(str(path), raw, sha256)
    return array


def _find(name: str) -> Path:
    own = Path(os.environ["MOE_ENVS_DATA"]) if "MOE_ENVS_DATA" in os.environ else DEBIAN_FOLDER
    for folder in (own, own / "fashion-mnist", DEBIAN_FOLDER):
        for path in (folder / name, folder / f"{name}.gz"):
            if path.is_file():
                return path
    return _download(name)


def _download(name: str) -> Path:
    mend = "apt install dataset-fashion-mnist, or put its IDX files into a folder and set MOE_ENVS_DATA to it"
    try:
        import pooch
    except ImportError:
        raise DataError(f"{name} not found: {mend}, or pip install pooch to download it") from None
    try:
        return Path(
            pooch.retrieve(
                f"{DOWNLOAD_URL}{name}.gz",
                known_hash=f"md5:{FASHION_MNIST_FILES[name][2]}",
                fname=f"{name}.gz",
                path=platformdirs.user_cache_path("moe-envs") / "data" / "fashion-mnist",
            )
        )
    except (OSError, ValueError) as error:
        raise DataError(f"{name} not found and its download failed ({error}): {mend}") from error


def of_sklearn(loader: str) -> Any:
    """What a loader of scikit-learn's gives; raises `DataError` if it is not installed."""
    try:
        from sklearn import datasets
    except ImportError:
        raise DataError("the small data sets come with scikit-learn: pip install scikit-learn") from None
    return getattr(datasets, loader)()


def _check(what: str, raw: bytes, sha256: str) -> None:
    found = hashlib.sha256(raw).hexdigest()
    if found != sha256:
        raise DataError(f"{what} is altered: SHA-256 {found}, expected {sha256}")
