"""Our trainings beside SGDEnv of DACBench (Eimer et al. 2021): the same model, data, batches and validation.

DACBench runs in a Python environment of its own, which has torch, torchvision and dacbench; this file is copied there
and run as a script.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

WIDTH, EXPERTS, BATCH, RATE, ROUNDS = 16, 4, 64, 0.01, 5
EPOCH = 15  # optimiser steps
SECONDS = 0.5  # of a round, about
TRAININGS = 64
# Optimiser steps between two validations, and whether DACBench gets images for the transforms of its own data sets to
# turn into tensors, or tensors. Both validate on everything.
CASES = [(EPOCH, False), (EPOCH, True), (1, False), (1, True)]


def compare(python: str, report: Any) -> dict[str, Any]:
    """Optimiser steps per second of CPU time, one thread, by turns: medians, and the median ratios.

    `python` is an interpreter that can import dacbench. Also whether DACBench's training is the same for the same seed.
    Raises `ValueError` where DACBench does not run.
    """
    with tempfile.TemporaryDirectory() as folder:
        script, complaints = _pack(Path(folder)), Path(folder) / "stderr"
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": folder}
        with complaints.open("w") as stderr, subprocess.Popen(
            [str(Path(python).absolute()), script], cwd=folder, env=environment,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=stderr, text=True,
        ) as process:  # fmt: skip
            ask = partial(_ask, process, complaints)
            versions, rows = ask({"ask": "versions"}), []
            for number, (steps, images) in enumerate(CASES):
                case = {"steps": steps, "images": images}
                runs = [(ours(steps, TRAININGS), ours(steps, 1), ask(case)["rate"]) for _ in range(ROUNDS)]
                many, one, theirs = (statistics.median(column) for column in zip(*runs, strict=True))
                rows.append(case | {
                    "ours": many, "ours_single": one, "dacbench": theirs,
                    "ratio": statistics.median(run[0] / run[2] for run in runs),
                    "ratio_single": statistics.median(run[1] / run[2] for run in runs),
                })  # fmt: skip
                report((number + 1) / len(CASES))
            weights = ask({"steps": EPOCH, "images": False})["weights"]
            process.communicate("\n")
    return {"rows": rows, "versions": versions, "weights_of_one_seed": weights[:2]}


def _pack(folder: Path) -> str:
    """Copy what DACBench's process needs; its script."""
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
    return str(shutil.copy(__file__, folder))


def ours(steps: int, count: int) -> float:
    """Optimiser steps per second of CPU time of MoEMetaOpt-v0, resets included."""
    import gymnasium

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


class Inputs(torch.utils.data.Dataset[Any]):
    """Our data as a torchvision data set of DACBench: tensors, or images where it has transforms for them."""

    def __init__(self, path: str, train: bool, transform: Any = None, download: bool = False) -> None:
        found = np.load(Path(path) / "data.npz")
        count = len(found["labels"]) if train else BATCH
        self.inputs, self.labels, self.transform = torch.from_numpy(found["inputs"][:count]), found["labels"], transform
        if transform is not None:
            from PIL import Image

            pixels = (self.inputs.clip(-2, 2) * 63 + 128).to(torch.uint8).reshape(-1, 8, 8).numpy()
            self.images = [Image.fromarray(image) for image in pixels]

    def __len__(self) -> int:
        return len(self.inputs)

    def __getitem__(self, place: int) -> tuple[torch.Tensor, int]:
        found = self.inputs[place] if self.transform is None else self.transform(self.images[place])
        return found, int(self.labels[place])


def main() -> None:
    """In DACBench's process: answer each line of stdin with one of JSON."""
    from importlib.metadata import version

    torch.set_num_threads(1)
    for line in sys.stdin:
        if not line.strip():
            break
        question = json.loads(line)
        if "ask" in question:
            answer: dict[str, Any] = {name: version(name) for name in ("dacbench", "torch")}
        else:
            answer = theirs(**question)
        print(json.dumps(answer), flush=True)


def theirs(steps: int, images: bool) -> dict[str, Any]:
    """Optimiser steps per second of CPU time of DACBench's SGDEnv, resets included, and each last weights' norm."""
    from dacbench.abstract_benchmark import objdict
    from dacbench.benchmarks.sgd_benchmark import SGD_DEFAULTS
    from dacbench.envs.env_utils.sgd_utils import DATASETS
    from dacbench.envs.sgd import SGDEnv, SGDInstance
    from torchvision import datasets

    from experts.model import MoEClassifier

    datasets.Ours = Inputs
    transforms = DATASETS["FashionMNIST"] if images else {"train_transform": None, "test_transform": None}
    count, actions = len(np.load("data.npz")["labels"]), 20
    instance = SGDInstance(
        model=lambda: torch.nn.Sequential(torch.nn.Flatten(), MoEClassifier(64, 10, widths=(WIDTH,) * EXPERTS)),
        optimizer_type=torch.optim.AdamW, optimizer_params={}, dataset_path=".", dataset_name="Ours", batch_size=BATCH,
        fraction_of_dataset=1.0, train_validation_ratio=(EPOCH * BATCH + 0.5) / count, seed=0,
    )  # fmt: skip
    config = objdict(SGD_DEFAULTS.copy())
    config.update(
        loss_function=torch.nn.CrossEntropyLoss, loss_function_kwargs={"reduction": "none"}, epoch_mode=steps > 1,
        dataset_config={"Ours": transforms}, instance_set={0: instance}, cutoff=actions * EPOCH,
    )  # fmt: skip
    # SGDEnv validates on everything where its cutoff is a multiple of an epoch's batches, else on a tenth.
    env, begun = SGDEnv(config), time.process_time()
    weights: list[float] = []
    while time.process_time() - begun < SECONDS or len(weights) < 2:
        env.reset(seed=0)
        for _ in range(actions):
            env.step(RATE)
        weights.append(float(torch.nn.utils.parameters_to_vector(env.model.parameters()).norm().detach()))
    return {"rate": len(weights) * actions * steps / (time.process_time() - begun), "weights": weights}


if __name__ == "__main__":
    main()
