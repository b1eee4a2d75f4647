"""Kill -9 and Ctrl-C between every two system calls that change files; full disks; two processes on one folder."""

import os
import resource
import shutil
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from agents import checkpoints, runs, training
from benchmarks.runner import rows, runner
from benchmarks.runner.matrix import Matrix
from cost.files import save_json, write_text
from experts import bundle
from experts.continual import Result
from experts.continual.running import RESULT
from tests.attack.conftest import SCALE, Outcomes, some
from tests.attack.kinds import ENV, KINDS, SHORT, build, learn_stream, row
from tests.processes import Here

CHANGES = {"os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate", "os.link", "shutil.rmtree", "shutil.move"}
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
SECONDS = 120


class Interruption:
    """Sends a signal to this process before its n-th change of a file; counts the changes where n is None."""

    def __init__(self, number: int | None, sign: int, within: Path) -> None:
        self.number, self.sign, self.within, self.count = number, sign, str(within), 0
        sys.addaudithook(self._hook)  # it cannot be removed: only in a process that ends soon

    def _hook(self, event: str, arguments: tuple[Any, ...]) -> None:
        changes = event in CHANGES or (event == "open" and isinstance(arguments[2], int) and arguments[2] & WRITING)
        if not changes or not str(arguments[0]).startswith(self.within):
            return
        self.count += 1
        if self.number == self.count - 1:
            os.kill(os.getpid(), self.sign)
            if self.sign == signal.SIGINT:
                time.sleep(0)  # where Python looks for signals


def fork() -> int:
    """Fork, also where a test before has imported a library that warns of it; the child leaves that alone."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return os.fork()


def in_child(action: Callable[[], object]) -> tuple[int, str]:
    """Run in a forked process; returns its exit status and what it said."""
    reading, writing = os.pipe()
    child = fork()
    if child == 0:
        code = 0
        try:
            signal.alarm(SECONDS)  # no child waits for ever
            os.close(reading)
            os.write(writing, str(action()).encode())
        except KeyboardInterrupt:
            code = 130
        except BaseException:
            os.write(writing, traceback.format_exc().encode()[-2000:])
            code = 1
        finally:
            os._exit(code)
    os.close(writing)
    with os.fdopen(reading, "rb") as pipe:
        said = pipe.read().decode(errors="replace")
    _, status = os.waitpid(child, 0)
    return status, said


@dataclass(frozen=True)
class Operation:
    """`prepare` makes what is there before; `do` is interrupted; `look` returns what is there, once it is whole."""

    prepare: Callable[[Path], object]
    do: Callable[[Path], object]
    look: Callable[[Path], object]


def _bundle(count: int) -> Callable[[Path], object]:
    return lambda folder: build(folder, count)


def _train(folder: Path) -> object:
    before, training.validation_episodes = training.validation_episodes, lambda env_id: 10
    try:
        if (folder / "run" / runs.STARTED).exists() and not (folder / "run" / runs.SETTINGS).exists():
            return runs.resume(folder / "run")
        if (folder / "run" / runs.SETTINGS).exists():
            return None
        return runs.train(ENV, "ppo", 3, folder / "run", {"bundle": "digits"}, SHORT)
    finally:
        training.validation_episodes = before


def _run_of(folder: Path) -> object:
    policy: Any = runs.load(folder / "run")[0]
    return {name: each.tolist() for name, each in policy.network.weights.items()}, len(runs.episodes(folder / "run"))


def _matrix(folder: Path) -> int:
    return runner.run(MATRIX, folder, executor=Here)


MATRIX = Matrix(experiment="tests.attack.instant", seeds=[1, 2])
OPERATIONS = {
    "bundle is replaced": Operation(_bundle(200), _bundle(220), lambda folder: bundle.load(folder / "small").sha256),
    "checkpoint is replaced": Operation(
        lambda folder: checkpoints.save(folder / "a", {"value": np.zeros(3)}),
        lambda folder: checkpoints.save(folder / "a", {"value": np.ones(3)}),
        lambda folder: checkpoints.load(folder / "a")["value"].tolist(),
    ),
    "JSON is replaced": Operation(
        lambda folder: save_json(folder / "a.json", {"a": 1}), lambda folder: save_json(folder / "a.json", {"a": 2}),
        lambda folder: (folder / "a.json").read_text(),
    ),
    "row is added": Operation(
        lambda folder: rows.append(folder / "raw.jsonl", row(0)), lambda folder: rows.append(folder / "raw.jsonl",
        row(1)),
        lambda folder: [each.seed for each in rows.read(folder / "raw.jsonl")],
    ),
    "run": Operation(lambda folder: None, _train, _run_of),
    "stream": Operation(
        lambda folder: None, learn_stream, lambda folder: Result.load(folder / "run" / RESULT).accuracy.tolist()
    ),
    "matrix": Operation(
        lambda folder: None, _matrix, lambda folder: sorted(each.seed for each in rows.read(folder / "raw.jsonl"))
    ),
}  # fmt: skip
ANY_TIME = {"bundle is replaced", "checkpoint is replaced", "JSON is replaced", "row is added"}


@pytest.mark.parametrize("sign", [signal.SIGKILL, signal.SIGINT], ids=["kill", "Ctrl-C"])
@pytest.mark.parametrize("name", list(OPERATIONS), ids=lambda name: str(name).replace(" ", "-"))
def test_interrupts_between_changes_of_files(name: str, sign: int, attack: Outcomes, tmp_path: Path) -> None:
    """What was there before or what replaces it is there whole, and the same call again brings it to its end."""
    operation, before = OPERATIONS[name], tmp_path / "before"
    before.mkdir()
    operation.prepare(before)

    def fresh() -> Path:
        shutil.rmtree(tmp_path / "work", ignore_errors=True)
        return Path(shutil.copytree(before, tmp_path / "work"))

    def counted() -> int:
        hook = Interruption(None, 0, tmp_path / "work")
        operation.do(tmp_path / "work")
        return hook.count

    folder = fresh()
    old = str(operation.look(folder)) if name in ANY_TIME else ""
    status, said = in_child(counted)
    assert status == 0, said
    new, changes = str(operation.look(folder)), int(said)
    assert changes > 1
    every = {"bundle is replaced": 12, "run": max(1, changes // 3), "matrix": 4}.get(name, 1)
    for number in some(range(changes), every):
        folder = fresh()

        def interrupted(number: int = number, folder: Path = folder) -> None:
            Interruption(number, sign, folder)
            operation.do(folder)

        status, said = in_child(interrupted)
        case = f"{name}, before change {number} of {changes}"
        if status not in (sign, 130 << 8, 0):
            attack.add("traceback", case, said)
            continue
        try:
            if name in ANY_TIME and (seen := str(operation.look(folder))) not in (old, new):
                attack.add("silent", case, seen)
            status, said = in_child(lambda folder=folder: operation.do(folder))
            if status or str(operation.look(folder)) != new:
                attack.add("lost", case, said or operation.look(folder))
                continue
        except (ValueError, RuntimeError, OSError) as error:
            attack.add("lost", case, error)
            continue
        attack.add("right", case)


@pytest.mark.parametrize("name", list(OPERATIONS), ids=lambda name: str(name).replace(" ", "-"))
def test_full_disks_name_the_file_and_lose_nothing(name: str, attack: Outcomes, tmp_path: Path) -> None:
    """A limit on the size of files stands for a full disk."""
    operation = OPERATIONS[name]
    for limit in (0, 10, 100, 1000, 3000):
        folder = tmp_path / str(limit)
        folder.mkdir()
        operation.prepare(folder)
        old = str(operation.look(folder)) if name in ANY_TIME else ""

        def limited(limit: int = limit, folder: Path = folder) -> str:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
            try:
                operation.do(folder)
            except (OSError, ValueError, RuntimeError) as error:
                resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
                return f"{type(error).__name__}: {error}"
            return "done"

        status, said = in_child(limited)
        if status:
            attack.add("traceback", f"{name}, {limit} bytes", said)
        elif name in ANY_TIME and said != "done" and str(operation.look(folder)) != old:
            attack.add("lost", f"{name}, {limit} bytes", said)
        else:
            attack.add("clear" if said == "done" or str(folder) in said else "unclear", f"{name}, {limit} bytes", said)


def test_a_second_training_in_a_folder_is_refused(attack: Outcomes, tmp_path: Path) -> None:
    for number in range(SCALE):
        folder = tmp_path / str(number)
        working, begun = os.pipe()
        told, go_on = os.pipe()

        def look(agent: Any, begun: int = begun, told: int = told) -> float:
            os.write(begun, b"x")
            os.read(told, 1)  # until the others have been refused, however long that takes
            return 0.0

        child = fork()
        if child == 0:
            try:
                signal.alarm(SECONDS)
                os.close(go_on)
                training.by_return = lambda *arguments: look
                runs.train(ENV, "ppo", 1, folder, {"bundle": "digits", "cost_weight": 2.0}, SHORT)
            finally:
                os._exit(0)
        os.read(working, 1)
        for kwargs, overwrite in (({"cost_weight": 0.05}, True), ({"cost_weight": 2.0}, False)):
            attack.attempt(
                f"a second training, overwrite {overwrite}",
                lambda kwargs=kwargs, overwrite=overwrite, folder=folder: runs.train(
                    ENV, "ppo", 2, folder, {"bundle": "digits", **kwargs}, SHORT, overwrite=overwrite
                ),
                lambda agent: "trained", (runs.RunError, ValueError), str(folder),
            )  # fmt: skip
        attack.attempt(
            "resumed meanwhile",
            lambda folder=folder: runs.resume(folder),
            lambda agent: "resumed",
            (runs.RunError,),
            str(folder),
        )
        os.close(go_on)
        os.waitpid(child, 0)
        for each in (working, begun, told):
            os.close(each)
        config = runs.load(folder)[1]
        attack.add(
            "right" if config["env_kwargs"]["cost_weight"] == 2.0 else "silent", "what the first one wrote", config
        )


def test_readers_of_a_bundle_that_is_replaced_find_a_whole_one(attack: Outcomes, tmp_path: Path) -> None:
    build(tmp_path, 200)
    child = fork()
    if child == 0:
        try:
            signal.alarm(SECONDS)
            for number in range(3 * SCALE):
                build(tmp_path, 200 + 10 * (number % 2))
        finally:
            os._exit(0)
    while os.waitpid(child, os.WNOHANG) == (0, 0):
        attack.attempt("read", lambda: bundle.load(tmp_path / "small"), refused=())


def test_a_file_that_cannot_be_written_is_named(attack: Outcomes, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    for path in (tmp_path / "file" / "a", Path("/proc/nowhere/a"), tmp_path / ("x" * 300), tmp_path):
        attack.attempt(
            str(path), lambda path=path: write_text(path, "x"), lambda done: "written", (OSError,), str(path)[:20]
        )


def test_kinds_that_are_replaced_are_interrupted() -> None:
    assert {"checkpoint", "bundle", "rows", "own run"} <= KINDS.keys()
