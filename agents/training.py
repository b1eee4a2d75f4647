"""Training of any algorithm, ours or SB3's, with validation and best weights."""

from __future__ import annotations

import copy
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from agents import tuned
from agents.baselines import on_split, validation_episodes
from agents.checkpoints import CheckpointError
from agents.evaluate import MAX_ROWS, make_rows, play
from cost.files import load_json, save_json

if TYPE_CHECKING:
    from agents.learner import Learner

LOOKS = 10
MEMORISED = 0.01  # share of the return that training must gain and validation lose
BEST, CURVE = "best", "validation.json"
Judge = Callable[[Any], float]  # validation score of an agent, higher is better
Prepare = Callable[[Any, int], Callable[[Any], object]]  # (agent, total steps) -> callback after each update


class Look(NamedTuple):
    """Validation result: steps, CPU and wall seconds of training so far, and score; `train` is the mean return of the
    last training episodes, None before any."""

    steps: int
    cpu_s: float
    wall_s: float
    score: float
    train: float | None = None


class Trained(NamedTuple):
    """Agent with the best weights on validation, and all validation results."""

    agent: Any
    curve: list[Look]


class Watcher:
    """Validates during training and at its end, and keeps the weights with the best score.

    `on_look` is called with each result and stops the training by returning False. With a `folder` of one of our
    learners, results are saved there, so that a resumed training continues unchanged.
    """

    def __init__(
        self,
        judge: Judge,
        every: int,
        folder: Path | None = None,
        on_look: Callable[[Look], bool | None] = lambda look: None,
    ) -> None:
        self.judge, self.every, self.folder, self.on_look = judge, max(1, every), folder, on_look
        self.curve: list[Look] = []
        self._begun = time.process_time(), time.perf_counter()
        self._weights: Any = None
        self._scratch = None if folder else tempfile.TemporaryDirectory()
        self._best = folder / BEST if folder else Path(self._scratch.name) / BEST  # type: ignore[union-attr]

    def resume(self, agent: Any) -> None:
        """Restore the validation results up to the resumed step."""
        assert self.folder is not None
        if not (self.folder / CURVE).exists() and (self.folder / BEST).exists():
            raise CheckpointError(f"{self.folder / CURVE} is absent: restore it from a copy, or train again")
        there = load_curve(self.folder) if (self.folder / CURVE).exists() else []
        self.curve = [look for look in there if look.steps <= agent.num_timesteps]
        if self.curve:
            now = time.process_time(), time.perf_counter()
            self._begun = now[0] - self.curve[-1].cpu_s, now[1] - self.curve[-1].wall_s

    def begin(self, agent: Any) -> None:
        """Validate the weights before the training if they already are a policy: advice that is to be improved."""
        if not is_sb3(agent) and agent.network.residual is not None:
            self._look(agent)

    def __call__(self, agent: Any) -> bool:
        """Called after an update; returns whether to continue."""
        if agent.num_timesteps < (self.curve[-1].steps if self.curve else 0) + self.every:
            return True
        return self._look(agent)

    def end(self, agent: Any) -> Any:
        """Validate the final weights and return the agent with the best weights."""
        if not self.curve or self.curve[-1].steps != agent.num_timesteps:
            self._look(agent)
        if is_sb3(agent):
            agent.policy.load_state_dict(self._weights)
        else:
            agent = type(agent).load(self._best)
        if self._scratch:
            self._scratch.cleanup()
        return agent

    def _look(self, agent: Any) -> bool:
        cpu, wall = time.process_time(), time.perf_counter()
        best = max((look.score for look in self.curve), default=-np.inf)
        seconds = cpu - self._begun[0], wall - self._begun[1]
        look = Look(agent.num_timesteps, *seconds, self.judge(agent), training_return(agent))
        self.curve.append(look)
        if self.folder:
            save_curve(self.folder, self.curve)  # first: where there are best weights, there are results
        if look.score > best:
            self._keep(agent, look.score)
        if is_sb3(agent):
            agent.logger.record("eval/mean_reward", look.score)
        else:
            agent.logs["eval/mean_reward"] = look.score
        going_on = self.on_look(look) is not False
        self._begun = self._begun[0] + time.process_time() - cpu, self._begun[1] + time.perf_counter() - wall
        return going_on

    def _keep(self, agent: Any, score: float) -> None:
        if is_sb3(agent):
            self._weights = copy.deepcopy(agent.policy.state_dict())
        else:
            agent.save(self._best, validation=score)


def train(
    env_id: str,
    algo: str = "ppo",
    backend: str = "own",
    *,
    seed: int = 0,
    env_kwargs: dict[str, Any] | None = None,
    settings: dict[str, Any] | None = None,
    judge: Judge | None = None,
    looks: int = LOOKS,
    on_look: Callable[[Look], bool | None] = lambda look: None,
    prepare: Prepare = lambda agent, total: lambda agent: None,
    report: Callable[[float], object] = lambda share: None,
) -> Trained:
    """Train an algorithm on the training split of an environment, with tuned settings by default.

    The agent is validated `looks` times, by `judge`, or by default by the mean return of validation episodes.
    `prepare` may modify the agent and returns the callback after each update; `report` receives the finished share.
    Uses one torch thread, which is fastest for such small networks.
    """
    kwargs, values = env_kwargs or {}, settings or tuned.settings(algo, env_id, backend)
    agent = make(env_id, algo, backend, kwargs, seed, values)
    total = values["total_timesteps"]
    watcher = Watcher(judge or by_return(env_id, kwargs), total // looks, on_look=on_look)
    between = prepare(agent, total)

    def after_update(agent: Any) -> bool:
        between(agent)
        report(agent.num_timesteps / total)
        return watcher(agent)

    watcher.begin(agent)
    learn(agent, total, after_update)
    return Trained(watcher.end(agent), watcher.curve)


def save_curve(folder: Path, curve: list[Look]) -> None:
    """Write the validation results of a run, sealed."""
    save_json(folder / CURVE, {"looks": [look._asdict() for look in curve]})


def load_curve(folder: Path) -> list[Look]:
    """Read the validation results of a run; raises `CheckpointError` if they were altered."""
    path = folder / CURVE
    content = load_json(path, CheckpointError, "restore it from a copy, or train again")
    try:
        looks = [Look(**look) for look in content["looks"]]
        if not all(np.isfinite(number) for look in looks for number in look if number is not None):
            raise ValueError("a number is not finite")
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise CheckpointError(f"{path} holds no validation results: {error!r}") from error
    return looks


def training_return(agent: Any) -> float | None:
    """Mean return of the last training episodes of an agent of either backend; None before any."""
    if not is_sb3(agent):
        return agent.logs.get("rollout/ep_rew_mean")
    returns = [episode["r"] for episode in agent.ep_info_buffer or ()]
    return float(np.mean(returns)) if returns else None


def parting(curve: list[Look]) -> str | None:
    """Says where the training return went on rising while validation fell; None if it did not."""
    known = [look for look in curve if look.train is not None]
    if len(known) < 2:
        return None
    best, last = max(known, key=lambda look: look.score), known[-1]
    rise, fall = (last.train or 0.0) - (best.train or 0.0), best.score - last.score
    if min(rise, fall) < MEMORISED * max(abs(best.score), abs(best.train or 0.0)):
        return None
    return (
        f"from step {best.steps:,} to {last.steps:,} the training return rose from {best.train:.3f} to "
        f"{last.train:.3f} and validation fell from {best.score:.3f} to {last.score:.3f}: the policy memorises its "
        f"inputs. The weights of step {best.steps:,} are kept; fewer steps, weight_decay or more data help"
    )


def by_return(env_id: str, env_kwargs: dict[str, Any], episodes: int | None = None) -> Judge:
    """Scores an agent by its mean return in validation episodes, by default as many as the environment's spec says."""
    rows, episodes = list[Any](), episodes or validation_episodes(env_id)

    def judge(agent: Any) -> float:
        if not rows:
            rows.append(make_rows(env_id, min(episodes, MAX_ROWS), **on_split(env_id, env_kwargs, "validation")))
        return float(play(agent, rows[0], episodes, seed=0)["return"].mean())

    return judge


def own(algo: str) -> type[Learner]:
    """Class of one of our learners."""
    from agents.ppo import PPO
    from agents.reinforce import REINFORCE

    return {"ppo": PPO, "reinforce": REINFORCE}[algo]


def is_sb3(agent: Any) -> bool:
    """Whether an agent is one of SB3's algorithms."""
    return hasattr(agent, "policy")


def make(
    env_id: str, algo: str, backend: str, env_kwargs: dict[str, Any], seed: int, settings: dict[str, Any],
    tensorboard_log: str | None = None,
) -> Any:  # fmt: skip
    """Create an untrained agent with `settings` except `total_timesteps`."""
    values = {name: value for name, value in settings.items() if name != "total_timesteps"}
    if backend == "own":
        kind: Any = own(algo)
        agent = kind("MlpPolicy", env_id, env_kwargs=env_kwargs, seed=seed, tensorboard_log=tensorboard_log, **values)
        agent.check_groups()
        return agent
    from agents.sb3 import make_algorithm, make_env

    return make_algorithm(algo, make_env(env_id, values["n_envs"], seed, env_kwargs), seed, values, tensorboard_log)


def learn(agent: Any, total_timesteps: int, after_update: Callable[[Any], bool | None], *callbacks: Any) -> None:
    """Train an agent of either backend; `after_update(agent)` stops the training by returning False. Further callbacks
    are for SB3 only."""
    if is_sb3(agent):
        from agents.sb3 import AfterUpdate
        from cost.timing import torch_threads

        with torch_threads(1):
            agent.learn(total_timesteps, [AfterUpdate(after_update), *callbacks])
    else:
        agent.learn(total_timesteps, after_update)
