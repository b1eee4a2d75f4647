"""The house: imports run downwards only and never in a circle, an import of ours is light, names have one home."""

import ast
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
OURS = {"moe_envs", "agents", "cost", "experts", "benchmarks"}
ALLOWED = {
    "cost": set(),
    "experts": {"cost"},
    "moe_envs": {"experts", "cost"},
    "agents": {"cost"},
    "agents.baselines": {"moe_envs", "experts", "cost"},
    "agents.deploy": {"moe_envs", "experts", "cost"},
    "benchmarks": {"moe_envs", "agents", "cost", "experts"},
}
HEAVY = ("torch", "stable_baselines3", "pandas", "matplotlib", "scipy")


def imported(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield str(node.module).split(".")[0]
        elif isinstance(node, ast.ImportFrom):
            yield f"relative import in {path.name}"


def modules() -> list[Path]:
    return sorted(path for package in OURS for path in (ROOT / package).rglob("*.py"))


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_run_downwards_only(path: Path) -> None:
    parts = path.relative_to(ROOT).parts
    layer = ".".join(parts[:2]) if ".".join(parts[:2]) in ALLOWED else parts[0]
    used = {name for name in imported(path) if name in OURS or name.startswith("relative")}
    assert used <= ALLOWED[layer] | {parts[0]}


def named_imports(path: Path, known: dict[str, Path]) -> Iterator[str]:
    """The modules of ours that a file imports anywhere: at its top, in a function, for types only."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            submodules = (f"{node.module}.{alias.name}" for alias in node.names)
            yield from (name if name in known else str(node.module) for name in submodules)


def test_no_import_circle_not_even_for_types() -> None:
    known = {
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path for path in modules()
    }
    graph = {
        name: {each for each in named_imports(path, known) if each in known} - {name} for name, path in known.items()
    }
    assert sum(map(len, graph.values())) > len(graph)
    TopologicalSorter(graph).prepare()  # CycleError names the circle


def test_a_class_has_one_name_and_one_home() -> None:
    names = Counter(
        node.name
        for path in modules()
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.ClassDef)
    )
    assert {name for name, times in names.items() if times > 1} == set()


@pytest.mark.parametrize(
    ("code", "absent"),
    [
        ("import moe_envs", HEAVY),
        ("import gymnasium; gymnasium.make('moe_envs:MoERouting-v0', bundle='digits').reset(seed=0)", HEAVY),
        ("from experts import bundle; bundle.load('digits').split('test')", HEAVY),
        ("import benchmarks.cli.main", ("torch", "stable_baselines3", "matplotlib")),
    ],
)
def test_light_import(code: str, absent: tuple[str, ...]) -> None:
    check = f"{code}\nimport sys\nprint([name for name in {absent} if name in sys.modules])"
    run = subprocess.run([sys.executable, "-W", "error", "-c", check], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"


def test_packages_are_listed_in_setup_cfg() -> None:
    import configparser

    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    listed = set(config["options"]["packages"].split())
    assert listed == {".".join(path.parent.relative_to(ROOT).parts) for path in modules() if path.name == "__init__.py"}
