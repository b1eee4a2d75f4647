"""Every kind of file that we write, altered: a bit, the end, the whole, or the content under a new seal."""

import ast
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load as arrays_in
from safetensors.numpy import save as to_bytes

from tests.attack.conftest import SCALE, Outcomes
from tests.attack.kinds import KINDS, REPORTS, Kind, with_header

PACKAGES = "agents", "benchmarks", "cost", "experts", "moe_envs"
WRITES = {"write_bytes", "write_text", "save_json", "to_csv"}
DEEP = "[" * 100_000
FOREIGN = {
    "empty": b"", "text": b"hello\n", "number": b"1", "null": b"null\n", "list": b"[]", "dict": b"{}",
    "deep": DEEP.encode(),
    "NaN": b"NaN", "zeros": bytes(1000), "binary": bytes(range(256)) * 9, "pickle": b"\x80\x04\x95\x10\x00\x00\x00.",
    "header of 2^60": (2**60).to_bytes(8, "little") + b"{}", "BOM": b"\xef\xbb\xbf{}\n", "latin": b'{"a": "\xe4"}\n',
}  # fmt: skip
WRONG: list[Any] = [
    float("nan"),
    float("inf"),
    -1,
    10**11,
    10**400,
    1.5,
    "x",
    "",
    None,
    True,
    [],
    {},
    [[[]]],
    "../../x",
]


@pytest.fixture(scope="module")
def written(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Kind, Path, Any]:
    """A kind, an artefact of it, and what that holds."""
    kind, folder = KINDS[request.param], tmp_path_factory.mktemp("kind")
    kind.write(folder)
    before = tmp_path_factory.mktemp("used") / "a"
    shutil.copytree(folder, before)
    return kind, folder, said(kind.use(before))


every_kind = pytest.mark.parametrize(
    "written", list(KINDS), indirect=True, ids=lambda name: str(name).replace(" ", "-")
)


def said(content: Any) -> str:
    return json.dumps(content, default=str, sort_keys=True)


class Attacked:
    """A copy of an artefact with one file altered."""

    def __init__(self, written: tuple[Kind, Path, Any], tmp_path: Path) -> None:
        self.kind, self.folder, self.holds = written
        self.copy, self.number = tmp_path / "copy", 0

    def __iter__(self) -> Iterator[str]:
        return (str(path.relative_to(self.folder)) for path in self.kind.files(self.folder))

    def left_out(self) -> bool:
        """Whether a case is of the long attack only, as most of those are that take long."""
        self.number += 1
        return self.kind.slow and SCALE == 1 and self.number % 10 != 0

    def fresh(self, name: str) -> Path:
        shutil.rmtree(self.copy, ignore_errors=True)
        shutil.copytree(self.folder, self.copy)
        return self.copy / name

    def wrong(self, name: str) -> Any:
        """An altered file may only be accepted where its content is what it was, or any text is allowed."""
        return lambda used: None if name in self.kind.free or said(used) == self.holds else "accepted"

    def use(self) -> Any:
        return self.kind.use(self.copy)


@every_kind
def test_altered_bits(written: Any, attack: Outcomes, draw: np.random.Generator, tmp_path: Path) -> None:
    attacked = Attacked(written, tmp_path)
    for name in attacked:
        size = (attacked.folder / name).stat().st_size
        ends = [0, 1, 7, 8, 9, size - 1, size - 2]
        for place in [*(end for end in ends if 0 <= end < size), *draw.integers(size, size=4 * SCALE).tolist()]:
            if attacked.left_out():
                continue
            path, bit = attacked.fresh(name), int(draw.integers(8))
            raw = bytearray(path.read_bytes())
            raw[place] ^= 1 << bit
            path.write_bytes(raw)
            attack.attempt(f"{name} byte {place} bit {bit}", attacked.use, attacked.wrong(name), attacked.kind.refused)


@every_kind
def test_cut_and_foreign_files(written: Any, attack: Outcomes, draw: np.random.Generator, tmp_path: Path) -> None:
    attacked = Attacked(written, tmp_path)
    for name in attacked:
        raw = (attacked.folder / name).read_bytes()
        contents = {
            f"cut at {end}": raw[:end] for end in (1, len(raw) // 2, len(raw) - 1, *draw.integers(len(raw), size=SCALE))
        }
        contents |= FOREIGN | {"twice": raw + raw, "one more": raw + b"x", "BOM before": b"\xef\xbb\xbf" + raw}
        contents |= {"CRLF": raw.replace(b"\n", b"\r\n")}
        if name.endswith("raw.jsonl"):  # whole lines are rows, and the last one may be cut by a kill
            contents = {
                case: each
                for case, each in contents.items()
                if not case.startswith(("cut", "twice", "one more", "empty"))
            }
            contents = {case: each + b"\n" for case, each in contents.items()}
        for case, content in contents.items():
            if attacked.left_out():
                continue
            attacked.fresh(name).write_bytes(content)
            attack.attempt(f"{name} {case}", attacked.use, attacked.wrong(name), attacked.kind.refused)
        attacked.fresh(name).unlink()
        attack.attempt(
            f"{name} absent", attacked.use, attacked.wrong(name), (*attacked.kind.refused, FileNotFoundError)
        )
        path = attacked.fresh(name)
        path.unlink()
        path.mkdir()
        attack.attempt(f"{name} a folder", attacked.use, attacked.wrong(name), (*attacked.kind.refused, OSError))


def leaves(content: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Paths of all values in nested JSON."""
    if path:
        yield path
    if isinstance(content, dict | list):
        for key, value in content.items() if isinstance(content, dict) else enumerate(content[:3]):
            yield from leaves(value, (*path, key))


def with_leaf(content: Any, path: tuple[Any, ...], value: Any) -> Any:
    """Nested JSON with one value replaced, or without it."""
    found = json.loads(json.dumps(content))
    inner = found
    for key in path[:-1]:
        inner = inner[key]
    if value is ...:
        inner.pop(path[-1])
    else:
        inner[path[-1]] = value
    return found


@every_kind
def test_senseless_content_under_a_new_seal(
    written: Any, attack: Outcomes, draw: np.random.Generator, tmp_path: Path
) -> None:
    """It is refused, or can be used without a number that is not finite: `use` raises where one comes out."""
    attacked = Attacked(written, tmp_path)
    for name in attacked:
        path = attacked.folder / name
        if path.suffix == ".json" or path.name == "raw.jsonl":
            raw = path.read_bytes()
            first = raw.splitlines()[0]
            text = first if path.name == "raw.jsonl" or first.endswith(b"}") else raw  # a checkpoint's seal comes after
            content = json.loads(text)
            content.pop("sha256", None)
            for case, wrong in wrongly(content, draw):
                altered = json.dumps(wrong).encode()
                target = attacked.fresh(name)
                target.write_bytes(raw.replace(text, altered) if path.name == "raw.jsonl" else altered)
                reseal(attack, f"{name} {case}", attacked, target)
        elif path.suffix == ".bin":
            raw = path.read_bytes()
            for case, wrong in wrongly(with_header(raw)[0], draw):
                target = attacked.fresh(name)
                target.write_bytes(with_header(raw, wrong)[1])
                reseal(attack, f"{name} {case}", attacked, target)
        elif path.suffix == ".safetensors":
            raw = path.read_bytes()
            metadata = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")]).get("__metadata__", None)
            arrays = arrays_in(raw)
            for key in [list(arrays)[each] for each in draw.permutation(len(arrays))[: 3 * SCALE]]:
                for case, array in senseless(arrays[key]).items():
                    target = attacked.fresh(name)
                    target.write_bytes(to_bytes(arrays | {key: array}, metadata))
                    reseal(attack, f"{name} {key} {case}", attacked, target)
                target = attacked.fresh(name)
                target.write_bytes(to_bytes({each: arrays[each] for each in arrays if each != key}, metadata))
                reseal(attack, f"{name} without {key}", attacked, target)


def wrongly(content: Any, draw: np.random.Generator) -> Iterator[tuple[str, Any]]:
    """JSON with one value that is absent or wrong, and what is wrong."""
    places = list(leaves(content))
    for number in draw.permutation(len(places))[: 12 * SCALE]:
        for value in [..., *(WRONG[each] for each in draw.permutation(len(WRONG))[:2])]:
            yield f"{places[number]} = {value!r:.20}", with_leaf(content, places[number], value)


def senseless(array: np.ndarray) -> dict[str, np.ndarray]:
    """An array with other numbers, shapes and types."""
    rows = np.atleast_1d(array)
    found = {
        "of text": np.frombuffer(b"text", np.uint8), "empty": rows[:0], "flat": array.reshape(-1),
        "of one": array.reshape(-1)[:1],
        "of float64": array.astype(np.float64), "of int8": np.zeros(array.shape, np.int8), "cut": rows[:-1].copy(),
    }  # fmt: skip
    if array.dtype.kind == "f":
        found |= {
            "NaN": np.full_like(array, np.nan),
            "inf": np.full_like(array, np.inf),
            "largest": np.full_like(array, np.finfo(array.dtype).max),
        }
    elif array.dtype.kind in "iu":
        found |= {
            "largest": np.full_like(array, np.iinfo(array.dtype).max),
            "least": np.full_like(array, np.iinfo(array.dtype).min),
        }
    return found


def reseal(attack: Outcomes, case: str, attacked: Attacked, path: Path) -> None:
    if attacked.left_out():
        return
    try:
        attacked.kind.reseal(path)
    except (KeyError, TypeError, AttributeError, ValueError, OverflowError):
        return  # it cannot be sealed
    attack.attempt(f"resealed {case}", attacked.use, refused=attacked.kind.refused)


def opens_to_write(path: Path) -> bool:
    """Whether a module opens a file with a mode that writes."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call) and "open" in (getattr(node.func, "id", ""), getattr(node.func, "attr", "")):
            texts = [each.value for each in node.args if isinstance(each, ast.Constant) and isinstance(each.value, str)]
            if any(set(text) <= set("rwab+t") and set(text) & set("wa+") for text in texts):
                return True
    return False


def test_each_writer_is_attacked() -> None:
    root, writers = Path(__file__).parents[2], set[str]()
    for package in PACKAGES:
        for path in (root / package).rglob("*.py"):
            calls = {
                node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
                for node in ast.walk(ast.parse(path.read_text()))
                if isinstance(node, ast.Call)
            }
            if calls & WRITES or opens_to_write(path):
                writers.add(".".join(path.relative_to(root).with_suffix("").parts).removesuffix(".__init__"))
    attacked = {module for kind in KINDS.values() for module in kind.modules}
    assert writers - attacked - REPORTS - {"cost.files", "agents.episodes"} == set()
    assert (attacked | REPORTS) - writers <= {"agents.checkpoints", "agents.resumable", "agents.episodes"}
