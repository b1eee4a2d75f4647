"""Time SGDEnv of DACBench (Eimer et al. 2021). This file is copied to a Python environment with torch, torchvision and
dacbench, and run there as a script."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

WIDTH, EXPERTS, BATCH, RATE = 16, 4, 64, 0.01
EPOCH = 15  # optimiser steps
SECONDS = 0.5  # approximate length of a round


class Inputs(torch.utils.data.Dataset[Any]):
    """Our data as a torchvision data set of DACBench: images if DACBench has transforms for them, else tensors."""

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
    """Answer each line of stdin with a JSON line, in the DACBench process."""
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
    """Optimiser steps per second of CPU time of SGDEnv, resets included, and the norm of the final weights."""
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
    # SGDEnv validates on all data if its cutoff is a multiple of an epoch's batches, otherwise on a tenth.
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
