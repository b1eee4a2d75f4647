"""Streams: names, scenarios, own data, and data that would be misread."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from experts.continual import (
    Stream,
    load,
)
from experts.data import DataError


@pytest.mark.parametrize("name", ["split-digits", "rotated-digits", "corrupted-digits"])
def test_shipped_streams_have_the_labels_of_their_scenario(name: str) -> None:
    stream = load(name)
    assert len(stream.tasks) == 5
    assert stream.shape == (1, 28, 28)
    assert stream.scenario == ("class" if name == "split-digits" else "domain")
    assert stream.num_classes == 10
    if stream.scenario == "class":
        assert [task.classes for task in stream.tasks] == [(0, 1), (2, 3), (4, 5), (6, 7), (8, 9)]
        assert sum(len(task["train"][1]) for task in stream.tasks) == 1200
    else:
        assert all((task["test"][1] == stream.tasks[0]["test"][1]).all() for task in stream.tasks)
        assert not (stream.tasks[1]["test"][0] == stream.tasks[0]["test"][0]).all()


def test_an_order_of_classes_is_drawn_by_its_seed() -> None:
    assert load("split-digits", order=3).tasks[0].name == load("split-digits", order=3).tasks[0].name
    names = {task.name for seed in range(4) for task in load("split-digits", order=seed).tasks}
    assert len(names) > 5
    first = load("split-digits", order=3).tasks[0]
    shown = [int(digit) for digit in first.name.removeprefix("classes ").split(", ")]
    plain = load("split-digits")
    there = np.concatenate([task["test"][0] for task in plain.tasks])
    labels = np.concatenate([task["test"][1] for task in plain.tasks])
    inputs, own = first["test"]
    assert (inputs[own == 1].sum(0) == there[labels == shown[1]].sum(0)).all()


def test_a_domain_split_has_the_same_labels_in_all_tasks() -> None:
    stream = load("split-digits", "domain")
    assert {task.classes for task in stream.tasks} == {(0, 1)}
    with pytest.raises(ValueError, match="4, 3, 3 classes"):
        load("split-fashion-mnist-433", "domain")


@pytest.mark.parametrize(
    ("name", "scenario", "message"),
    [("splt", None, "unknown stream 'splt'"), ("rotated-digits", "class", "scenario is 'domain'"),
     ("split-digits", "clas", "not one of class, task, domain")],
)  # fmt: skip
def test_streams_that_there_are_not(name: str, scenario: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load(name, scenario)


def test_own_data_is_checked() -> None:
    x, y = np.zeros((4, 3), np.float32), np.array([0, 1, 0, 1])
    one = {"train": (x, y), "validation": (x, y), "test": (x, y)}
    assert Stream.of_arrays("own", [one, one]).num_classes == 4
    with pytest.raises(ValueError, match="float32"):
        Stream.of_arrays("own", [one | {"train": (x.astype(np.float64), y)}])
    with pytest.raises(ValueError, match="not finite"):
        Stream.of_arrays("own", [one | {"test": (x + np.nan, y)}])
    with pytest.raises(ValueError, match="4 inputs and 3 labels"):
        Stream.of_arrays("own", [one | {"test": (x, y[:3])}])
    with pytest.raises(ValueError, match="share a class"):
        Stream("own", "class", Stream.of_arrays("own", [one, one], "domain").tasks)


def test_cifar_and_tiny_imagenet_are_read_from_a_folder(tmp_path: Path) -> None:
    from PIL import Image

    random = np.random.default_rng(0)
    tens, hundreds = "cifar-10-batches-bin", "cifar-100-binary"
    files = {f"{tens}/data_batch_1.bin": (1, 20), f"{tens}/test_batch.bin": (1, 5),
             f"{hundreds}/train.bin": (2, 20), f"{hundreds}/test.bin": (2, 5)}  # fmt: skip
    for path, (labels, count) in files.items():
        rows = random.integers(256, size=(count, labels + 3072), dtype=np.uint8)
        rows[:, :labels] = random.integers(10, size=(count, labels))
        (tmp_path / path).parent.mkdir(exist_ok=True)
        rows.tofile(tmp_path / path)
    pictures = tmp_path / "tiny-imagenet-200"
    for word in ("n01", "n02"):
        folder = pictures / "train" / word / "images"
        folder.mkdir(parents=True)
        for number in range(3):
            Image.fromarray(random.integers(256, size=(64, 64, 3), dtype=np.uint8)).save(folder / f"{number}.png")
    (pictures / "val" / "images").mkdir(parents=True)
    Image.fromarray(np.full((64, 64), 7, np.uint8)).save(pictures / "val" / "images" / "0.png")
    (pictures / "val" / "val_annotations.txt").write_text("0.png\tn02\t0\t0\t1\t1\n")
    stream = load("cifar10-cifar100-tinyimagenet", folder=tmp_path)
    assert [task.name for task in stream.tasks] == ["CIFAR-10", "CIFAR-100", "TinyImageNet"]
    assert stream.shape == (3, 32, 32)
    images, labels = stream.tasks[2]["test"]
    assert (images == 7).all()
    assert labels.tolist() == [stream.tasks[2].classes[1]]
    (tmp_path / "cifar-100-binary/test.bin").write_bytes(b"short")
    with pytest.raises(DataError, match="cut short"):
        load("cifar10-cifar100-tinyimagenet", folder=tmp_path)
    with pytest.raises(DataError, match="binary versions"):
        load("cifar10-cifar100-tinyimagenet")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x, y: (x, y[:, None]), "whole numbers"), (lambda x, y: (x, y + 0.5), "whole numbers"),
        (lambda x, y: (np.zeros((4, 1, 8, 12), np.uint8), y), "must be square"),
    ],
)  # fmt: skip
def test_data_that_would_be_misread_are_refused(change: Any, message: str) -> None:
    splits = dict.fromkeys(
        ("train", "validation", "test"), change(np.zeros((4, 3), np.float32), np.array([0, 1, 0, 1]))
    )
    with pytest.raises(ValueError, match=message):
        Stream.of_arrays("own", [splits])
