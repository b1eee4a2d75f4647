"""Ray's workers make the rows that processes make, through kills of workers; they need the extra ray."""

import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from benchmarks.runner import runner
from benchmarks.runner.matrix import Matrix, jobs_of
from benchmarks.runner.rows import read
from tests.processes import running

pytest.importorskip("ray", reason="needs the extra ray")
KILLS = int(os.environ.get("MOE_ENVS_KILLS", "3"))  # MOE_ENVS_KILLS=20 pytest tests/benchmarks/test_ray.py


def workers(process: "subprocess.Popen[str]") -> list[psutil.Process]:
    """The processes in which Ray now makes runs."""
    found = []
    for each in psutil.Process(process.pid).children(recursive=True):
        try:
            found += [each] if each.cmdline()[:1] == ["ray::_call"] else []
        except psutil.Error:
            continue
    return found


def test_killed_workers_change_no_row(tiny: Path, tmp_path: Path) -> None:
    setups = {f"setup {number}": {"factor": number, "seconds": 0.3} for number in range(1, 2 + KILLS)}
    matrix = Matrix(experiment="small.tiny", seeds=[1, 2], setups=setups)
    path, serial, out = tmp_path / "matrix.json", tmp_path / "serial", tmp_path / "out"
    path.write_text(matrix.model_dump_json())
    code = "from benchmarks.cli.main import benchmark; benchmark()"
    command = [sys.executable, "-c", code, "run", str(path), "--out", str(out), "--jobs", "2", "--ray"]
    command += ["--trust", "small.tiny"]
    draw, kills, rows = random.Random(0), 0, 0
    for _ in range(5):  # a run killed three times is left to the next call
        if len(read(out / "raw.jsonl", cut=True)) == len(jobs_of(matrix)):
            break
        with running(command, stdout=subprocess.DEVNULL) as process:
            while process.poll() is None:
                busy, now = workers(process), len(read(out / "raw.jsonl", cut=True))
                if busy and kills < KILLS and (not kills or now > rows):
                    draw.choice(busy).kill()
                    kills, rows = kills + 1, now
                time.sleep(draw.uniform(0, 0.2))
    assert kills == KILLS
    runner.run(matrix, serial)
    made = [
        [row.model_dump(exclude={"measured", "attempts", "sha256"}) for row in read(folder / "raw.jsonl")]
        for folder in (out, serial)
    ]
    assert json.dumps(made[0], default=str) == json.dumps(made[1], default=str)
