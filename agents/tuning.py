"""Hyperparameter search by Optuna on the split `validation`, with pruning of bad trials."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from agents import training, tuned
from agents.rollouts import NotFiniteError
from cost.files import save_json
from cost.machine import provenance

if TYPE_CHECKING:
    import optuna

BEST, TRIALS = "tuned.json", "trials.log"
CHECKS = 5
# Search space, for settings that an algorithm has: numbers from low to high on a log scale, or one of a list.
RANGES: dict[str, tuple[float, float]] = {"learning_rate": (1e-4, 1e-2), "ent_coef": (1e-5, 1e-1)}
CHOICES: dict[str, list[Any]] = {
    "n_steps": [8, 16, 32, 64, 128],
    "batch_size": [128, 256, 512, 1024],
    "n_epochs": [2, 3, 5, 8],
    "gae_lambda": [0.5, 0.8, 0.9, 0.95, 1.0],
    "train_freq": [1, 4, 16],
    "gradient_steps": [4, 8, 16],
    "exploration_fraction": [0.1, 0.3, 0.5],
    "target_update_interval": [500, 2_000, 8_000],
}


def search(
    env_id: str,
    algo: str,
    backend: str,
    env_kwargs: dict[str, Any],
    trials: int,
    folder: Path,
    seed: int = 0,
    timesteps: int | None = None,
    report: Callable[[float], object] = lambda share: None,
) -> dict[str, Any]:
    """Search settings with `trials` trainings; writes the best ones to tuned.json.

    Trials are saved in trials.log, so that an interrupted search resumes. The first trial uses the existing settings,
    so the result is never worse. Raises `ValueError` if Optuna is not installed.
    """
    if find_spec("optuna") is None:
        raise ValueError("optuna is not installed: pip install 'moe-envs[tune]'")
    import optuna
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    start = tuned.settings(algo, env_id, backend) | ({"total_timesteps": timesteps} if timesteps else {})
    folder.mkdir(parents=True, exist_ok=True)
    study = optuna.create_study(
        storage=JournalStorage(JournalFileBackend(str(folder / TRIALS))),
        study_name=f"{backend} {algo} {env_id} {sorted(env_kwargs.items())} {start['total_timesteps']} seed {seed}",
        pruner=optuna.pruners.MedianPruner(n_startup_trials=5, n_warmup_steps=2),
        direction="maximize",
        load_if_exists=True,
    )
    finished = (optuna.trial.TrialState.COMPLETE, optuna.trial.TrialState.PRUNED)

    def done() -> int:
        return len(study.get_trials(deepcopy=False, states=finished))

    if not done():
        study.enqueue_trial(_as_suggested(start))

    def objective(trial: optuna.Trial) -> float:
        return train(env_id, algo, backend, env_kwargs, seed, suggest(trial, start), trial)

    for _ in range(done(), 2 * trials):  # some may fail
        if done() >= trials:
            break
        # Seeded by trial number, so that a resumed search gives the same trials.
        study.sampler = optuna.samplers.TPESampler(seed=1000 * seed + len(study.trials))
        study.optimize(objective, n_trials=1, catch=(NotFiniteError, ValueError) if done() else ())
        report(done() / trials)
    found: dict[str, Any] = suggest(study.best_trial, start)
    content: dict[str, Any] = {
        "env": env_id,
        "algo": algo,
        "backend": backend,
        "env_kwargs": env_kwargs,
        "settings": found,
    }
    content |= {"validation": study.best_value, "trials": done(), "seed": seed, **provenance()}
    save_json(folder / BEST, content)
    return found


def suggest(trial: optuna.Trial | optuna.trial.FrozenTrial, start: dict[str, Any]) -> dict[str, Any]:
    """Settings with the values suggested by the trial; learning rates decrease to 0."""
    found = dict(start)
    for name in sorted(start.keys() & RANGES.keys()):
        found[name] = trial.suggest_float(name, *RANGES[name], log=True)
    for name in sorted(start.keys() & CHOICES.keys()):
        found[name] = trial.suggest_categorical(name, CHOICES[name])
    if "learning_rate" in found:
        found["learning_rate"] = f"linear {found['learning_rate']:.3g}"
    return found


def _as_suggested(start: dict[str, Any]) -> dict[str, Any]:
    """Convert settings to trial parameters; values outside the search space are left to the sampler."""
    found: dict[str, Any] = {name: value for name, value in start.items() if value in CHOICES.get(name, [])}
    for name in start.keys() & RANGES.keys():
        value = float(str(start[name]).split()[-1])
        found |= {name: value} if RANGES[name][0] <= value <= RANGES[name][1] else {}
    return found


def train(
    env_id: str,
    algo: str,
    backend: str,
    env_kwargs: dict[str, Any],
    seed: int,
    settings: dict[str, Any],
    trial: optuna.Trial | None = None,
) -> float:
    """Mean validation return of the final policy; reports intermediate results to a trial that can be pruned."""
    import optuna

    def on_look(look: training.Look) -> None:
        check = len(looks) + 1
        looks.append(look)
        if trial is not None and check < CHECKS:
            trial.report(look.score, check)
            if trial.should_prune():
                raise optuna.TrialPruned

    looks: list[training.Look] = []
    training.train(
        env_id, algo, backend, seed=seed, env_kwargs=env_kwargs, settings=settings, looks=CHECKS if trial else 1,
        on_look=on_look,
    )  # fmt: skip
    return looks[-1].score
