"""The command moe-profile."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from benchmarks.cli import profile as profiling
from cost.profile import Profile, ProfileError

MODULE = """
import time, torch
from torch import nn

def build():
    return nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 8)), torch.ones(4, 8)

def calls():
    return {"sleep": lambda n: time.sleep(1e-4 * n)}

def wrong():
    return 3

def half_wrong():
    return 3, torch.ones(2, 8)
"""


def run(*arguments: str) -> str:
    done = CliRunner().invoke(profiling.app, arguments, catch_exceptions=False, env={"COLUMNS": "200"})
    assert done.exit_code == 0, done.output
    return done.output


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "my_module.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_bundle_is_measured_into_the_cache_and_a_file(own_cache: Path, tmp_path: Path) -> None:
    file = tmp_path / "mine.json"
    said = run("bundle", "digits", "--repeats", "50", "--out", str(file))
    (cached,) = own_cache.glob("profiles/digits-*.json")
    assert Profile.load(cached) == Profile.load(file)
    assert "expert 7" in said
    assert "energy: proxy" in said
    odd = tmp_path / "w[" / "q]" / "[mine].json"
    Profile.load(file).save(odd)
    said = run("show", str(odd))
    assert "torch: " in said
    assert "0.0%" in run("compare", str(odd), str(file))
    assert "of another machine" not in said


def test_two_profiles_side_by_side(tmp_path: Path) -> None:
    reference = profiling.load("digits")
    slower = reference.model_dump()
    for operation in slower["operations"].values():
        operation["time"] = {"fixed": operation["time"]["fixed"] * 1.5, "slope": operation["time"]["slope"] * 1.5}
    Profile(**{**slower, "fingerprint": {}}).save(tmp_path / "slower.json")
    said = run("compare", "digits", str(tmp_path / "slower.json"), "--plot", str(tmp_path / "both.png"))
    assert "difference: median 50.0%, P95 50.0% of 56 times" in said
    assert (tmp_path / "both.png").read_bytes().startswith(b"\x89PNG")
    assert "of another machine" in run("show", str(tmp_path / "slower.json"))


def test_a_module_and_callables_of_ones_own(module: Path) -> None:
    run("model", "my_module:build", "--sizes", "1,8", "--dtypes", "float32,float64", "--out", "p.json")
    found = Profile.load("p.json").operations
    assert list(found) == ["float32, cpu, 1 thread", "float64, cpu, 1 thread"]
    assert found["float64, cpu, 1 thread"].sizes == (1, 8)
    run("model", "my_module:calls", "--sizes", "2,4", "--out", "q.json")
    assert Profile.load("q.json").operations["sleep"].median[0] >= 2e-4
    assert json.loads(Path("q.json").read_text())["schema_version"] == 2
    with pytest.raises(ProfileError, match="no operation in common"):
        profiling.differences(Profile.load("p.json"), Profile.load("q.json"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["model", "my_module:absent"], "cannot be found"),
        (["model", "nowhere:build"], "cannot be found"),
        (["model", "my_module:wrong"], "must return"),
        (["model", "my_module:half_wrong"], "must return"),
        (["model", "my_module:build", "--sizes", "1,x"], "whole numbers"),
        (["model", "my_module:build", "--dtypes", "int8"], "floating-point"),
        (["model", "my_module:calls", "--threads", "2"], "apply to a module only"),
    ],
)
def test_mistakes_say_what_to_do(module: Path, arguments: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        run(*arguments)


def test_neither_a_file_nor_a_bundle() -> None:
    with pytest.raises(ProfileError, match="there are digits, fashion-mnist"):
        profiling.load("nothing")
