"""Run folders: one training, with everything needed to evaluate or repeat it, and no pickle.

`run.json` (environment, settings, seed, commit, machine, versions, SHA-256 of the weights), `episodes.csv`, TensorBoard
logs and the weights: `policy.safetensors` of an SB3 algorithm; of ours the folder `best`, and the newest checkpoints.
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

from agents import checkpoints, tuned
from agents.checkpoints import MANIFEST, foreign
from benchmarks import backends
from cost.files import load_json, save_json, write_text
from cost.machine import fingerprint
from experts.bundle import source_commit

if TYPE_CHECKING:
    from stable_baselines3.common.base_class import BaseAlgorithm

    from agents.evaluate import Policy
    from agents.learner import Learner

FORMAT = 1
SETTINGS, WEIGHTS, EPISODES = "run.json", "policy.safetensors", "episodes.csv"
STARTED, BEST = "started.json", "best"
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


def train(
    env_id: str,
    algo: str,
    seed: int,
    folder: Path,
    env_kwargs: dict[str, Any],
    overrides: dict[str, Any] | None = None,
    progress: Callable[[float], object] = lambda share: None,
    backend: str = "sb3",
    overwrite: bool = False,
) -> Policy:
    """Train an algorithm with its tuned settings, keep the weights that are best on validation, save the run.

    A run that is in the folder, finished or not, is an error, or with `overwrite` replaced. `progress` is called with
    the share that is done. One torch thread: more would only slow such small networks down.
    """
    require_free(folder, env_kwargs, overwrite)
    settings = tuned.settings(algo, env_id, backend, **(overrides or {}))
    config = {"env": env_id, "env_kwargs": env_kwargs, "algo": algo, "backend": backend, "seed": seed}
    config["settings"] = settings
    if backend == "sb3":
        return _train_sb3(folder, config, progress)
    return _begin_own(folder, config, progress)


def require_free(folder: Path, env_kwargs: dict[str, Any], overwrite: bool) -> None:
    """Raise `ValueError` where a training cannot begin in the folder: a run is there and not to be replaced, or what
    looks like a run's files and is not of one."""
    if "split" in env_kwargs:
        raise ValueError("training is on the split rl_train and chooses on validation; split is for moe-eval")
    if (folder / SETTINGS).exists() and not overwrite:
        raise ValueError(f"{folder} holds a finished run; --overwrite replaces it, --out names another folder")
    if (folder / STARTED).exists() and not overwrite:
        raise ValueError(
            f"{folder} holds an interrupted run; --resume {folder} goes on (of backend own), --overwrite begins anew"
        )
    if (there := _files(folder)) and not (folder / SETTINGS).exists() and not (folder / STARTED).exists():
        raise ValueError(f"{there[0]} is not of a run of moe-train and would be lost; --out names another folder")


def resume(folder: Path, progress: Callable[[float], object] = lambda share: None) -> Policy:
    """Go on with an interrupted training of one of our learners as if it had never stopped, bit for bit."""
    if (folder / SETTINGS).exists():
        raise ValueError(f"{folder} holds a finished run; moe-eval evaluates it")
    config = load_json(folder / STARTED, RunError, "only runs of --backend own that were interrupted can be resumed")
    if config["backend"] != "own":
        raise ValueError(f"{folder} is a run of {config['backend']}, which cannot be resumed; --overwrite begins anew")
    if not checkpoints.of_run(folder):
        return _begin_own(folder, config, progress)
    agent = backends.own(config["algo"]).resume(folder, folder / "tensorboard")
    return _train_own(agent, folder, config, progress)


def _begin_own(folder: Path, config: dict[str, Any], progress: Callable[[float], object]) -> Learner:
    settings = config["settings"]
    agent = backends.make(config["env"], config["algo"], "own", config["env_kwargs"], config["seed"], settings)
    agent.tensorboard_log, agent.goal = folder / "tensorboard", settings["total_timesteps"]
    _clear(folder, config)
    return _train_own(agent, folder, config, progress)


def _train_sb3(folder: Path, config: dict[str, Any], progress: Callable[[float], object]) -> BaseAlgorithm:
    import torch
    from safetensors.torch import save as dump

    from agents import sb3

    torch.set_num_threads(1)
    settings, env_kwargs = config["settings"], config["env_kwargs"]
    env = sb3.make_sb3_vec(config["env"], settings["n_envs"], **env_kwargs)
    model = sb3.make_algorithm(config["algo"], env, config["seed"], settings, log=str(folder / "tensorboard"))
    _clear(folder, config)
    costs = sb3.CostLogger()
    callbacks = [costs, sb3.KeepBest(config["env"], env_kwargs), sb3.Progress(progress)]
    model.learn(settings["total_timesteps"], callbacks)
    weights = dump({name: value.contiguous() for name, value in model.policy.state_dict().items()})
    folder.mkdir(parents=True, exist_ok=True)
    partial = folder / f".{WEIGHTS}"
    partial.write_bytes(weights)
    partial.replace(folder / WEIGHTS)
    write_text(folder / EPISODES, pd.DataFrame(costs.records).to_csv(index=False))
    _finish(folder, config | {"cost_weight": env.get_attr("reward")[0].cost_weight}, weights)
    return model


def _train_own(agent: Learner, folder: Path, config: dict[str, Any], progress: Callable[[float], object]) -> Learner:
    from agents.best import Best

    best = Best(folder / BEST, agent, config["env"], config["env_kwargs"])

    def after(agent: Learner) -> None:
        best(agent)
        progress(agent.num_timesteps / agent.goal)

    if agent.num_timesteps < agent.goal:  # not if all but run.json was written
        agent.learn(callback=after, checkpoint_path=folder)
    reward: Any = agent.rows.env.unwrapped
    config = config | {"cost_weight": reward.reward.cost_weight}
    _finish(folder, config, (folder / BEST / MANIFEST).read_bytes())
    return type(agent).load(folder / BEST)


def _clear(folder: Path, config: dict[str, Any]) -> None:
    """Delete the run in a folder, its `run.json` first, which says that the rest is whole; note what begins there."""
    (folder / SETTINGS).unlink(missing_ok=True)
    for path in _files(folder):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    save_json(folder / STARTED, config)


def _files(folder: Path) -> list[Path]:
    """What a run writes beside `run.json` and `started.json`, as far as it is there."""
    ours = [path for path in (*folder.glob("checkpoint-*"), folder / BEST) if path.is_dir() and not foreign(path)]
    return ours + [path for name in (WEIGHTS, EPISODES, "tensorboard") if (path := folder / name).exists()]


def _finish(folder: Path, config: dict[str, Any], weights: bytes) -> None:
    """Write `run.json`, which comes last and says with its hash that the rest is whole."""
    content = {"format": FORMAT, **config, **provenance(), "sha256": hashlib.sha256(weights).hexdigest()}
    write_text(folder / SETTINGS, json.dumps(content, indent=1))


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


def load(folder: Path) -> tuple[Policy, dict[str, Any]]:
    """The trained model of a run and its configuration; nothing is unpickled."""
    from safetensors import SafetensorError
    from safetensors.torch import load as parse

    from agents.sb3 import make_algorithm, make_sb3_vec

    config = load_config(folder)
    own = config.get("backend") == "own"
    weights = folder / (f"{BEST}/{MANIFEST}" if own else WEIGHTS)
    try:
        raw = weights.read_bytes()
    except OSError as error:
        raise RunError(f"{weights} cannot be read: {error.strerror}") from error
    if hashlib.sha256(raw).hexdigest() != config["sha256"]:
        raise RunError(f"{weights} is damaged: its SHA-256 is not the one in {SETTINGS}")
    if own:
        return backends.own(config["algo"]).load(folder / BEST), config
    env = make_sb3_vec(config["env"], config["settings"]["n_envs"], **config["env_kwargs"])
    model = make_algorithm(config["algo"], env, config["seed"], config["settings"])
    try:
        model.policy.load_state_dict(parse(raw))
    except (SafetensorError, RuntimeError) as error:
        raise RunError(f"{weights} does not fit a {config['algo']} policy of {config['env']}: {error}") from error
    return model, config
