"""The documentation says what there is: pages are of the docstrings, commands and their options exist."""

import ast
import importlib
import json
import re
import shlex
import shutil
from pathlib import Path
from typing import Any

import pytest
import typer
from PIL import Image

import moe_envs
from agents import PPO
from benchmarks.runner import runner
from benchmarks.runner.rows import RAW

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def of_docs(name: str) -> Any:
    import importlib.util

    specification = importlib.util.spec_from_file_location("pages", ROOT / "docs" / "pages.py")
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return getattr(module, name)


def apps() -> dict[str, Any]:
    """Click's commands behind the console scripts."""
    names = ("train", "eval", "benchmark", "compress", "bundle", "profile", "compare", "lm")
    found = {name: importlib.import_module(f"benchmarks.cli.{name}").app for name in names}
    return {f"moe-{name}": typer.main.get_command(app) for name, app in found.items()}


def commands(path: Path) -> list[str]:
    """What a page has in code that begins with one of our commands."""
    text = path.read_text()
    blocks = re.findall(r"```(?:bash|text|)\n(.*?)```", text, re.DOTALL)
    spans = re.findall(r"`([^`\n]+)`", re.sub(r"```.*?```", "", text, flags=re.DOTALL))
    lines = [line.strip().removeprefix("PYTHONPATH=. ") for block in blocks for line in block.splitlines()] + spans
    return [
        line.partition("#")[0]
        for line in lines
        if re.match(r"moe-(train|eval|benchmark|compress|bundle|profile|compare|lm)\b", line)
    ]


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_commands_and_their_options_exist(path: Path) -> None:
    known = apps()
    for line in commands(path):
        for words in (shlex.split(part) for part in line.split(" | ") if part.startswith("moe-") or " | " not in line):
            command, rest = known[words[0]], words[1:]
            if hasattr(command, "commands") and rest and not rest[0].startswith(("-", "[")) and rest[0] != "...":
                assert rest[0] in command.commands, line
                command = command.commands[rest[0]]
            options = {name: parameter for parameter in command.params for name in parameter.opts}
            given = {word.partition("=")[0] for word in rest if word.startswith("-")}
            assert given <= options.keys(), line
            if rest[hasattr(known[words[0]], "commands") :] and "..." not in rest:  # not a name alone
                missing = [each.opts for each in command.params if each.required and each.param_type_name == "option"
                           and not given & {*each.opts}]  # fmt: skip
                assert not missing, line


def called() -> set[str]:
    """The first words that tests call commands with: the first texts of lists and tuples, and of calls of helpers.

    Tests that are skipped somewhere prove nothing.
    """
    found = set()
    for path in (ROOT / "tests").rglob("test_*.py"):
        for node in ast.walk(_without_skipped(ast.parse(path.read_text()))):
            several = getattr(node, "elts", []) if isinstance(node, ast.List | ast.Tuple) else []
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") in ("said", "command", "run"):
                several = node.args
            texts = [each.value for each in several if isinstance(each, ast.Constant)]
            found.update(text for text in texts[:2] if isinstance(text, str))
    return found


def _without_skipped(tree: ast.Module) -> ast.Module:
    """A module less the tests that a decorator may skip, by its name or by the name of the mark that it stands for."""
    marks = {
        node.targets[0].id: ast.unparse(node.value)
        for node in tree.body
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name)
    }
    tree.body = [
        node
        for node in tree.body
        if not any(
            re.search(r"\bskip|needs_data|\bgpu\b", marks.get(ast.unparse(each), ast.unparse(each)))
            for each in getattr(node, "decorator_list", [])
        )
    ]
    return tree


def test_every_command_of_the_pages_is_called_by_a_test() -> None:
    known, calls = apps(), called()
    for words in (line.split() for path in PAGES for line in commands(path)):
        several = getattr(known[words[0]], "commands", {})
        if len(words) > 1 and words[1] in several:
            assert words[1] in calls, " ".join(words[:2])


@pytest.mark.parametrize("name", moe_envs.SPECS)
def test_pages_are_those_of_the_docstrings(name: str) -> None:
    page = (ROOT / "docs" / "environments" / f"{name}.md").read_text()
    assert page == of_docs("page")(name)
    for picture in re.findall(r"\]\(([^)]+\.gif)\)", page):
        with Image.open(ROOT / "docs" / "environments" / picture) as drawn:
            assert drawn.n_frames > 5


PUBLISHED = sorted(path.parent for path in (ROOT / "docs").rglob(runner.MATRIX))


@pytest.mark.parametrize("folder", PUBLISHED, ids=lambda folder: folder.name)
def test_published_reports_are_of_their_rows(folder: Path, tmp_path: Path) -> None:
    """Pictures, what made the report, and how a processor rounds aside."""
    for name in (RAW, runner.MATRIX):
        shutil.copy(folder / name, tmp_path / name)
    assert runner.rebuild(tmp_path)
    assert_alike((tmp_path / runner.REPORT).read_text(), (folder / runner.REPORT).read_text())
    published, made = (json.loads((place / runner.RESULTS).read_text()) for place in (folder, tmp_path))
    of_rows = ("rows", "of", "commits", "machines", "sha256")
    assert {key: published["source"][key] for key in of_rows} == {key: made["source"][key] for key in of_rows}
    aside = {"source": None, "sha256": None}
    assert_alike(json.dumps(made | aside), json.dumps(published | aside))


def assert_alike(made: str, published: str) -> None:
    """The same text, whose decimal fractions may differ by 1e-6 of themselves or in the last place."""
    fractions = r"-?\d+\.\d+(?:e-?\d+)?"
    assert re.sub(fractions, "#", made) == re.sub(fractions, "#", published)
    for ours, theirs in zip(re.findall(fractions, made), re.findall(fractions, published), strict=True):
        last_place = 0 if "e" in theirs else 10.0 ** -len(theirs.partition(".")[2])
        assert float(ours) == pytest.approx(float(theirs), rel=1e-6, abs=1.01 * last_place)


def test_pictures_are_drawn_anew(tmp_path: Path) -> None:
    policy = PPO("MlpPolicy", "moe_envs:MoERouting-v0", env_kwargs={"bundle": "digits"}, seed=0)  # before any training
    of_docs("draw")("MoERouting-v0", tmp_path / "routing.gif", policy)
    with Image.open(tmp_path / "routing.gif") as drawn:
        assert drawn.n_frames == 33
