"""Stable-Baselines3 on our environments: a native vector environment, cost curves on TensorBoard."""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import gymnasium
import numpy as np
import stable_baselines3
import torch
from gymnasium.vector import AutoresetMode, VectorEnv
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.utils import LinearSchedule
from stable_baselines3.common.vec_env import VecEnv, VecMonitor

from agents.evaluate import evaluate

SUMMED = ("reward/", "cost/")
ALGORITHMS: dict[str, tuple[str, str]] = {  # class, policy
    "ppo": ("PPO", "MlpPolicy"),
    "a2c": ("A2C", "MlpPolicy"),
    "dqn": ("DQN", "MlpPolicy"),
    "qrdqn": ("QRDQN", "MlpPolicy"),
    "ppo_lstm": ("RecurrentPPO", "MlpLstmPolicy"),
    "ppo_mask": ("MaskablePPO", "MlpPolicy"),
}


def make_algorithm(algo: str, env: VecEnv, seed: int, values: dict[str, Any], log: str | None = None) -> BaseAlgorithm:
    """An SB3 algorithm on the CPU with `settings`, on a VecEnv; the same seed gives the same bits."""
    keywords = copy.deepcopy({key: value for key, value in values.items() if key not in ("n_envs", "total_timesteps")})
    rate = str(keywords.get("learning_rate", ""))
    if rate.startswith("linear "):
        keywords["learning_rate"] = LinearSchedule(float(rate.removeprefix("linear ")), 0.0, 1.0)
    name, policy = ALGORITHMS[algo]
    if algo == "ppo_mask" and not env.has_attr("action_masks"):
        raise ValueError("algo='ppo_mask': this environment has no action_masks(), each action is valid; take ppo")
    kind = getattr(stable_baselines3, name, None) or getattr(_contrib(), name)
    made: BaseAlgorithm = kind(policy, env, seed=seed, device="cpu", tensorboard_log=log, **keywords)
    return made


def _contrib() -> Any:
    try:
        import sb3_contrib
    except ImportError as error:
        raise ValueError("qrdqn, ppo_lstm and ppo_mask are in sb3-contrib: pip install 'moe-envs[contrib]'") from error
    return sb3_contrib


class NativeVecEnv(VecEnv):
    """A Gymnasium vector environment with DISABLED autoreset as an SB3 VecEnv; equals DummyVecEnv, step for step."""

    def __init__(self, env: VectorEnv[Any, Any, Any]) -> None:
        if env.metadata.get("autoreset_mode") is not AutoresetMode.DISABLED:
            raise ValueError(f"{env} must be made with autoreset_mode='Disabled'")
        self.env = env
        self._actions = np.empty(0)
        self._metadata = env.metadata
        super().__init__(env.num_envs, env.single_observation_space, env.single_action_space)

    def reset(self) -> np.ndarray:
        seeds: Any = self._seeds if any(seed is not None for seed in self._seeds) else None
        observation, _ = self.env.reset(seed=seeds)
        self.reset_infos = [{} for _ in range(self.num_envs)]
        self._reset_seeds()
        self._reset_options()
        return observation

    def step_async(self, actions: np.ndarray) -> None:
        self._actions = actions

    def step_wait(self) -> tuple[np.ndarray, np.ndarray, np.ndarray, list[dict[str, Any]]]:
        observation, reward, terminated, truncated, batch_info = self.env.step(self._actions)
        infos = _rows(batch_info, self.num_envs)
        done = terminated | truncated
        for row, cut in enumerate((truncated & ~terminated).tolist()):
            infos[row]["TimeLimit.truncated"] = cut
        if done.any():
            for row in done.nonzero()[0]:
                infos[row]["terminal_observation"] = observation[row]
            observation, _ = self.env.reset(options={"reset_mask": done})
        return observation, reward.astype(np.float32), done, infos

    def close(self) -> None:
        self.env.close()

    def get_attr(self, attr_name: str, indices: int | Iterable[int] | None = None) -> list[Any]:
        return [getattr(self.env.unwrapped, attr_name) for _ in self._get_indices(indices)]

    def set_attr(self, attr_name: str, value: Any, indices: int | Iterable[int] | None = None) -> None:
        setattr(self.env.unwrapped, attr_name, value)

    def env_method(
        self, method_name: str, *args: Any, indices: int | Iterable[int] | None = None, **kwargs: Any
    ) -> list[Any]:
        result = getattr(self.env.unwrapped, method_name)(*args, **kwargs)
        return [result[row] for row in self._get_indices(indices)]

    def env_is_wrapped(self, wrapper_class: type, indices: int | Iterable[int] | None = None) -> list[bool]:
        return [False for _ in self._get_indices(indices)]


def make_sb3_vec(env_id: str, n_envs: int, **env_kwargs: Any) -> VecMonitor:
    """A VecEnv of `n_envs` rows over the native vector environment, monitored for SB3's `rollout/ep_rew_mean`."""
    env = gymnasium.make_vec(
        env_id,
        num_envs=n_envs,
        vectorization_mode="vector_entry_point",
        autoreset_mode=AutoresetMode.DISABLED.value,
        **env_kwargs,
    )
    return VecMonitor(NativeVecEnv(env))


def _rows(batch_info: dict[str, Any], count: int) -> list[dict[str, Any]]:
    keys = [key for key in batch_info if not key.startswith("_")]
    columns = [value if value.ndim > 1 else value.tolist() for value in map(batch_info.__getitem__, keys)]
    return [dict(zip(keys, row, strict=True)) for row in zip(*columns, strict=True)] or [{} for _ in range(count)]


class CostLogger(BaseCallback):
    """Keeps a record of every episode: the sums of `reward/*` and `cost/*`, the last values of other scalars in `info`
    such as `routing/*`; their means over the episodes of a rollout go to TensorBoard, `records` holds them all."""

    def __init__(self, verbose: int = 0) -> None:
        super().__init__(verbose)
        self.records: list[dict[str, float]] = []
        self._sums: list[dict[str, float]] = []
        self._logged = 0

    def _on_training_start(self) -> None:
        self._sums = [defaultdict(float) for _ in range(self.training_env.num_envs)]

    def _on_step(self) -> bool:
        infos: Sequence[dict[str, Any]] = self.locals["infos"]
        rewards, dones = self.locals["rewards"].tolist(), self.locals["dones"].tolist()
        for sums, info, reward, done in zip(self._sums, infos, rewards, dones, strict=True):
            sums["return"] += reward
            for key, value in info.items():
                if key.startswith(SUMMED):
                    sums[key] += value
                elif done and "/" in key:
                    sums[key] = value
            if done:
                self.records.append({"timesteps": self.num_timesteps, **sums})
                sums.clear()
        return True

    def _on_rollout_end(self) -> None:
        new = self.records[self._logged :]
        self._logged = len(self.records)
        for key in new[0].keys() - {"timesteps", "return"} if new else ():
            self.logger.record(key, float(np.mean([record[key] for record in new])))


class Progress(BaseCallback):
    """Calls `report` with the share of the training that is done."""

    def __init__(self, report: Callable[[float], object]) -> None:
        super().__init__()
        self.report = report

    def _on_step(self) -> bool:
        if self.n_calls % 50 == 0:
            self.report(self.num_timesteps / self.locals["total_timesteps"])
        return True


class KeepBest(BaseCallback):
    """Evaluates on the split `validation` at `checks` moments of a training and ends with the best weights seen."""

    def __init__(self, env_id: str, env_kwargs: dict[str, Any], checks: int = 10, episodes: int = 1000) -> None:
        super().__init__()
        self.env_id, self.env_kwargs = env_id, {**env_kwargs, "split": "validation"}
        self.checks, self.episodes, self.best = checks, episodes, -np.inf
        self._weights: dict[str, torch.Tensor] = {}
        self._checked = 0

    def _on_step(self) -> bool:
        return True

    def _on_rollout_end(self) -> None:
        progress = int(self.num_timesteps * self.checks / self.locals["total_timesteps"])
        if progress > self._checked:
            self._checked = progress
            self._check()

    def _on_training_end(self) -> None:
        self._check()
        self.model.policy.load_state_dict(self._weights)

    def _check(self) -> None:
        frame = evaluate(self.model, self.env_id, self.episodes, **self.env_kwargs)
        self.logger.record("eval/mean_reward", frame["return"].mean())
        if frame["return"].mean() > self.best:
            self.best = frame["return"].mean()
            self._weights = copy.deepcopy(self.model.policy.state_dict())
