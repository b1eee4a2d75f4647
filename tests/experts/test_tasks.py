"""Tasks: what is shipped is what the data sets give, and damage is noticed."""

from pathlib import Path

import gymnasium
import numpy as np
import pytest
from safetensors.numpy import load_file

from experts import data, tasks
from experts.data import DataError

NEEDS_DATA = pytest.param("fashion-mnist", marks=pytest.mark.needs_data)


@pytest.mark.parametrize("name", ["digits", NEEDS_DATA])
def test_what_is_shipped_is_made_of_the_data(name: str) -> None:
    shipped, made = load_file(tasks.FOLDER / f"{name}.safetensors"), tasks.make(name)
    assert shipped.keys() == made.keys()
    for key, values in shipped.items():  # a mean of pixels may be rounded to the next byte
        np.testing.assert_allclose(made[key].astype(int), values.astype(int), rtol=0, atol=key.endswith("inputs"))


@pytest.mark.parametrize("name", tasks.SHIPPED)
def test_shipped_tasks_are_scaled(name: str) -> None:
    task = tasks.load(name)
    assert task.num_classes == 10
    assert len(task.labels) == task.recipe.train
    np.testing.assert_allclose(task.inputs.mean(0), 0, atol=1e-4)
    assert task.inputs.std(0).max() <= 1


@pytest.mark.needs_data
def test_tasks_are_shipped_under_their_sums(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert len(tasks.ship(tmp_path)) == 3
    monkeypatch.setattr(tasks, "FOLDER", tmp_path)
    for name in tasks.SHIPPED:
        assert tasks._load.__wrapped__(name).name == name


@pytest.mark.needs_data
def test_pooling_by_hand() -> None:
    source = data.load("fashion-mnist")
    rows = np.random.default_rng(0).permutation(
        np.concatenate([source.splits[split] for split in ("train", "rl_train", "validation")])
    )
    first = source.inputs[rows[0]].reshape(28, 28)
    made = tasks.make("fashion-mnist")
    assert made["inputs"][0, 8] == pytest.approx(float(first[4:8, 4:8].mean()) * 255, abs=0.501)


def test_damage_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    raw = bytearray((tasks.FOLDER / "digits.safetensors").read_bytes())
    raw[-1] ^= 1
    (tmp_path / "digits.safetensors").write_bytes(raw)
    (tmp_path / tasks.SUMS).write_bytes((tasks.FOLDER / tasks.SUMS).read_bytes())
    monkeypatch.setattr(tasks, "FOLDER", tmp_path)
    with pytest.raises(DataError, match="is damaged"):
        tasks._load.__wrapped__("digits")
    with pytest.raises(DataError, match="cannot be read"):
        tasks._load.__wrapped__("fashion-mnist")
    (tmp_path / "digits.safetensors").write_bytes(raw)
    (tmp_path / tasks.SUMS).write_text("0" * 64 + "  another.safetensors\n")
    with pytest.raises(DataError, match="is damaged"):  # what is not named there is not trusted
        tasks._load.__wrapped__("digits")
    with pytest.raises(ValueError, match="'mnist' is not one of digits"):
        tasks.load("mnist")


def test_a_task_of_ones_own_is_built_small_and_found_by_name(own_cache: Path) -> None:
    generator = np.random.default_rng(0)
    labels = generator.integers(3, 6, 500)
    images = generator.normal(size=(500, 3, 28, 20)) + labels[:, None, None, None]
    task = tasks.build("mine", images, labels)
    assert task.inputs.shape == (375, 3 * 7 * 7)
    assert task.validation_inputs.shape == (125, 3 * 7 * 7)
    assert {*task.labels.tolist()} == {0, 1, 2}
    np.testing.assert_allclose(task.inputs.mean(0), 0, atol=1e-4)
    assert task.inputs.std(0).max() <= 1
    assert "mine" in tasks.names()
    again = tasks.load("mine")
    assert again.sha256 == task.sha256
    with pytest.raises(ValueError, match="read-only"):
        again.inputs[0] = 0


def test_numbers_are_projected_and_the_task_is_learnable() -> None:
    generator = np.random.default_rng(0)
    labels = generator.integers(0, 3, 400)
    inputs = generator.normal(size=(400, 200)) + 5 * np.eye(3)[labels] @ generator.normal(size=(3, 200))
    task = tasks.build("wide", inputs, labels)
    assert task.inputs.shape[1] == 64
    centres = np.stack([task.inputs[task.labels == label].mean(0) for label in range(3)])
    guessed = ((task.validation_inputs[:, None] - centres) ** 2).sum(2).argmin(1)
    assert (guessed == task.validation_labels).mean() > 0.95


@pytest.mark.parametrize(
    ("name", "inputs", "labels", "message"),
    [
        ("digits", np.zeros((200, 3)), np.arange(200) % 2, "name='digits'"),
        ("../up", np.zeros((200, 3)), np.arange(200) % 2, "name='../up'"),
        ("mine", np.zeros((20, 3)), np.arange(20) % 2, "n >= 100"),
        ("mine", np.zeros((200, 3)), np.zeros(200), "integers"),
        ("mine", np.full((200, 3), np.nan), np.arange(200) % 2, "finite"),
        ("mine", np.zeros((200, 3)), np.zeros(200, dtype=int), "at least 2 classes"),
    ],
)
def test_a_task_needs_numbers_and_classes(name: str, inputs: np.ndarray, labels: np.ndarray, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tasks.build(name, inputs, labels)


def test_a_damaged_own_task_is_named(own_cache: Path) -> None:
    tasks.build("mine", np.random.default_rng(0).normal(size=(200, 3)), np.arange(200) % 2)
    path = own_cache / "tasks" / "mine.safetensors"
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 1
    path.write_bytes(raw)
    with pytest.raises(DataError, match="damaged"):
        tasks.load("mine")
    with pytest.raises(ValueError, match="tasks.build makes one"):
        tasks.load("another")


def test_metaopt_on_an_own_task_asks_for_a_target() -> None:
    tasks.build("mine", np.random.default_rng(0).normal(size=(200, 3)), np.arange(200) % 2)
    with pytest.raises(ValueError, match="give one, as target=0.9"):
        gymnasium.make("moe_envs:MoEMetaOpt-v0", task="mine")
