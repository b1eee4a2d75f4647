"""The runner: nothing lost, nothing twice, and the same rows however they were made."""

import json
import os
import random
import subprocess
import sys
import time
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from filelock import FileLock

from benchmarks.runner import processes, runner
from benchmarks.runner.experiments import RunnerError
from benchmarks.runner.matrix import Matrix, jobs_of, load_matrix
from benchmarks.runner.rows import read
from tests.processes import SECONDS, running, wait_until

KILLS = int(os.environ.get("MOE_ENVS_KILLS", "3"))  # MOE_ENVS_KILLS=20 pytest tests/benchmarks/test_runner.py
pytestmark = pytest.mark.usefixtures("tiny")


def matrix(**more: Any) -> Matrix:
    return Matrix(**{"experiment": "small.tiny", "seeds": [1, 2], **more})


def lasting(folder: Path) -> list[dict[str, Any]]:
    """The rows, times aside."""
    rows = [json.loads(line) for line in (folder / "raw.jsonl").read_text().splitlines()]
    return [row | {"measured": {}, "sha256": ""} for row in rows]


def lines_of(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


def test_rows_are_the_same_in_one_process_and_in_two(tmp_path: Path) -> None:
    slow = {"slow": {"factor": 2, "seconds": 0.5}, "quick": {}}  # the second to begin is the first to end
    one, two = tmp_path / "one", tmp_path / "two"
    assert runner.run(matrix(setups=slow), one) == runner.run(matrix(setups=slow), two, processes=2) == 8
    assert json.dumps(lasting(one)) == json.dumps(lasting(two))
    assert [(row["split"], row["seed"], row["setup"]) for row in lasting(one)] == [
        (split, seed, name) for split in ("test", "other") for seed in (1, 2) for name in ("slow", "quick")
    ]
    assert [row["metrics"]["value"] for row in lasting(one)[:4]] == [2, 1, 4, 2]


def test_a_second_call_does_nothing_and_more_seeds_are_added(tmp_path: Path) -> None:
    runner.run(matrix(), tmp_path)
    assert runner.rebuild(tmp_path)
    content = {path: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}
    assert runner.run(matrix(), tmp_path) == 0
    assert not runner.rebuild(tmp_path)
    assert {path: path.read_bytes() for path in content} == content
    assert "mean 3" in (tmp_path / "report.md").read_text()
    assert "8 of 8 runs" in (tmp_path / "report.md").read_text()
    assert runner.run(matrix(seeds=[1, 2, 6]), tmp_path) == 4
    assert runner.rebuild(tmp_path)
    assert json.loads((tmp_path / "results.json").read_text())["mean"] == 6
    assert runner.run(matrix(), tmp_path) == 0  # rows of other matrices stay, and do not count
    assert runner.rebuild(tmp_path)
    assert (json.loads((tmp_path / "results.json").read_text())["mean"], len(lasting(tmp_path))) == (3, 12)


def test_kills_lose_no_finished_row_and_duplicate_none(tmp_path: Path) -> None:
    path, out = tmp_path / "matrix.json", tmp_path / "out"
    setups = {
        f"setup {number}": {"factor": number, "seconds": 0.05 * (number % 8)} for number in range(1, 4 + 2 * KILLS)
    }
    path.write_text(matrix(setups=setups).model_dump_json())
    code = "from benchmarks.cli.main import benchmark; benchmark()"
    command = [sys.executable, "-c", code, "run", str(path), "--out", str(out), "--jobs", "2"]
    command += ["--trust", "small.tiny"]
    draw, finished = random.Random(0), {}
    for _ in range(KILLS):
        wanted = len(finished) + draw.randint(0, 4)  # by progress, not by the clock, whatever the machine
        with running(command, stdout=subprocess.DEVNULL) as process:
            wait_until(lambda wanted=wanted: lines_of(out / "raw.jsonl") >= wanted, process)
            time.sleep(draw.uniform(0, 0.3))
            process.kill()
        now = {row.config_hash: row for row in read(out / "raw.jsonl", cut=True)}
        assert finished.items() <= now.items()
        finished = now
    assert 0 < len(finished) < 4 * len(setups)
    done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS)
    assert done.returncode == 0, done.stderr
    hashes = [row.config_hash for row in read(out / "raw.jsonl")]
    assert hashes == [job.key for job in jobs_of(load_matrix(path))]
    assert finished.items() <= {row.config_hash: row for row in read(out / "raw.jsonl")}.items()
    again = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS)
    assert again.returncode == 0
    assert "nothing to do" in again.stdout


def test_what_a_kill_cut_short_is_made_again(tmp_path: Path) -> None:
    runner.run(matrix(), tmp_path)
    path = tmp_path / "raw.jsonl"
    whole = path.read_bytes()
    path.write_bytes(whole[:-30])
    with pytest.warns(UserWarning, match="its last line is cut off"):
        assert len(read(path)) == 7
    assert runner.run(matrix(), tmp_path) == 1
    assert len(path.read_bytes().splitlines()) == 8
    assert path.read_bytes().startswith(whole.rpartition(b"\n{")[0])
    path.write_bytes(whole[-50:-1])  # nothing whole is left, and the only run fails
    with pytest.raises(RunnerError, match="1 of 1 runs"):
        runner.run(matrix(setups={"fails": {"factor": 5, "fails": 99}}, seeds=[1], splits=["test"]), tmp_path)


def test_rows_that_a_kill_left_out_of_order_are_put_in_order(tmp_path: Path) -> None:
    runner.run(matrix(), tmp_path)
    path = tmp_path / "raw.jsonl"
    whole = path.read_bytes()
    path.write_bytes(b"".join(reversed(whole.splitlines(keepends=True))))
    assert runner.run(matrix(), tmp_path) == 0
    assert path.read_bytes() == whole


def test_some_setups_are_run_and_the_matrix_stays_whole(tmp_path: Path) -> None:
    assert runner.run(matrix(), tmp_path, only=["three"]) == 4
    assert runner.rebuild(tmp_path)
    assert "4 of 8 runs" in (tmp_path / "report.md").read_text()
    with pytest.raises(RunnerError, match="no setup 'two'; there are one, three"):
        runner.run(matrix(), tmp_path, only=["two"])


def test_a_number_that_is_none_is_no_result(tmp_path: Path) -> None:
    setups = {"endless": {"factor": 1}}
    code = (
        (tmp_path / "own" / "small" / "tiny.py")
        .read_text()
        .replace('"value": setup.factor * seed', '"value": float("nan")')
    )
    (tmp_path / "own" / "small" / "tiny.py").write_text(code)
    with pytest.raises(RunnerError, match="value is nan: no JSON; numbers must be finite"):
        runner.run(matrix(setups=setups, seeds=[1], splits=["test"]), tmp_path)


def test_a_run_that_fails_or_dies_is_tried_twice_more(tmp_path: Path) -> None:
    setups = {"fails": {"factor": 1, "fails": 2}, "dies": {"factor": 2, "dies": 1}, "well": {"factor": 3}}
    assert runner.run(matrix(setups=setups, seeds=[1], splits=["test"]), tmp_path, processes=2) == 3
    assert {row["setup"]: row["attempts"] for row in lasting(tmp_path)} == {"fails": 3, "dies": 2, "well": 1}
    assert not (tmp_path / "failed-0-of-1.json").exists()


def test_too_many_failures_stop_the_rest_and_are_told(tmp_path: Path) -> None:
    setups = {"fails": {"factor": 1, "fails": 99}, "slow": {"factor": 2, "seconds": 1.0}}
    wanted = matrix(setups=setups, seeds=list(range(8)), splits=["test"])
    with pytest.raises(RunnerError, match=r"1 of 16 runs failed 3 times[\s\S]*fails, seed 0, test: ValueError"):
        runner.run(wanted, tmp_path)
    assert len(read(tmp_path / "raw.jsonl")) < 8
    (failure,) = json.loads((tmp_path / "failed-0-of-1.json").read_text())
    assert (failure["setup"], failure["seed"], failure["error"]) == ("fails", 0, "ValueError('try 2')")
    assert "in measure" in failure["trace"]
    assert runner.run(matrix(setups={"well": {}}, seeds=[5], splits=["test"]), tmp_path / "other") == 1


def test_few_failures_let_the_rest_finish(tmp_path: Path) -> None:
    setups = {"fails": {"factor": 77, "fails": 99}} | {f"well {number}": {"factor": number} for number in range(20)}
    with pytest.raises(RunnerError, match="1 of 21 runs"):
        runner.run(matrix(setups=setups, seeds=[1], splits=["test"]), tmp_path, processes=2)
    assert len(lasting(tmp_path)) == 20
    assert runner.rebuild(tmp_path)
    assert "20 of 21 runs" in (tmp_path / "report.md").read_text()


def test_parts_make_the_whole(tmp_path: Path) -> None:
    assert [runner.run(matrix(), tmp_path, part=(part, 3)) for part in range(3)] == [4, 2, 2]
    assert [row.config_hash for row in read(tmp_path / "raw.jsonl")] == [j.key for j in jobs_of(matrix())]
    script = runner.slurm(tmp_path / "matrix.json", tmp_path, 3)
    assert "--array=0-2" in script
    assert f"moe-benchmark run {tmp_path}/matrix.json --out {tmp_path} --part" in script
    assert "run 'my dir/matrix.json'" in runner.slurm(Path("my dir/matrix.json"), tmp_path, 3)


def test_only_one_runs_in_a_folder(tmp_path: Path) -> None:
    with FileLock(tmp_path / ".running-0-of-1.lock"), pytest.raises(RunnerError, match="in use by another process"):
        runner.run(matrix(), tmp_path)


def test_damaged_rows_are_named_and_left_as_they_are(tmp_path: Path) -> None:
    runner.run(matrix(), tmp_path)
    path = tmp_path / "raw.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    for altered, message in (
        (lines[1].replace('"metrics"', '"metric"'), "line 2, is not a row: metrics: Field required"),
        (
            lines[1].replace('"factor": 3', '"factor": 4'),
            "line 2, is not a row: its config_hash is not that of its arguments",
        ),
        ("nonsense\n", "line 2, is not a row: Invalid JSON"),
    ):
        path.write_text(lines[0] + altered + "".join(lines[2:]))
        before = path.read_bytes()
        with pytest.raises(RunnerError, match=message):
            runner.run(matrix(seeds=[1, 2, 3]), tmp_path)
        assert path.read_bytes() == before


def test_parts_share_the_seeds_of_each_setup() -> None:
    every = jobs_of(Matrix(experiment="models"))
    for parts in (3, 7, 8):
        places = runner._places(every, parts)
        groups: dict[tuple[str, int], set[int]] = {}
        for job, place in zip(every, places, strict=True):
            groups.setdefault((job.setup, job.seed), set()).add(place)
        assert {len(each) for each in groups.values()} == {1}
        counts = np.bincount(places, minlength=parts)
        assert counts.max() - counts.min() <= 36  # splits of one seed of a setup
        for name in dict.fromkeys(job.setup for job in every):
            mine = [part for (setup, _), (part,) in groups.items() if setup == name]
            assert len(set(mine)) == len(mine)


def test_a_folder_of_another_experiment_stays_as_it_is(tmp_path: Path) -> None:
    runner.run(matrix(), tmp_path)
    before = (tmp_path / "matrix.json").read_bytes()
    with pytest.raises(RunnerError, match=r"is a folder of small.tiny, not of models: another --out"):
        runner.run(Matrix(experiment="models"), tmp_path)
    assert (tmp_path / "matrix.json").read_bytes() == before


def test_a_name_that_two_things_have_is_refused(tmp_path: Path, tiny: Path) -> None:
    path = tiny / "small" / "tiny.py"
    code = path.read_text()
    for name in ("value", "seed", "factor"):
        path.write_text(code.replace('{"at": time', f'{{"{name}": 1.0, "at": time'))
        with pytest.raises(RunnerError, match=f"{name}: of arguments, metrics and what is measured each needs a name"):
            runner.run(matrix(seeds=[1], splits=["test"], setups={"one": {}}), tmp_path)


def test_a_call_that_cannot_run_changes_nothing(tmp_path: Path) -> None:
    runner.run(matrix(), tmp_path)
    (tmp_path / "failed-0-of-1.json").write_text("[]")
    before = (tmp_path / "matrix.json").read_bytes()
    with pytest.raises(RunnerError, match="no setup 'typo'"):
        runner.run(matrix(seeds=[1, 2, 3]), tmp_path, only=["typo"])
    assert (tmp_path / "matrix.json").read_bytes() == before
    assert (tmp_path / "failed-0-of-1.json").exists()


def test_more_than_five_percent_are_of_what_is_run(tmp_path: Path) -> None:
    setups = {"fails": {"factor": 77, "fails": 99}, "well": {}}
    wanted = matrix(setups=setups, seeds=list(range(30)), splits=["test"])
    with pytest.raises(RunnerError, match="2 of 30 runs failed"):
        runner.run(wanted, tmp_path, only=["fails"])


def test_a_process_that_dies_with_nothing_to_do_is_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Dead:
        def submit(self, *arguments: object) -> None:
            raise BrokenProcessPool("its process died")

        def shutdown(self) -> None:
            pass

    real, made = processes.pool, list[Any]()

    def pool() -> Any:
        made.append(Dead() if not made else real())
        return made[-1]

    monkeypatch.setattr(processes, "pool", pool)
    assert runner.run(matrix(seeds=[1], splits=["test"]), tmp_path) == 2
    assert {row["attempts"] for row in lasting(tmp_path)} == {1}


def test_a_result_that_is_no_json_is_named(tmp_path: Path, tiny: Path) -> None:
    path = tiny / "small" / "tiny.py"
    path.write_text(path.read_text().replace('"value": setup', '"value": object() or setup'))
    with pytest.raises(RunnerError, match="value is <object object"):
        runner.run(matrix(seeds=[1], splits=["test"], setups={"one": {}}), tmp_path)
