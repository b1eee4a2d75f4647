"""Base of PPO and REINFORCE: acting, training, and checkpoints that resume bit for bit."""

from __future__ import annotations

import copy
import time
from pathlib import Path
from typing import Annotated, Any, ClassVar, Self

import gymnasium
import numpy as np
import pandas as pd
import torch
from annotated_types import Ge, Le
from gymnasium import spaces
from gymnasium.vector import VectorEnv
from threadpoolctl import threadpool_limits

from agents.batches import Batch, RewardScale, beside_others, gae
from agents.callbacks import Callbacks, callback_of
from agents.console import interruptible, progress
from agents.descent import Descent
from agents.distributions import Evaluation, distribution
from agents.logs import Logs
from agents.networks import Network, residual_of
from agents.preprocessing import Preprocessor
from agents.resumable import Resumable
from agents.rollouts import Collector, NotFiniteError, Rollout, make_rows
from agents.set_network import SetNetwork, set_network
from agents.settings import POLICIES, Settings
from agents.updates import Updates
from cost.arguments import validated
from cost.files import alone

AnyEnv = str | gymnasium.Env[Any, Any] | VectorEnv[Any, Any, Any]


class Learner(Resumable):
    """Base class of learners with the interface of SB3: `PPO("MlpPolicy", env, verbose=1, n_steps=128).learn(100_000)`.

    `policy` is "MlpPolicy" or "GruPolicy". `env` is an id such as "moe_envs:MoERouting-v0" (created with `n_envs`
    rows and `env_kwargs`, natively vectorised if possible), an environment, or a vector environment. Other arguments
    are those of `settings_class`.
    """

    settings_class: ClassVar[type[Settings]]

    @validated
    def __init__(
        self,
        policy: str,
        env: AnyEnv,
        *,
        verbose: int | bool = 0,
        seed: Annotated[int, Ge(0)] | None = 0,
        device: str | torch.device = "cpu",
        tensorboard_log: str | Path | None = None,
        n_envs: Annotated[int, Ge(1), Le(2**16)] = 8,
        env_kwargs: dict[str, Any] | None = None,
        **settings: Any,
    ) -> None:
        if policy not in POLICIES:
            raise ValueError(f"policy={policy!r} is not one of {', '.join(POLICIES)}; it stands before env, as in SB3")
        self.settings = self.settings_class.of(settings)
        self.arguments: dict[str, Any] = {
            "policy": policy, "n_envs": n_envs, "env_kwargs": env_kwargs or {},
            "seed": int(np.random.SeedSequence().generate_state(1)[0]) if seed is None else seed, "device": str(device),
        }  # fmt: skip
        self.rows = make_rows(env, n_envs, self.arguments["env_kwargs"])
        self.env_id, self.arguments["n_envs"] = env if isinstance(env, str) else None, self.rows.count
        self.distribution = distribution(self.action_space)
        if self.distribution.free and self.settings.temperature not in (1, 1.0):
            raise ValueError("temperature is for actions drawn from logits; for a Box ent_coef widens the exploration")
        self.preprocessor = Preprocessor(self.observation_space, self.settings.normalize_observations)
        sizes: dict[str, Any] = POLICIES[policy] | (self.settings.policy_kwargs or {})
        self.network = self._network(sizes, self.arguments["seed"])
        self.descent = Descent(self.network, str(device))
        # Separate from the streams of the environment's rows.
        self.generator = np.random.default_rng([self.arguments["seed"], 1])
        self.updates = Updates(self, self.settings, self.descent, self.distribution)
        self.collector = self._collector()
        self.reward_scale = RewardScale(self.rows.count, self.settings.gamma)
        self.log = Logs(self.rows.count, tensorboard_log, verbose)
        self.num_timesteps = self.goal = 0
        self._temperature = np.float32(self._now("temperature"))

    def _collector(self) -> Collector:
        begin = self.network.begin(self.rows.count)
        return Collector(self.rows, self.preprocessor.flatten, begin, self.settings.group_size)

    def _network(self, sizes: dict[str, Any], seed: int) -> Network | SetNetwork:
        env, outputs = self.rows.env.unwrapped, self.distribution.size
        if sizes.pop("residual", False):
            sizes["residual"] = residual_of(env, self.preprocessor, outputs)
        if not sizes.pop("equivariant", False):
            return Network(self.preprocessor.size, outputs, free=self.distribution.free, seed=seed, **sizes)
        if sizes.pop("gru") or self.distribution.free:
            raise ValueError("policy_kwargs equivariant=True is for discrete actions, without a GRU")
        return set_network(env, self.action_space, seed=seed, **sizes)

    # Overridden by subclasses.

    def gradient(self, evaluation: Evaluation, log_prob: np.ndarray, advantages: np.ndarray) -> tuple[np.ndarray, bool]:
        """Gradient of the summed policy loss by the log probabilities `[n]`, and whether to stop the update."""
        raise NotImplementedError

    def losses(self, evaluation: Evaluation, log_prob: np.ndarray, advantages: np.ndarray) -> dict[str, float]:
        """`train/policy_gradient_loss` and other values to log."""
        raise NotImplementedError

    # Public methods.

    @property
    def logs(self) -> dict[str, float]:
        """Latest values by SB3's names, such as `rollout/ep_rew_mean`."""
        return self.log.values

    @property
    def observation_space(self) -> spaces.Space[Any]:
        """Of one row."""
        return self.rows.observation_space

    @property
    def action_space(self) -> spaces.Space[Any]:
        """Of one row."""
        return self.rows.action_space

    def get_env(self) -> VectorEnv[Any, Any, Any]:
        """The vector environment."""
        return self.rows.env

    def set_env(self, env: AnyEnv) -> None:
        """Replace the training environment; raises `ValueError` if its spaces or number of rows differ."""
        rows, before = make_rows(env, self.rows.count, self.arguments["env_kwargs"]), self.rows
        same = rows.observation_space == before.observation_space and rows.action_space == before.action_space
        if not same or rows.count != before.count:
            raise ValueError(f"{env} has other spaces, or another number of rows, than {before.name}")
        self.rows, self.env_id = rows, env if isinstance(env, str) else None
        self.collector = self._collector()
        self._forget()

    def on(self, env: str, env_kwargs: dict[str, Any] | None = None) -> Self:
        """The same policy for one row of another environment, given by its id.

        Raises `ValueError` if the weights do not fit. An `equivariant` policy fits any number of actions.
        """
        made = type(self)(
            self.arguments["policy"], env, env_kwargs=env_kwargs, n_envs=1, seed=self.arguments["seed"],
            **vars(self.settings) | {"group_size": 1},
        )  # fmt: skip
        if made.network.shapes != self.network.shapes:
            raise ValueError(f"{env} with {env_kwargs} needs a policy of other weights than this one")
        made.network.flat.copy_(self.network.flat)
        vars(made.preprocessor.moments).update(copy.deepcopy(vars(self.preprocessor.moments)))
        made.preprocessor.refresh()
        return made

    def predict(
        self,
        observation: np.ndarray,
        state: np.ndarray | None = None,
        episode_start: np.ndarray | None = None,
        deterministic: bool = True,
        action_masks: np.ndarray | None = None,
    ) -> tuple[np.ndarray, np.ndarray | None]:
        """Like SB3's `predict`, but deterministic by default: actions for observations `[n, ...]` or for one
        observation, and the next policy state. Raises `NotFiniteError` if the outputs of the policy are not finite."""
        observation = np.asarray(observation)
        single = observation.shape == self.observation_space.shape
        flat = self.preprocessor.flatten(observation[None] if single else observation)
        before = self.network.begin(len(flat)) if state is None else state
        if episode_start is not None:
            before = before * ~np.atleast_1d(episode_start).astype(np.bool_)[:, None]
        head, after = self._head(flat, before)
        if not np.isfinite(head).all():
            raise NotFiniteError(f"the policy's outputs for row {np.argwhere(~np.isfinite(head))[0][0]} are not finite")
        masks = None if action_masks is None else np.atleast_2d(action_masks)
        if deterministic:
            actions = self.distribution.mode(head, masks)
        else:
            actions = self.distribution.sample(head, self.generator, masks)
        actions = self.rows.clip(actions)
        return (actions[0] if single else actions), (after if self.network.gru else None)

    def learn(
        self,
        total_timesteps: int | None = None,
        callback: Callbacks = None,
        log_interval: int = 1,
        tb_log_name: str | None = None,
        reset_num_timesteps: bool = True,
        progress_bar: bool = False,
        *,
        checkpoint_path: str | Path | None = None,
        checkpoint_every: int = 100_000,
    ) -> Self:
        """Train for `total_timesteps`; by default, to the planned end of a resumed training.

        As in SB3, the step count and episodes start anew unless `reset_num_timesteps=False`; the weights are kept.
        `callback` is a function of the learner, called after each update, that stops the training by returning False;
        or an `agents.callbacks.Callback`; or several. With `verbose=1`, a table is printed every `log_interval`
        updates. TensorBoard logs go to `tensorboard_log`/`tb_log_name`_N. With `checkpoint_path`, the training is saved
        about every `checkpoint_every` steps, at its end and on Ctrl-C; `resume` continues it bit for bit. Raises
        `ValueError` if there is nothing to do, if the path has checkpoints of another training, or while another
        process trains into it.
        """
        self.check_groups()
        arguments = total_timesteps, callback, log_interval, tb_log_name, reset_num_timesteps, progress_bar
        if checkpoint_path is None:
            self._learn(*arguments, None, checkpoint_every)
        else:
            with alone(Path(checkpoint_path), ValueError):
                self._learn(*arguments, checkpoint_path, checkpoint_every)
        return self

    def check_groups(self) -> None:
        """Raise `ValueError` if the rows are not whole groups, which learning needs and deciding does not."""
        if self.rows.count % self.settings.group_size:
            raise ValueError(f"n_envs={self.rows.count}: must be a multiple of group_size={self.settings.group_size}")

    def _learn(
        self, total_timesteps: int | None, callback: Callbacks, log_interval: int, tb_log_name: str | None,
        reset_num_timesteps: bool, progress_bar: bool, checkpoint_path: str | Path | None, checkpoint_every: int,
    ) -> None:  # fmt: skip
        """`learn`, once the folder of the checkpoints is held."""
        anew = total_timesteps is not None and reset_num_timesteps
        self._aim(total_timesteps, anew)
        if checkpoint_path is not None:
            self._claim(Path(checkpoint_path))
        if self.collector.observations is None:
            self.collector.begin(self.arguments["seed"])
            self._forget()
        self.log.open(tb_log_name or self.name, anew, self.num_timesteps)
        called, threads, begun = callback_of(callback), torch.get_num_threads(), time.perf_counter()
        before = saved = self.num_timesteps
        interrupted, ended, number = False, False, 0
        called.on_training_start(self)
        torch.set_num_threads(1)
        try:
            with (
                threadpool_limits(1, "blas"),
                np.errstate(over="ignore", invalid="ignore"),  # non-finite values are reported as errors
                interruptible() as wanted,
                progress(self.name, before, self.goal, progress_bar) as advance,
            ):
                while self.num_timesteps < self.goal and not interrupted and not ended:
                    self._improve()
                    number += 1
                    ended = called.on_update(self) is False
                    fps = (self.num_timesteps - before) / (time.perf_counter() - begun)
                    self.log.values |= {"time/fps": fps, "time/total_timesteps": self.num_timesteps}
                    self.log.write(self.num_timesteps, shown=number % log_interval == 0)
                    advance(self.num_timesteps)
                    interrupted = wanted.is_set()
                    due = self.num_timesteps >= min(saved + checkpoint_every, self.goal) or interrupted or ended
                    if checkpoint_path is not None and due:
                        saved = self.num_timesteps
                        self.checkpoint(checkpoint_path)
        finally:
            torch.set_num_threads(threads)
        called.on_training_end(self)
        if interrupted and self.num_timesteps < self.goal:
            mend = (
                f"{self.name}.resume({str(checkpoint_path)!r}).learn() goes on" if checkpoint_path else "nothing saved"
            )
            raise KeyboardInterrupt(f"stopped after {self.num_timesteps} steps; {mend}")

    def close(self) -> None:
        """Close the environment and the TensorBoard file."""
        self.rows.env.close()
        self.log.close()

    def _aim(self, total_timesteps: int | None, anew: bool) -> None:
        """Set the step at which the training ends."""
        if total_timesteps is not None and total_timesteps > 0:
            if anew and self.num_timesteps:
                self.num_timesteps, self.collector.observations, self.log.window = 0, None, pd.DataFrame()
            self.goal = self.num_timesteps + total_timesteps
        if self.num_timesteps >= self.goal or (total_timesteps is not None and total_timesteps <= 0):
            raise ValueError(
                f"nothing to do: {self.num_timesteps} of {self.goal} steps are done; learn(total_timesteps=N), N > 0, "
                "trains N steps"
            )

    # Training.

    def _now(self, name: str) -> float:
        return self.settings.now(name, self.num_timesteps / max(1, self.goal))

    def _improve(self) -> None:
        """Collect one rollout and update once."""
        self._temperature = np.float32(self._now("temperature"))
        batch = self._batch(self.collector.collect(self.settings.n_steps, self._act))
        try:
            self.log.values |= self.updates(batch, self.generator, self._now("learning_rate"), self._temperature)
        except NotFiniteError as error:
            raise NotFiniteError(f"{self.rows.name}, after {self.num_timesteps} steps: {error}") from None

    def _head(self, flat: np.ndarray, state: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        head, state = self.network.act(self.preprocessor(flat), state)
        return (head if self._temperature == 1 else head / self._temperature), state

    def _act(self, flat: np.ndarray, state: np.ndarray, masks: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
        head, state = self._head(flat, state)
        return self.distribution.sample(head, self.generator, masks), state

    def _batch(self, rollout: Rollout) -> Batch:
        """Create a batch from a rollout, and update episodes and logs."""
        done = (rollout.terminated | rollout.truncated) & rollout.valid
        inputs = self.preprocessor(rollout.observations)
        heads, values = self.descent.evaluate(inputs, rollout.starts, rollout.state)
        masks = None if rollout.masks is None else rollout.masks.reshape(done.size, -1)
        actions = rollout.actions.reshape(done.size, *self.distribution.shape)
        evaluation = self.distribution.evaluate(heads.reshape(done.size, -1) / self._temperature, actions, masks)
        rewards = self.reward_scale(rollout, done) if self.settings.normalize_rewards else rollout.rewards
        following = self._following(rollout, values)
        gamma = self.settings.gamma if rollout.discount is None else self.settings.gamma * rollout.discount
        advantages = gae(rewards, values, following, done, gamma, self.settings.gae_lambda)
        returns = advantages + values
        self.num_timesteps += int(rollout.valid.sum())
        self.log.count(rollout, done, evaluation.entropy.reshape(done.shape), self.num_timesteps)
        if rollout.valid.any():
            unexplained, variance = (float(each[rollout.valid].var()) for each in (advantages, returns))
            self.log.values["train/explained_variance"] = 1 - unexplained / max(variance, 1e-12)
        if self.settings.group_size > 1:
            advantages = beside_others(advantages, done, self.settings.group_size)
        self.preprocessor.update(rollout.observations[rollout.valid])
        parts = (inputs, rollout.actions, rollout.masks, evaluation.log_prob.reshape(done.shape), advantages, returns)
        batch = Batch(*parts, rollout.starts, rollout.valid, rollout.state)
        return batch if self.network.gru else batch.flat()

    def _following(self, rollout: Rollout, values: np.ndarray) -> np.ndarray:
        """Values after each step: 0 after termination, the value of the last observation after truncation."""
        last = self.collector
        assert last.observations is not None
        parts = (last.observations, last.starts, last.policy_state)
        cut = (rollout.cut_observations, np.zeros(len(rollout.cut_rows)), rollout.cut_states)
        of_last, of_cut = (
            self.descent.evaluate(self.preprocessor(inputs)[None], starts[None], state)[1][0]
            for inputs, starts, state in (parts, cut)
        )
        found = np.concatenate([values[1:], of_last[None]])
        found[rollout.terminated] = 0
        found[rollout.cut_steps, rollout.cut_rows] = of_cut
        return found
