"""Tasks: what is shipped is what the data sets give, and damage is noticed."""

from pathlib import Path

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
    with pytest.raises(ValueError, match="'mnist' is not one of digits"):
        tasks.load("mnist")
