"""Tasks: what is shipped is what the data sets give, and damage is noticed."""

from pathlib import Path

import numpy as np
import pytest

from experts import data, tasks
from experts.data import DataError


@pytest.mark.parametrize("name", tasks.SHIPPED)
def test_what_is_shipped_is_made_of_the_data(name: str, tmp_path: Path) -> None:
    try:
        made = tasks.ship(tmp_path)
    except DataError as error:
        pytest.skip(str(error))
    assert len(made) == 3
    for path in made:
        assert path.read_bytes() == (tasks.FOLDER / path.name).read_bytes()
    task = tasks.load(name)
    assert task.num_classes == 10
    assert len(task.labels) == task.recipe.train
    np.testing.assert_allclose(task.inputs.mean(0), 0, atol=1e-4)
    assert task.inputs.std(0).max() <= 1


def test_pooling_by_hand() -> None:
    try:
        source = data.load("fashion-mnist")
    except DataError as error:
        pytest.skip(str(error))
    rows = np.random.default_rng(0).permutation(
        np.concatenate([source.splits[split] for split in ("train", "rl_train", "validation")])
    )
    first = source.inputs[rows[0]].reshape(28, 28)
    made = tasks.make("fashion-mnist")
    assert made["inputs"][0, 8] == round(float(first[4:8, 4:8].mean()) * 255)


def test_damage_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    raw = bytearray((tasks.FOLDER / "digits.safetensors").read_bytes())
    raw[-1] ^= 1
    (tmp_path / "digits.safetensors").write_bytes(raw)
    (tmp_path / tasks.SUMS).write_bytes((tasks.FOLDER / tasks.SUMS).read_bytes())
    monkeypatch.setattr(tasks, "FOLDER", tmp_path)
    with pytest.raises(DataError, match="is damaged"):
        tasks.load.__wrapped__("digits")
    with pytest.raises(DataError, match="cannot be read"):
        tasks.load.__wrapped__("fashion-mnist")
    with pytest.raises(ValueError, match="'mnist' is not one of digits"):
        tasks.load("mnist")
