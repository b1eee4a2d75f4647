"""How fast is MoEMetaOpt-v0 compared with SGDEnv of DACBench (Eimer et al. 2021)? Same model, data and validation.

DACBench runs in a separate Python environment: moe-benchmark run dacbench --set python=PATH.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import statistics
import subprocess
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from benchmarks.programs import dacbench as program
from benchmarks.programs.dacbench import BATCH, EPOCH, RATE, SECONDS, WIDTH
from benchmarks.results.tables import renamed
from benchmarks.runner.setup import Arguments

TRAININGS, ROUNDS = 64, 5
SEEDS = (0,)
# Optimiser steps between two validations, and whether DACBench gets images for the transforms of its own data sets to
# turn into tensors, or tensors. Both validate on everything.
CASES = [(EPOCH, False), (EPOCH, True), (1, False), (1, True)]
SETTINGS = {
    f"{steps} steps, {'images' if images else 'tensors'}": {"steps": steps, "images": images} for steps, images in CASES
}


class DacbenchSpeed(Arguments):
    """`python` is the path of an interpreter that can import dacbench."""

    steps: int
    images: bool
    python: str = ""

    @property
    def imports(self) -> tuple[str, ...]:
        """What a run of this setup would execute."""
        return (self.python,) if self.python else ()


Setup = DacbenchSpeed


def check(setups: dict[str, DacbenchSpeed], splits: list[str]) -> None:
    """Raise `ValueError` if no interpreter is given."""
    if not all(setup.python for setup in setups.values()):
        raise ValueError("name a Python that has dacbench and torchvision: --set python=PATH")


def measure(setup: DacbenchSpeed, seed: int, split: str, folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Optimiser steps per second of CPU time on one thread, measured in alternation: medians and median ratios.

    Also checks whether DACBench reproduces a training by seed. Raises `ValueError` if DACBench fails.
    """
    with tempfile.TemporaryDirectory() as place:
        script, complaints = _pack(Path(place)), Path(place) / "stderr"
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": place}
        with complaints.open("w") as stderr, subprocess.Popen(
            [str(Path(setup.python).absolute()), script], cwd=place, env=environment,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=stderr, text=True,
        ) as process:  # fmt: skip
            ask, case = partial(_ask, process, complaints), {"steps": setup.steps, "images": setup.images}
            versions = ask({"ask": "versions"})
            runs = [(ours(setup.steps, TRAININGS), ours(setup.steps, 1), ask(case)) for _ in range(ROUNDS)]
            process.communicate("\n")
    many, one, theirs = (statistics.median(c) for c in zip(*((a, b, c["rate"]) for a, b, c in runs), strict=True))
    ratios = {
        "ratio": statistics.median(run[0] / run[2]["rate"] for run in runs),
        "ratio_single": statistics.median(run[1] / run[2]["rate"] for run in runs),
    }
    return {}, {"many": many, "one": one, "dacbench": theirs, **ratios, "dacbench_versions": versions,
                "weights_of_one_seed": runs[0][2]["weights"][:2]}  # fmt: skip


def score(frame: pd.DataFrame) -> dict[str, Any]:
    """One row per case."""
    columns = {
        "steps": "steps between validations", "images": "DACBench gets images", "dacbench": "SGDEnv", "one": "ours",
        "many": f"{TRAININGS} of ours", "ratio_single": "ours / SGDEnv", "ratio": f"{TRAININGS} of ours / SGDEnv",
    }  # fmt: skip
    first, second = frame["weights_of_one_seed"].iloc[0]
    return {
        "tables": {"Optimiser steps per second of CPU time": renamed(frame, columns)},
        "notes": [f"Norm of SGDEnv's last weights, twice from seed 0: {first:.6f}, {second:.6f}."],
    }  # fmt: skip


def _pack(folder: Path) -> str:
    """Copy the files that the DACBench process needs; returns its script."""
    from experts import __file__ as experts
    from experts import tasks

    task = tasks.load("digits")
    np.savez(
        folder / "data.npz",
        inputs=np.concatenate([task.inputs[: EPOCH * BATCH], task.validation_inputs]),
        labels=np.concatenate([task.labels[: EPOCH * BATCH], task.validation_labels]),
    )
    (folder / "experts").mkdir()
    for name in ("__init__.py", "routers.py", "model.py"):
        shutil.copy(Path(experts).parent / name, folder / "experts")
    return str(shutil.copy(program.__file__, folder))


def ours(steps: int, count: int) -> float:
    """Optimiser steps per second of CPU time of MoEMetaOpt-v0, resets included."""
    import gymnasium
    import torch

    torch.set_num_threads(1)
    actions = 20
    env = gymnasium.make_vec(
        "moe_envs:MoEMetaOpt-v0", count, "vector_entry_point", widths=(WIDTH,), target=1.1, steps_per_action=steps,
        max_actions=2 * actions, initial_rate=RATE,
    )  # fmt: skip
    keep = np.ones((count, 4), dtype=np.int64)
    done, begun = 0, time.process_time()
    while time.process_time() - begun < SECONDS:
        env.reset(seed=0)
        for _ in range(actions):
            env.step(keep)
        done += count * actions * steps
    return done / (time.process_time() - begun)


def _ask(process: subprocess.Popen[str], complaints: Path, question: dict[str, Any]) -> dict[str, Any]:
    assert process.stdin is not None
    assert process.stdout is not None
    with contextlib.suppress(BrokenPipeError):
        process.stdin.write(json.dumps(question) + "\n")
        process.stdin.flush()
    line = process.stdout.readline()
    if not line:
        process.wait()
        last = complaints.read_text().strip().splitlines()[-1:]
        raise ValueError(f"this Python does not run DACBench: {' '.join(last)}")
    found: dict[str, Any] = json.loads(line)
    return found
