"""Run folders: one training of an SB3 algorithm, with everything needed to evaluate or repeat it, and no pickle.

`run.json` (environment, settings, seed, commit, machine, versions, SHA-256 of the weights), `policy.safetensors`,
`episodes.csv` and TensorBoard logs.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from cost.files import write_text
from cost.machine import fingerprint
from experts.bundle import source_commit

if TYPE_CHECKING:
    from stable_baselines3.common.base_class import BaseAlgorithm

FORMAT = 1
SETTINGS, WEIGHTS, EPISODES = "run.json", "policy.safetensors", "episodes.csv"
PACKAGES = ("moe-envs", "gymnasium", "stable-baselines3", "torch", "numpy")


class RunError(RuntimeError):
    """A run folder is absent, damaged or foreign; the message names the file and the cause."""


def provenance() -> dict[str, Any]:
    """The commit (None outside a git checkout), the machine's fingerprint and the versions of the main libraries."""
    return {
        "commit": source_commit(),
        "fingerprint": fingerprint(),
        "versions": {package: version(package) for package in PACKAGES},
    }


def save(folder: Path, model: BaseAlgorithm, config: dict[str, Any], episodes: pd.DataFrame) -> None:
    """Write a finished run; `run.json` comes last and says with its hash that the rest is whole."""
    from safetensors.torch import save as dump

    weights = dump({name: value.contiguous() for name, value in model.policy.state_dict().items()})
    folder.mkdir(parents=True, exist_ok=True)
    partial = folder / f".{WEIGHTS}"
    partial.write_bytes(weights)
    partial.replace(folder / WEIGHTS)
    write_text(folder / EPISODES, episodes.to_csv(index=False))
    content = {"format": FORMAT, **config, **provenance(), "sha256": hashlib.sha256(weights).hexdigest()}
    write_text(folder / SETTINGS, json.dumps(content, indent=1))


def train(
    env_id: str,
    algo: str,
    seed: int,
    folder: Path,
    env_kwargs: dict[str, Any],
    overrides: dict[str, Any] | None = None,
    progress: Callable[[float], object] = lambda share: None,
) -> BaseAlgorithm:
    """Train an SB3 algorithm with its tuned settings, keep the weights that are best on validation, save the run.

    `progress` is called with the share that is done. One torch thread: more would only slow such small networks down.
    """
    import torch

    from agents import sb3

    if "split" in env_kwargs:
        raise ValueError("training is on the split rl_train and chooses on validation; split is for moe-eval")
    torch.set_num_threads(1)
    settings = sb3.settings(algo, env_id, **(overrides or {}))
    shutil.rmtree(folder / "tensorboard", ignore_errors=True)
    env = sb3.make_sb3_vec(env_id, settings["n_envs"], **env_kwargs)
    model = sb3.make_algorithm(algo, env, seed, settings, log=str(folder / "tensorboard"))
    costs = sb3.CostLogger()
    model.learn(settings["total_timesteps"], [costs, sb3.KeepBest(env_id, env_kwargs), sb3.Progress(progress)])
    config = {"env": env_id, "env_kwargs": env_kwargs, "algo": algo, "seed": seed, "settings": settings}
    config["cost_weight"] = env.get_attr("reward")[0].cost_weight
    save(folder, model, config, pd.DataFrame(costs.records))
    return model


def finished(folder: Path, wanted: dict[str, Any]) -> bool:
    """Whether the folder holds a finished run of this configuration, trained by the code of this commit."""
    if not (folder / SETTINGS).exists():
        return False
    config = load_config(folder)
    wanted = json.loads(json.dumps(wanted)) | {"commit": source_commit()}
    return all(config.get(key) == value for key, value in wanted.items())


def load_config(folder: Path) -> dict[str, Any]:
    """What `run.json` says; raises `RunError` where the folder holds no finished run."""
    try:
        config = json.loads((folder / SETTINGS).read_text())
        if config["format"] != FORMAT:
            raise RunError(f"{folder / SETTINGS} is of format {config['format']}; this moe-envs reads {FORMAT}")
        if missing := {"env", "env_kwargs", "algo", "seed", "settings", "cost_weight", "sha256"} - config.keys():
            raise KeyError(f"no {', '.join(sorted(missing))}")
    except OSError as error:
        raise RunError(f"{folder} holds no finished run: {SETTINGS} cannot be read ({error.strerror})") from error
    except (ValueError, KeyError, TypeError) as error:
        raise RunError(f"{folder / SETTINGS} is damaged or foreign: {error!r}") from error
    return dict(config)


def load(folder: Path) -> tuple[BaseAlgorithm, dict[str, Any]]:
    """The trained model of a run and its configuration; nothing is unpickled."""
    from safetensors import SafetensorError
    from safetensors.torch import load as parse

    from agents.sb3 import make_algorithm, make_sb3_vec

    config = load_config(folder)
    try:
        raw = (folder / WEIGHTS).read_bytes()
    except OSError as error:
        raise RunError(f"{folder / WEIGHTS} cannot be read: {error.strerror}") from error
    if hashlib.sha256(raw).hexdigest() != config["sha256"]:
        raise RunError(f"{folder / WEIGHTS} is damaged: its SHA-256 is not the one in {SETTINGS}")
    env = make_sb3_vec(config["env"], config["settings"]["n_envs"], **config["env_kwargs"])
    model = make_algorithm(config["algo"], env, config["seed"], config["settings"])
    try:
        model.policy.load_state_dict(parse(raw))
    except (SafetensorError, RuntimeError) as error:
        raise RunError(
            f"{folder / WEIGHTS} does not fit a {config['algo']} policy of {config['env']}: {error}"
        ) from error
    return model, config
