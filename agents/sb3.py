"""Stable-Baselines3 on our environments: a native vector environment, cost curves on TensorBoard."""

from __future__ import annotations

import copy
import logging
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import gymnasium
import numpy as np
import stable_baselines3
from gymnasium.vector import AutoresetMode, VectorEnv
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.utils import LinearSchedule
from stable_baselines3.common.vec_env import VecEnv, VecMonitor, VecNormalize

from agents.evaluate import spec_of

log = logging.getLogger("moe_envs")
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
    """Create an SB3 algorithm on the CPU for a VecEnv; reproducible by seed."""
    keywords = copy.deepcopy({key: value for key, value in values.items() if key not in ("n_envs", "total_timesteps")})
    rate = str(keywords.get("learning_rate", ""))
    if rate.startswith("linear "):
        keywords["learning_rate"] = LinearSchedule(float(rate.removeprefix("linear ")), 0.0, 1.0)
    if keywords.pop("normalize_rewards", False):
        env = VecNormalize(env, norm_obs=False, gamma=keywords.get("gamma", 0.99))
    _, policy = ALGORITHMS[algo]
    if algo == "ppo_mask" and not env.has_attr("action_masks"):
        raise ValueError("algo='ppo_mask': this environment has no action_masks(), each action is valid; take ppo")
    made: BaseAlgorithm = algorithm_class(algo)(policy, env, seed=seed, device="cpu", tensorboard_log=log, **keywords)
    return made


def algorithm_class(algo: str) -> Any:
    """Class of an algorithm of `ALGORITHMS`, from SB3 or sb3-contrib."""
    name, _ = ALGORITHMS[algo]
    return getattr(stable_baselines3, name, None) or getattr(_contrib(), name)


def _contrib() -> Any:
    try:
        import sb3_contrib
    except ImportError as error:
        raise ValueError("qrdqn, ppo_lstm and ppo_mask are in sb3-contrib: pip install 'moe-envs[contrib]'") from error
    return sb3_contrib


class NativeVecEnv(VecEnv):
    """Gymnasium vector environment with DISABLED autoreset as an SB3 VecEnv; equivalent to DummyVecEnv."""

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
    """Create a VecEnv of `n_envs` rows on the native vector environment, with a monitor for `rollout/ep_rew_mean`."""
    env = gymnasium.make_vec(
        env_id,
        num_envs=n_envs,
        vectorization_mode="vector_entry_point",
        autoreset_mode=AutoresetMode.DISABLED.value,
        **env_kwargs,
    )
    return VecMonitor(NativeVecEnv(env))


def make_env(env_id: str, n_envs: int, seed: int, env_kwargs: dict[str, Any]) -> VecEnv:
    """Create a VecEnv of any registered environment, on its native vector environment if that has all autoreset modes,
    else of single environments; seeds are `seed`, `seed` + 1, ..."""
    if spec_of(env_id).vector_entry_point is not None:
        try:
            return make_sb3_vec(env_id, n_envs, **env_kwargs)
        except TypeError as error:  # vector environment without autoreset mode DISABLED
            log.debug("%s: single environments, as its vector face does not fit SB3: %s", env_id, error)
    return make_vec_env(env_id, n_envs, seed=seed, env_kwargs=env_kwargs)


def _rows(batch_info: dict[str, Any], count: int) -> list[dict[str, Any]]:
    keys = [key for key in batch_info if not key.startswith("_")]
    columns = [value if value.ndim > 1 else value.tolist() for value in map(batch_info.__getitem__, keys)]
    return [dict(zip(keys, row, strict=True)) for row in zip(*columns, strict=True)] or [{} for _ in range(count)]


class CostLogger(BaseCallback):
    """Records each episode in `records`: sums of `reward/*` and `cost/*`, last values of other scalars in `info` such
    as `routing/*`; means over the episodes of a rollout are logged to TensorBoard."""

    def __init__(self, verbose: int = 0) -> None:
        super().__init__(verbose)
        self.records: list[dict[str, float]] = []
        self._sums: list[dict[str, float]] = []
        self._logged = 0

    def _on_training_start(self) -> None:
        self._sums = [defaultdict(float) for _ in range(self.training_env.num_envs)]

    def _on_step(self) -> bool:
        infos: Sequence[dict[str, Any]] = self.locals["infos"]
        env, dones = self.training_env, self.locals["dones"].tolist()
        rewards = (env.get_original_reward() if isinstance(env, VecNormalize) else self.locals["rewards"]).tolist()
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


class AfterUpdate(BaseCallback):
    """Calls a function of the algorithm, such as an `agents.training.Watcher`, after each update and at the end of
    `learn`; training stops if it returns False."""

    def __init__(self, after_update: Callable[[Any], bool | None]) -> None:
        super().__init__()
        self.after_update, self._going_on, self._seen = after_update, True, 0

    def _on_training_start(self) -> None:
        self._going_on, self._seen = True, self.num_timesteps

    def _on_rollout_start(self) -> None:
        if self.num_timesteps > self._seen:
            self._seen = self.num_timesteps
            self._going_on = self.after_update(self.model) is not False

    def _on_step(self) -> bool:
        return self._going_on
