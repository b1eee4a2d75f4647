"""The state of a run in one file, written atomically and sealed, from which the run goes on exactly."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save as to_bytes

from cost.arguments import one_line
from cost.files import read_arrays, sealed, sha256_of, write_bytes
from experts.continual.inputs import Encoding
from experts.continual.learner import AT_ONCE, StreamLearner
from experts.continual.network import of_weights
from experts.continual.result import Curves, as_content
from experts.continual.strategy import NetworkShape
from experts.data import DataError

FILE = "checkpoint.safetensors"


def save(learner: StreamLearner, path: Path) -> None:
    """Write the state of a run."""
    network = learner.network
    arrays: dict[str, torch.Tensor] = {f"network/{name}": each for name, each in network.state_dict().items()}
    if learner.begun:
        for number, state in learner.optimizer.state_dict()["state"].items():
            arrays |= {f"optimizer/{number}/{name}": torch.as_tensor(each) for name, each in state.items()}
    if learner.snapshot is not None:
        arrays |= {f"snapshot/{name}": each for name, each in learner.snapshot.state_dict().items()}
    if learner.buffer is not None:
        arrays |= {f"buffer/{name}": torch.from_numpy(each) for name, each in learner.buffer.state().items()}
    if learner.importance is not None:
        arrays |= {f"importance/{name}": each for name, each in learner.importance.state().items()}
    arrays |= {"loads": torch.from_numpy(learner.loads_TE), "slow": torch.from_numpy(learner.slow_E)}
    arrays = {name: each.detach().contiguous().clone() for name, each in arrays.items()}
    said = json.dumps({
        "run": _digest(learner), "task": learner.task, "step": learner.step, "begun": learner.begun,
        "seconds": learner.seconds, "curves": learner.curves.content(), "chosen": learner.chosen,
        "shape": as_content(learner.shape), "inputs": learner.stream.shape,
    })  # fmt: skip
    write_bytes(path, to_bytes(arrays, sealed(arrays, said)))


def restore(learner: StreamLearner, path: Path) -> None:
    """Let a learner go on from a checkpoint, if there is one; raises `DataError` for one that is damaged or of another
    run."""
    if not path.exists():
        return
    metadata, read = read_arrays(path, DataError, "remove the folder to begin anew")
    try:
        said = json.loads(metadata["settings"])
        if said["run"] != _digest(learner):
            raise ValueError("it is of another stream, strategy, seed or shape: name another folder")
        _take(learner, said, {name: torch.from_numpy(each.copy()) for name, each in read.items()})
    except (KeyError, ValueError, TypeError, RuntimeError, AttributeError, IndexError) as error:
        raise DataError(f"{path} does not fit the run: {one_line(error)}") from error


def predictor(path: Path) -> Callable[[np.ndarray], np.ndarray]:
    """The network of a checkpoint: inputs `[n, ...]` as the stream has them to logits `[n, C]` of all classes so far.

    Raises `DataError` for a file that is damaged, absent or of a run that has not begun, and for a gate that needs the
    task.
    """
    metadata, read = read_arrays(path, DataError, "run the stream with folder=")
    try:
        said = json.loads(metadata["settings"])
        last = said["chosen"][-1]
        if last["gate"] not in ("input", "domain"):
            raise ValueError(f"its gate needs the {last['gate']}")
        encoding = Encoding(tuple(said["inputs"]), last["side"], last["bits"])
        shape = NetworkShape(**said["shape"] | {"channels": tuple(said["shape"]["channels"])})
        if any(not isinstance(getattr(shape, name), int) for name in ("d_model", "d_ff", "num_experts", "k")):
            raise ValueError(f"its shape is {shape}")
        weights = {name[8:]: torch.from_numpy(each.copy()) for name, each in read.items() if name[:8] == "network/"}
        network = of_weights(encoding.decoded, shape, weights)
    except (KeyError, ValueError, TypeError, RuntimeError, IndexError) as error:
        raise DataError(f"{path} gives no predictor: {one_line(error)}") from error

    @torch.no_grad()
    def predict(inputs: np.ndarray) -> np.ndarray:
        found = [np.zeros((0, network.num_classes), np.float32)]
        for start in range(0, len(inputs), AT_ONCE):
            x = encoding.decode(encoding.encode(inputs[start : start + AT_ONCE]))
            found.append(network(x, network.similar_tasks(x) if last["gate"] == "domain" else None)[0].numpy())
        return np.concatenate(found)

    return predict


def _take(learner: StreamLearner, said: dict[str, Any], arrays: dict[str, torch.Tensor]) -> None:
    def part(name: str) -> dict[str, torch.Tensor]:
        return {key[len(name) + 1 :]: each for key, each in arrays.items() if key.startswith(f"{name}/")}

    inputs = learner.encoding.decoded
    learner.network = of_weights(inputs, learner.shape, part("network"))
    if snapshot := part("snapshot"):
        learner.snapshot = of_weights(inputs, learner.shape, snapshot).requires_grad_(False)
    if learner.buffer is not None:
        learner.buffer.restore({name: each.numpy() for name, each in part("buffer").items()})
    if learner.importance is not None:
        learner.importance.restore(part("importance"), learner.network)
    learner.task, learner.step, learner.begun = int(said["task"]), int(said["step"]), bool(said["begun"])
    learner.seconds, learner.curves = float(said["seconds"]), Curves.of(said["curves"])
    learner.loads_TE, learner.slow_E, learner.chosen = arrays["loads"].numpy(), arrays["slow"].numpy(), said["chosen"]
    choices = [learner.choice(task) for task in range(learner.task + learner.begun)]
    if [as_content(each) for each in choices] != learner.chosen:
        raise ValueError("its control chose other strategies: name another folder")
    if not learner.begun:
        return
    learner.take(choices[-1])
    learner.optimizer = learner.new_optimizer()
    state: dict[int, dict[str, torch.Tensor]] = {}
    for name, each in part("optimizer").items():
        state.setdefault(int(name.split("/")[0]), {})[name.split("/")[1]] = each
    groups = learner.optimizer.state_dict()["param_groups"]
    learner.optimizer.load_state_dict({"state": state, "param_groups": groups})


def _digest(learner: StreamLearner) -> str:
    """SHA-256 of what a run is begun with, its data included."""
    stream = learner.stream
    content = {
        "stream": stream.name, "scenario": stream.scenario, "shape": as_content(learner.shape),
        "strategy": as_content(learner.whole), "seed": learner.seed, "split": learner.split,
        "scratch": learner.scratch, "data": stream.sha256,
    }  # fmt: skip
    return sha256_of(json.dumps(content, sort_keys=True).encode())
