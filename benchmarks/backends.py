"""Our learners and SB3's algorithms by name, made and trained in the same way."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from agents.learner import Learner


def own(algo: str) -> type[Learner]:
    """The class of one of our learners."""
    from agents.ppo import PPO
    from agents.reinforce import REINFORCE

    return {"ppo": PPO, "reinforce": REINFORCE}[algo]


def make(env_id: str, algo: str, backend: str, env_kwargs: dict[str, Any], seed: int, settings: dict[str, Any]) -> Any:
    """An untrained agent with `settings`, of which `total_timesteps` is left out."""
    values = {name: value for name, value in settings.items() if name != "total_timesteps"}
    if backend == "own":
        return own(algo)(env_id, env_kwargs=env_kwargs, seed=seed, **values)
    from stable_baselines3.common.env_util import make_vec_env

    from agents.sb3 import make_algorithm, make_sb3_vec

    rows = values["n_envs"]
    env: Any
    if env_id.startswith("moe_envs:"):
        env = make_sb3_vec(env_id, rows, **env_kwargs)
    else:
        env = make_vec_env(env_id, rows, seed=seed, env_kwargs=env_kwargs)
    return make_algorithm(algo, env, seed, values)


def learn(agent: Any, total_timesteps: int, after_update: Callable[[Any], bool | None]) -> None:
    """Train an agent of either backend; `after_update(agent)` ends the training where it returns False."""
    if not hasattr(agent, "policy"):
        agent.learn(total_timesteps, after_update)
        return
    from stable_baselines3.common.callbacks import BaseCallback

    class Between(BaseCallback):
        """Looks at what the last update left, before the next rollout."""

        going_on = True

        def _on_rollout_start(self) -> None:
            self.going_on = after_update(self.model) is not False

        def _on_step(self) -> bool:
            return self.going_on

    agent.learn(total_timesteps, Between())


def rate(agent: Any, steps: int) -> float:
    """Steps per second of CPU time while an agent of either backend trains on."""
    begun, before = time.process_time(), agent.num_timesteps
    agent.learn(steps, reset_num_timesteps=False) if hasattr(agent, "policy") else agent.learn(steps)
    return float((agent.num_timesteps - before) / (time.process_time() - begun))
