"""Images of the streams: the shipped data sets, rotated and corrupted ones, and the large ones from a user's folder."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np

from experts import data
from experts.data import DataError

Arrays = tuple[np.ndarray, np.ndarray]  # inputs and labels
TASK_SPLITS = ("train", "validation", "test")  # of what a stream's learner sees; there is no rl_train
SIDE = 28
ANGLES = (0, 30, 60, 90, 120)
TRAINING = {"digits": ("train", "rl_train"), "fashion-mnist": ("train",)}  # 1,200 and 15,000 images


def images(name: str) -> dict[str, Arrays]:
    """Images `[n, 1, 28, 28]` uint8 and labels of each split; digits are enlarged."""
    loaded = data.load(name)
    found = {}
    for split in TASK_SPLITS:
        rows = np.concatenate([loaded.splits[part] for part in (TRAINING[name] if split == "train" else (split,))])
        found[split] = _square(loaded.inputs[rows]), loaded.labels[rows]
    return found


def _square(inputs: np.ndarray) -> np.ndarray:
    """Square images of one channel and 28 x 28 pixels, uint8, of flat ones in 0..1."""
    from scipy.ndimage import zoom

    side = int(inputs.shape[1] ** 0.5)
    images = inputs.reshape(-1, side, side)
    if side != SIDE:
        images = zoom(images, (1, SIDE / side, SIDE / side), order=1)
    return (images.clip(0, 1) * 255).round().astype(np.uint8)[:, None]


def part(source: Mapping[str, Arrays], classes: Sequence[int]) -> dict[str, Arrays]:
    """The inputs of some classes, whose labels become 0, 1, ..."""
    place = np.full(1 + max(int(labels.max()) for _, labels in source.values()), -1)
    place[list(classes)] = np.arange(len(classes))
    found = {}
    for split, (inputs, labels) in source.items():
        rows = place[labels] >= 0
        found[split] = inputs[rows], place[labels[rows]]
    return found


def domains(whole: Mapping[str, Arrays], kind: str) -> dict[str, dict[str, Arrays]]:
    """The same images "rotated" or "corrupted" in five ways, by name."""
    makers = {split: _rotations() if kind == "rotated" else _corruptions(number)
              for number, split in enumerate(TASK_SPLITS)}  # fmt: skip
    return {name: {split: (makers[split][name](x), y) for split, (x, y) in whole.items()} for name in makers["train"]}


def _rotations() -> dict[str, Callable[[np.ndarray], np.ndarray]]:
    from scipy.ndimage import rotate

    def by(angle: int) -> Callable[[np.ndarray], np.ndarray]:
        return lambda images: rotate(images, angle, axes=(2, 3), reshape=False, order=1) if angle else images

    return {f"{angle} degrees": by(angle) for angle in ANGLES}


def _corruptions(seed: int) -> dict[str, Callable[[np.ndarray], np.ndarray]]:
    """Some of Hendrycks & Dietterich (2019), simplified."""
    from scipy.ndimage import gaussian_filter

    def noisy(images: np.ndarray) -> np.ndarray:
        noise = np.random.default_rng(seed).normal(0, 60, images.shape)
        return (images + noise).clip(0, 255).round().astype(np.uint8)

    def hidden(images: np.ndarray) -> np.ndarray:
        found, side = images.copy(), images.shape[-1] // 2
        found[:, :, :side, side:] = 0
        return found

    return {
        "plain": lambda images: images,
        "noise": noisy,
        "blur": lambda images: gaussian_filter(images, (0, 0, 2, 2)),
        "low contrast": lambda images: (images // 4 + 96).astype(np.uint8),
        "a quarter hidden": hidden,
    }


def large(folder: str | Path | None, name: str) -> list[dict[str, Arrays]]:
    """CIFAR-10 and CIFAR-100 of their binary versions, and TinyImageNet's JPEGs, all of 32 x 32 pixels."""
    if folder is None or not Path(folder).is_dir():
        raise DataError(
            f"{name} needs folder=DIR with cifar-10-batches-bin, cifar-100-binary and tiny-imagenet-200: the binary "
            "versions of https://www.cs.toronto.edu/~kriz/cifar.html and cs231n.stanford.edu/tiny-imagenet-200.zip"
        )
    root = Path(folder)
    tens = sorted((root / "cifar-10-batches-bin").glob("data_batch_*.bin"))
    return [
        _held_out(_cifar(tens, 1), _cifar([root / "cifar-10-batches-bin" / "test_batch.bin"], 1)),
        _held_out(
            _cifar([root / "cifar-100-binary" / "train.bin"], 2), _cifar([root / "cifar-100-binary" / "test.bin"], 2)
        ),
        _held_out(*_tiny_imagenet(root / "tiny-imagenet-200")),
    ]


def _held_out(training: Arrays, test: Arrays) -> dict[str, Arrays]:
    """A tenth of the training data is for validation."""
    order = np.random.default_rng(0).permutation(len(training[1]))
    some, rest = np.split(order, [max(1, len(order) // 10)])
    return {
        "train": (training[0][rest], training[1][rest]),
        "validation": (training[0][some], training[1][some]),
        "test": test,
    }


def _cifar(paths: Sequence[Path], label_bytes: int) -> Arrays:
    """Rows of labels (the last one is the finest) and 3,072 bytes of pixels."""
    size, rows = label_bytes + 3072, list[np.ndarray]()
    for path in paths:
        if not path.is_file():
            raise DataError(f"{path} not found: unpack the binary version of CIFAR")
        raw = np.fromfile(path, np.uint8)
        if len(raw) % size or not len(raw):
            raise DataError(f"{path} is cut short, or of another format: {len(raw)} bytes are not rows of {size}")
        rows.append(raw.reshape(-1, size))
    if not rows:
        raise DataError("no data_batch_*.bin found in cifar-10-batches-bin: unpack the binary version of CIFAR-10")
    whole = np.concatenate(rows)
    return whole[:, label_bytes:].reshape(-1, 3, 32, 32), whole[:, label_bytes - 1].astype(np.int64)


def _tiny_imagenet(root: Path) -> tuple[Arrays, Arrays]:
    folders = sorted(path for path in (root / "train").glob("n*") if path.is_dir())
    annotations = root / "val" / "val_annotations.txt"
    if not folders or not annotations.is_file():
        raise DataError(f"{root} has no train/n*/images and val/val_annotations.txt: unpack tiny-imagenet-200.zip")
    place = {folder.name: number for number, folder in enumerate(folders)}
    training = [(path, place[folder.name]) for folder in folders for path in sorted((folder / "images").glob("*"))]
    lines = [line.split("\t")[:2] for line in annotations.read_text().splitlines() if line]
    test = [(root / "val" / "images" / name, place[word]) for name, word in lines if word in place]
    return _pictures(training), _pictures(test)


def _pictures(listed: Sequence[tuple[Path, int]]) -> Arrays:
    from PIL import Image

    images = np.empty((len(listed), 3, 32, 32), np.uint8)
    for number, (path, _) in enumerate(listed):
        try:
            with Image.open(path) as image:
                images[number] = np.asarray(image.convert("RGB").resize((32, 32))).transpose(2, 0, 1)
        except OSError as error:
            raise DataError(f"{path} cannot be read: {error}") from error
    return images, np.array([label for _, label in listed], np.int64)
