"""Reference models: the same from the same seed, kept in the cache, refused where damaged."""

import dataclasses
from pathlib import Path

import pytest
import torch

from experts import reference_models
from experts.data import DataError


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("MOE_ENVS_CACHE", str(tmp_path))
    monkeypatch.setattr(reference_models, "FOLDER", tmp_path / "none")
    recipe = reference_models.RECIPES["digits-mlp"]
    monkeypatch.setitem(reference_models.RECIPES, "digits-mlp", dataclasses.replace(recipe, epochs=3))


def test_a_model_is_trained_once_and_kept(tmp_path: Path) -> None:
    first = reference_models.load("digits-mlp-1")
    path = tmp_path / "models" / "digits-mlp-1.safetensors"
    before = path.stat().st_mtime_ns
    second, third = reference_models.load("digits-mlp-1"), reference_models.train("digits-mlp-1", progress=False)
    other = reference_models.train("digits-mlp-2", progress=False)
    assert path.stat().st_mtime_ns == before
    for name, tensor in first.state_dict().items():
        assert torch.equal(tensor, second.state_dict()[name])
        assert torch.equal(tensor, third.state_dict()[name])
    assert not torch.equal(first.gate.weight, other.gate.weight)
    found = reference_models.data.load("digits")
    x, y = (torch.from_numpy(each) for each in found["validation"])
    assert (first(x).argmax(1) == y).float().mean() > 0.5


def test_torchs_generator_stays_as_it_was_and_decides_nothing() -> None:
    found = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        before = torch.get_rng_state()
        found.append(reference_models.upcycle("digits-mlp", progress=False))
        reference_models.load("digits-mlp")
        assert torch.equal(torch.get_rng_state(), before)
        (reference_models.zoo.cache_folder() / "models" / "digits-mlp-upcycled-0.safetensors").unlink()
    for name, tensor in found[0].state_dict().items():
        assert torch.equal(tensor, found[1].state_dict()[name])


def test_damage_and_foreign_names_are_named(tmp_path: Path) -> None:
    reference_models.load("digits-mlp")
    path = tmp_path / "models" / "digits-mlp-0.safetensors"
    raw = bytearray(path.read_bytes())
    raw[-3] ^= 1
    for content in (bytes(raw), bytes(raw[:50])):
        path.write_bytes(content)
        with pytest.raises(DataError, match="delete it, and it is made anew"):
            reference_models.load("digits-mlp")
        assert path.read_bytes() == content
    with pytest.raises(ValueError, match="model='vgg' is not one of fashion-mnist-conv, digits-mlp"):
        reference_models.load("vgg")


def test_images_are_mirrored_and_moved() -> None:
    torch.manual_seed(0)
    recipe = reference_models.RECIPES["fashion-mnist-conv"]
    image = torch.zeros(1, 28, 28)
    image[0, 10, 4] = 1
    places = set()
    for _ in range(200):
        found = reference_models.augmented(image.reshape(1, -1), recipe).reshape(28, 28).nonzero()
        assert len(found) == 1
        places.add(tuple(found[0].tolist()))
    rows, columns = ({place[axis] for place in places} for axis in (0, 1))
    assert rows == set(range(9, 12))
    assert columns == set(range(3, 6)) | set(range(22, 25))
