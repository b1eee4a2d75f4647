"""Run folders: one training with everything needed to evaluate or repeat it, without pickle.

`run.json` (environment, settings, seed, commit, machine, versions, SHA-256 of the weights), `episodes.csv`, TensorBoard
logs and the weights: `policy.safetensors` of an SB3 algorithm; of ours the folder `best`, and the newest checkpoints.
"""

from __future__ import annotations

import io
import json
import re
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gymnasium
import pandas as pd

from agents import checkpoints, training, tuned
from agents.checkpoints import MANIFEST, foreign
from agents.evaluate import spec_of
from agents.resumable import LARGEST, UNFIT
from agents.training import BEST, CURVE, Watcher
from cost.arguments import one_line
from cost.files import alone, load_json, read_verified, save_json, sha256_of, write_bytes, write_text
from cost.machine import provenance
from cost.trust import require_env

if TYPE_CHECKING:
    from agents.evaluate import Policy

FORMAT = 2  # 1 had no seal
SETTINGS, WEIGHTS, EPISODES = "run.json", "policy.safetensors", "episodes.csv"
STARTED, TENSORBOARD, OLD_CURVE = "started.json", "tensorboard", "validation.csv"


class RunError(RuntimeError):
    """A run folder is absent, damaged or foreign; the message names the file and the cause."""


def train(
    env_id: str,
    algo: str,
    seed: int,
    folder: Path,
    env_kwargs: dict[str, Any],
    overrides: dict[str, Any] | None = None,
    progress: Callable[[float], object] = lambda share: None,
    backend: str = "own",
    overwrite: bool = False,
) -> Policy:
    """Train an algorithm with tuned settings and save the run with the weights that score best on validation.

    Raises `ValueError` for an existing run in the folder, finished or not, unless `overwrite` is set, and `RunError`
    while another training is at work in it. `progress` is called with the finished share. Uses one torch thread, which
    is fastest for such small networks.
    """
    require_free(folder, env_kwargs, overwrite)
    settings = tuned.settings(algo, env_id, backend, **(overrides or {}))
    config = {"env": env_id, "env_kwargs": env_kwargs, "algo": algo, "backend": backend, "seed": seed}
    config["settings"] = settings
    agent = _make(folder, config)  # before anything is written
    with alone(folder, RunError):
        require_free(folder, env_kwargs, overwrite)
        _clear(folder, config)
        return _train(agent, folder, config, progress)


def default_name(env_id: str, algo: str, backend: str, env_kwargs: dict[str, Any], seed: int) -> str:
    """Default folder name of a run, from its arguments."""
    parts = [env_id.split(":")[-1], algo if backend == "own" else f"{backend}-{algo}"]
    parts += [f"{key}={_shown(value)}" for key, value in sorted(env_kwargs.items())]
    whole = "-".join([*parts, f"seed{seed}"])
    plain = re.sub(r"[^A-Za-z0-9._=,-]+", "", whole)
    return plain if plain == whole and len(plain) <= 200 else f"{plain[:180]}-{sha256_of(whole.encode())[:8]}"


def _shown(value: Any) -> str:
    """A value in a name: text as it is, unless it reads like another value."""
    try:
        json.loads(value)
    except (TypeError, ValueError):
        return value if isinstance(value, str) else json.dumps(value, separators=(",", ":"))
    return json.dumps(value)


def load_zip(
    path: Path, env: str | None, algo: str, env_kwargs: dict[str, Any], trust: bool
) -> tuple[Policy, dict[str, Any]]:
    """Load an algorithm and a run configuration from an SB3 zip file; raises `ValueError` unless trusted."""
    if not trust:
        raise ValueError(
            f"{path}: loading SB3's zip can run code that is in it; --trust loads a file you made yourself"
        )
    if env is None:
        raise ValueError(f"{path}: which environment? --env ID")
    from agents.sb3 import algorithm_class, make_env

    policy: Any = algorithm_class(algo).load(path, device="cpu")
    found: Any = make_env(env, 1, 0, env_kwargs)
    weight = _weight(found.unwrapped.env if hasattr(found.unwrapped, "env") else None)
    return policy, {"env": env, "env_kwargs": env_kwargs, "algo": f"SB3 {algo}", "seed": 0, **weight}


def require_free(folder: Path, env_kwargs: dict[str, Any], overwrite: bool) -> None:
    """Raise `ValueError` if a training cannot start in the folder: it has a run that must not be replaced, or files
    that could be mistaken for those of a run."""
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


def resume(
    folder: Path, progress: Callable[[float], object] = lambda share: None, allow_import: bool = False
) -> Policy:
    """Resume an interrupted training of one of our learners bit for bit.

    Raises `RunError` if the folder holds none, or while another training is at work in it.
    """
    if not folder.is_dir():
        raise RunError(f"{folder} is no run folder")
    with alone(folder, RunError):
        if (folder / SETTINGS).exists():
            raise ValueError(f"{folder} holds a finished run; moe-eval evaluates it")
        mend = "only runs of --backend own that were interrupted can be resumed"
        config = load_json(folder / STARTED, RunError, mend)
        _require_config(config, folder / STARTED)
        require_env(config["env"], folder / STARTED, allow_import)
        if config["backend"] != "own":
            raise ValueError(
                f"{folder} is a run of {config['backend']}, which cannot be resumed; --overwrite begins anew"
            )
        if not checkpoints.of_run(folder):
            agent: Any = _make(folder, config)
            _clear(folder, config)  # what was written before the first checkpoint
        else:
            agent = training.own(config["algo"]).resume(folder, folder / TENSORBOARD, allow_import=allow_import)
        return _train(agent, folder, config, progress)


def _make(folder: Path, config: dict[str, Any]) -> Any:
    env, algo, backend, kwargs = (config[key] for key in ("env", "algo", "backend", "env_kwargs"))
    return training.make(env, algo, backend, kwargs, config["seed"], config["settings"], str(folder / TENSORBOARD))


def _train(agent: Any, folder: Path, config: dict[str, Any], progress: Callable[[float], object]) -> Policy:
    """Train a new or resumed agent to the end and finish the run."""
    total = config["settings"]["total_timesteps"]
    judge = training.by_return(config["env"], config["env_kwargs"])
    sb3 = training.is_sb3(agent)
    watcher = Watcher(judge, total // training.LOOKS, None if sb3 else folder)

    def after_update(agent: Any) -> bool:
        progress(agent.num_timesteps / total)
        return watcher(agent)

    if sb3:
        return _finish_sb3(agent, watcher, after_update, folder, config)
    if agent.num_timesteps:
        watcher.resume(agent)
        remaining = None
    else:
        remaining = total
        watcher.begin(agent)
    if agent.num_timesteps < total:  # skipped if only run.json is missing
        agent.learn(remaining, after_update, checkpoint_path=folder)
    else:
        agent.check_episodes(folder)
    best = watcher.end(agent)
    _finish(folder, config | _weight(agent.get_env().unwrapped), (folder / BEST / MANIFEST).read_bytes())
    policy: Policy = best
    return policy


def _finish_sb3(
    agent: Any, watcher: Watcher, after_update: Callable[[Any], bool], folder: Path, config: dict[str, Any]
) -> Policy:
    from safetensors.torch import save as dump

    from agents.sb3 import CostLogger

    costs = CostLogger()
    training.learn(agent, config["settings"]["total_timesteps"], after_update, costs)
    watcher.end(agent)
    weights = dump({name: value.contiguous() for name, value in agent.policy.state_dict().items()})
    write_bytes(folder / WEIGHTS, weights)
    write_text(folder / EPISODES, pd.DataFrame(costs.records).to_csv(index=False))
    training.save_curve(folder, watcher.curve)
    _finish(folder, config | _weight(agent.get_env().unwrapped.env), weights)
    policy: Policy = agent
    return policy


def _weight(env: Any) -> dict[str, Any]:
    """Cost weight in an environment's reward; None if it has none."""
    return {"cost_weight": getattr(getattr(env, "reward", None), "cost_weight", None)}


def _clear(folder: Path, config: dict[str, Any]) -> None:
    """Delete the run in a folder, starting with `run.json`, which marks it as complete, and record the new run."""
    (folder / SETTINGS).unlink(missing_ok=True)
    for path in _files(folder):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    save_json(folder / STARTED, config)


def _files(folder: Path) -> list[Path]:
    """Existing files of a run other than `run.json` and `started.json`."""
    ours = [path for path in (*folder.glob("checkpoint-*"), folder / BEST) if path.is_dir() and not foreign(path)]
    return ours + [
        path for name in (WEIGHTS, EPISODES, CURVE, OLD_CURVE, TENSORBOARD) if (path := folder / name).exists()
    ]


def _finish(folder: Path, config: dict[str, Any], weights: bytes) -> None:
    """Write `run.json` last; with its hash, it marks the run as complete."""
    sums = {"weights_sha256": sha256_of(weights), "episodes_sha256": sha256_of((folder / EPISODES).read_bytes())}
    save_json(folder / SETTINGS, {"format": FORMAT, **config, **provenance(), **sums})


def episodes(folder: Path) -> pd.DataFrame:
    """The episodes of a finished run, a row each; raises `RunError` if the file was altered."""
    sha256 = load_config(folder).get("episodes_sha256")
    raw = read_verified(folder / EPISODES, sha256, RunError, f"its SHA-256 is not the one in {SETTINGS}")
    return pd.read_csv(io.BytesIO(raw))


def load_config(folder: Path) -> dict[str, Any]:
    """Read `run.json`; raises `RunError` if the folder has no finished run or it was altered, and warns about a run of
    before format 2, which cannot tell."""
    path = folder / SETTINGS
    if not path.exists():
        raise RunError(f"{folder} holds no finished run: there is no {SETTINGS}")
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise RunError(f"{path} cannot be read: {one_line(error)}") from error
    if isinstance(content, dict) and content.get("format") == 1 and isinstance(content.get("sha256"), str):
        config = {"backend": "sb3", **content, "weights_sha256": content["sha256"]}  # of the weights, in that format
        warnings.warn(f"{path} is of format 1, which has no hash: an alteration goes unnoticed", stacklevel=2)
    else:
        config = load_json(path, RunError, "restore it from a copy, or train again")
        if config.get("format") != FORMAT:
            raise RunError(f"{path} is of format {config.get('format')}; this moe-envs reads {FORMAT}")
    _require_config(config, path)
    return config


def most(name: str) -> int:
    """The largest number that a setting of a run may have."""
    return {"total_timesteps": 10**12, "n_envs": 2**16}.get(name, 10**9)


def _require_config(config: dict[str, Any], path: Path) -> None:
    """Raise `RunError` if a run configuration lacks a part or has one of another type."""
    finished = path.name == SETTINGS
    kinds: dict[str, Any] = {"env": str, "env_kwargs": dict, "algo": str, "backend": str, "seed": int, "settings": dict}
    kinds |= {"weights_sha256": str, "cost_weight": int | float | None} if finished else {}
    for name, kind in kinds.items():
        if name not in config or not isinstance(config[name], kind):
            raise RunError(f"{path} is no configuration of a run: {name} is {config.get(name)!r}")
    settings = {"total_timesteps": None, "n_envs": None} | config["settings"]
    for name, value in settings.items():
        count = name in ("total_timesteps", "n_envs")
        if (count and not isinstance(value, int)) or (isinstance(value, int | float) and not abs(value) <= most(name)):
            raise RunError(f"{path} is no configuration of a run: {name} is {value!r}")
    known = tuned.BACKENDS.get(config["backend"], ())
    if config["algo"] not in known:
        raise RunError(f"{path}: {config['algo']!r} is no algorithm of backend {config['backend']!r}")


def load(folder: Path, allow_import: bool = False) -> tuple[Policy, dict[str, Any]]:
    """Load the trained model and the configuration of a run, without pickle.

    Raises `RunError` if it is damaged, and `ValueError` if its environment is of a package that is not imported yet,
    unless `allow_import` is set: importing runs the package's code.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load as parse

    from agents.sb3 import make_algorithm, make_env

    config = load_config(folder)
    require_env(config["env"], folder / SETTINGS, allow_import)
    try:
        spec_of(config["env"])
    except gymnasium.error.Error as error:
        raise RunError(f"{folder / SETTINGS} names no environment: {one_line(error)}") from error
    own = config["backend"] == "own"
    weights = folder / (f"{BEST}/{MANIFEST}" if own else WEIGHTS)
    try:
        raw = weights.read_bytes()
    except OSError as error:
        raise RunError(f"{weights} cannot be read: {error.strerror}") from error
    if sha256_of(raw) != config["weights_sha256"]:
        raise RunError(f"{weights} is damaged: its SHA-256 is not the one in {SETTINGS}")
    if own:
        agent = training.own(config["algo"]).load(folder / BEST, allow_import=allow_import)
        if (agent.env_id, agent.arguments["env_kwargs"]) != (config["env"], config["env_kwargs"]):
            raise RunError(f"{folder / SETTINGS} and {folder / BEST} name different environments")
        return agent, config
    try:
        env = make_env(config["env"], config["settings"]["n_envs"], config["seed"], config["env_kwargs"])
        model = make_algorithm(config["algo"], env, config["seed"], config["settings"])
        values = parse(raw)
        if not all(bool((value.abs() < LARGEST).all()) for value in values.values()):
            raise ValueError("weights are not finite")
        model.policy.load_state_dict(values)
    except (SafetensorError, AssertionError, *UNFIT) as error:  # SB3 asserts the types of its settings
        raise RunError(
            f"{weights} does not fit a {config['algo']} policy of {config['env']}: {one_line(error)}"
        ) from error
    return model, config
