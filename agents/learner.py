"""What PPO and REINFORCE share: advantages, updates, logs, and checkpoints that resume bit for bit."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, Self

import gymnasium
import numpy as np
import pandas as pd
import torch
from gymnasium.vector import VectorEnv
from threadpoolctl import threadpool_limits

from agents import checkpoints
from agents.checkpoints import CheckpointError
from agents.console import interruptible, progress
from agents.descent import Descent
from agents.distributions import Evaluation, distribution
from agents.episodes import Episodes
from agents.networks import Moments, Network, Preprocessor
from agents.rollouts import Collector, NotFiniteError, Rollout, make_rows
from agents.settings import POLICY, schedule, validate

WINDOW = 100  # episodes in rollout/ep_rew_mean
CLIP_REWARD = 10.0  # of normalised rewards
EPISODES = "episodes.csv"
Logs = dict[str, float]


class Batch(NamedTuple):
    """What an update learns from: flat `[time * rows, ...]`, or `[time, rows, ...]` for a recurrent policy."""

    inputs: np.ndarray
    actions: np.ndarray
    masks: np.ndarray | None
    log_prob: np.ndarray
    advantages: np.ndarray
    returns: np.ndarray
    starts: np.ndarray
    valid: np.ndarray
    state: np.ndarray  # `[rows, gru]`

    def take(self, places: np.ndarray | slice) -> Batch:
        """The transitions at these places, or the rows of a recurrent batch."""
        if self.inputs.ndim == 2:
            return Batch._make([None if each is None else each[places] for each in self[:6]] + list(self[6:]))
        return Batch._make([*(None if each is None else each[:, places] for each in self[:-1]), self.state[places]])


class Learner:
    """Base of the learners. Settings have SB3's names and meanings.

    `learning_rate` and `temperature` are numbers, or "linear A" or "linear A B": a straight line from A to B (to 0)
    over the training. `policy_kwargs` has `net_arch` (a list, for policy and value each) and `gru` (units of a GRU
    before both, 0 for none). Actions are drawn from the head's outputs divided by the temperature.
    """

    name: ClassVar[str]

    def __init__(
        self,
        env: str | gymnasium.Env[Any, Any] | VectorEnv[Any, Any, Any],
        n_envs: int,
        env_kwargs: dict[str, Any] | None,
        seed: int,
        device: str,
        tensorboard_log: str | Path | None,
        settings: dict[str, Any],
    ) -> None:
        validate(settings | {"n_envs": n_envs})
        self.rows = make_rows(env, n_envs, env_kwargs or {})
        self.env_id, self.settings, self.device = (env if isinstance(env, str) else None), settings, device
        self.arguments: dict[str, Any] = {
            "n_envs": self.rows.count,
            "env_kwargs": env_kwargs or {},
            "seed": seed,
            "device": device,
        }
        self.tensorboard_log = tensorboard_log
        self.distribution = distribution(self.rows.action_space)
        if self.distribution.free and schedule(settings["temperature"]) != (1, 1):
            raise ValueError("temperature is for actions drawn from logits; for a Box ent_coef widens the exploration")
        self.preprocessor = Preprocessor(self.rows.observation_space, settings["normalize_observations"])
        sizes: dict[str, Any] = POLICY | (settings["policy_kwargs"] or {})
        self.network = Network(
            self.preprocessor.size, self.distribution.size, free=self.distribution.free, seed=seed, **sizes
        )
        self.descent = Descent(self.network, device)
        self.generator = np.random.default_rng([seed, 1])  # another stream than those of the environment's rows
        self.collector = Collector(self.rows, self.preprocessor.flatten, self.network.begin(self.rows.count))
        self.episodes, self._window = Episodes(self.rows.count), pd.DataFrame()
        self._of_returns, self._discounted = Moments(1), np.zeros(self.rows.count)
        self.num_timesteps = self.goal = self.num_updates = 0
        self._temperature = np.float32(self.now("temperature"))
        # The folder of this training's checkpoints, and what tells the newest of them.
        self._run: tuple[Path, str | None] | None = None
        self._episodes_size = 0  # of its episodes.csv, in bytes
        self.logs: Logs = {}
        self._writer: Any = None

    # What a subclass says.

    def gradient(self, evaluation: Evaluation, log_prob: np.ndarray, advantages: np.ndarray) -> tuple[np.ndarray, bool]:
        """The gradient of the policy's loss, a sum, by the log probabilities `[n]`; whether to stop the update."""
        raise NotImplementedError

    def losses(self, evaluation: Evaluation, log_prob: np.ndarray, advantages: np.ndarray) -> Logs:
        """`train/policy_gradient_loss`, and what else the curves should show."""
        raise NotImplementedError

    # What users call.

    def predict(
        self,
        observation: np.ndarray,
        state: np.ndarray | None = None,
        episode_start: np.ndarray | None = None,
        deterministic: bool = True,
        action_masks: np.ndarray | None = None,
    ) -> tuple[np.ndarray, np.ndarray | None]:
        """As SB3's, but deterministic unless told: actions for observations `[n, ...]`, or one for one observation, and
        the policy's next state. Raises `NotFiniteError` where the policy's outputs are not finite."""
        observation = np.asarray(observation)
        single = observation.shape == self.rows.observation_space.shape
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
        callback: Callable[[Self], object] | None = None,
        progress_bar: bool = False,
        checkpoint_path: str | Path | None = None,
        checkpoint_every: int = 100_000,
    ) -> Self:
        """Train for so many more steps, or, without a number, to where a resumed training was to end.

        `callback` is called after each update and ends the training where it returns False. With a `checkpoint_path`
        the training is saved there about every `checkpoint_every` steps, at its end and on Ctrl-C; `resume` goes on
        from there, bit for bit. Raises `ValueError` where there is nothing to do, or where the path has another
        training's checkpoints.
        """
        goal = self.goal if total_timesteps is None else self.num_timesteps + total_timesteps
        if self.num_timesteps >= goal:
            raise ValueError(
                f"nothing to do: {self.num_timesteps} of {goal} steps are done; learn(total_timesteps=N), N > 0, "
                "trains N more"
            )
        if checkpoint_path is not None:
            self._claim(Path(checkpoint_path))
        self.goal = goal
        if self.collector.observations is None:
            self.collector.begin(self.arguments["seed"])
            self._forget()
        threads, begun, before = torch.get_num_threads(), time.perf_counter(), self.num_timesteps
        saved, interrupted, ended = before, False, False
        torch.set_num_threads(1)
        try:
            with (
                threadpool_limits(1, "blas"),
                np.errstate(over="ignore", invalid="ignore"),  # what is not finite is found and named
                interruptible() as wanted,
                progress(self, progress_bar) as advance,
            ):
                while self.num_timesteps < self.goal and not interrupted and not ended:
                    batch = self._batch()
                    self.logs |= self._update(batch)
                    ended = callback is not None and callback(self) is False
                    self._write((self.num_timesteps - before) / (time.perf_counter() - begun))
                    advance()
                    interrupted = wanted.is_set()
                    due = self.num_timesteps >= min(saved + checkpoint_every, self.goal) or interrupted or ended
                    if checkpoint_path is not None and due:
                        saved = self.num_timesteps
                        self.checkpoint(checkpoint_path)
        finally:
            torch.set_num_threads(threads)
        if interrupted and self.num_timesteps < self.goal:
            mend = (
                f"{self.name}.resume({str(checkpoint_path)!r}).learn() goes on" if checkpoint_path else "nothing saved"
            )
            raise KeyboardInterrupt(f"stopped after {self.num_timesteps} steps; {mend}")
        return self

    def save(self, path: str | Path, **more: Any) -> None:
        """Write all that `load` and `resume` need, and `more`, into the folder `path`; nothing is pickled.

        Raises `ValueError` where the folder holds anything but a checkpoint.
        """
        self._check_saveable()
        checkpoints.save(Path(path), self._content() | more)

    def checkpoint(self, run: str | Path) -> None:
        """Save as the newest checkpoint of the folder `run`, of which two are kept; its episodes.csv grows.

        An environment without `state` and `restore` begins new episodes here, as it will when this is resumed.
        """
        run = Path(run)
        self._claim(run)
        if not self.rows.has_state:
            self.collector.begin(int(self.generator.integers(2**31)))
            self._forget()
        self._episodes_size = self.episodes.append_to(run / EPISODES, self._episodes_size)
        self.save(checkpoints.numbered(run, self.num_timesteps))
        checkpoints.prune(run)
        self._run = run.resolve(), checkpoints.newest(run)

    @classmethod
    def load(cls, path: str | Path, device: str | None = None) -> Self:
        """The learner in a folder of `save`, or in a run's newest whole checkpoint; it will begin new episodes.

        Raises `CheckpointError` where a byte of it is not what was written, or where it is another algorithm's.
        """
        found, _ = cls._load(Path(path), device)
        found.collector.observations = None
        found._forget()
        return found

    @classmethod
    def resume(cls, path: str | Path, tensorboard_log: str | Path | None = None, device: str | None = None) -> Self:
        """As `load`, and all else as it was: `learn()` goes on as if it had never stopped, bit for bit.

        An environment without `state` and `restore` begins new episodes, which for a folder of `checkpoint` is what the
        training that wrote it did too.
        """
        found, content = cls._load(Path(path), device)
        found.tensorboard_log = tensorboard_log or content["tensorboard_log"]
        if newest := checkpoints.newest(Path(path)):
            found._run = Path(path).resolve(), newest
        return found

    @classmethod
    def _load(cls, path: Path, device: str | None) -> tuple[Self, dict[str, Any]]:
        content = checkpoints.find(path)
        if content.get("algorithm") != cls.name:
            raise CheckpointError(f"{path} holds a checkpoint of {content.get('algorithm')}, not of {cls.name}")
        arguments = content["arguments"] | ({"device": device} if device else {})
        found = cls(content["env"], **arguments, **content["settings"])
        try:
            found._restore(content)
        except (ValueError, KeyError, TypeError) as error:
            raise CheckpointError(f"{path} does not fit {content['env']} as it is made here: {error}") from error
        return found, content

    def close(self) -> None:
        """Close the environment and the TensorBoard file."""
        self.rows.env.close()
        if self._writer is not None:
            self._writer.close()
            self._writer = None

    def _check_saveable(self) -> None:
        if self.env_id is None:
            raise ValueError("only a learner made with an environment's id can be saved: `load` must make it again")
        try:
            json.dumps(self.arguments)
        except TypeError as error:
            raise ValueError(f"env_kwargs cannot be saved: {error}; use numbers, strings and lists") from error

    def _claim(self, run: Path) -> None:
        """Make a folder this training's own; nobody else's checkpoints may be there, its episodes must be."""
        self._check_saveable()
        newest, size = checkpoints.newest(run), (run / EPISODES).stat().st_size if (run / EPISODES).exists() else 0
        if self._run != (run.resolve(), newest):
            if newest is not None or size:
                raise ValueError(
                    f"{run} holds what another training wrote ({newest.split()[0] if newest else EPISODES}): "
                    f"{self.name}.resume goes on with its newest checkpoint; for a new one name another folder"
                )
            self._run, self._episodes_size = (run.resolve(), None), 0
            self.episodes.rewind()
        if self._episodes_size > size:
            raise CheckpointError(
                f"{run / EPISODES} had {self._episodes_size} bytes and has {size}: put it back, or checkpoint to "
                "another folder"
            )

    def _forget(self) -> None:
        """New episodes begin in all rows: what is unfinished does not count."""
        self.episodes.forget()
        self._discounted = np.zeros(self.rows.count)

    def _content(self) -> dict[str, Any]:
        return {
            "algorithm": self.name,
            "env": self.env_id,
            "arguments": self.arguments,
            "settings": self.settings,
            "tensorboard_log": None if self.tensorboard_log is None else str(self.tensorboard_log),
            "descent": self.descent.state(),
            "generator": self.generator.bit_generator.state,
            "observations": vars(self.preprocessor.moments),
            "returns": vars(self._of_returns) | {"discounted": self._discounted},
            "counts": [self.num_timesteps, self.goal, self.num_updates, self._episodes_size],
            "temperature": float(self._temperature),
            "collector": self.collector.state(),
            "episodes": self.episodes.carry,
            "window": {name: column.to_numpy() for name, column in self._window.items()},
        }

    def _restore(self, content: dict[str, Any]) -> None:
        self.descent.restore(content["descent"])
        self.generator.bit_generator.state = content["generator"]
        vars(self.preprocessor.moments).update(content["observations"])
        self.preprocessor.refresh()
        self._discounted = content["returns"].pop("discounted")
        vars(self._of_returns).update(content["returns"])
        self.num_timesteps, self.goal, self.num_updates, self._episodes_size = content["counts"]
        self._temperature = np.float32(content["temperature"])
        self.collector.restore(content["collector"])
        self.episodes.carry, self._window = content["episodes"], pd.DataFrame(content["window"])
        if content["collector"]["env"] is None:
            self._forget()

    def now(self, setting: str) -> float:
        """A setting that may be a schedule, at this moment of the training."""
        begin, end = schedule(self.settings[setting])
        return begin + (end - begin) * min(1.0, self.num_timesteps / max(1, self.goal))

    # Rollouts.

    def _head(self, flat: np.ndarray, state: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        head, state = self.network.act(self.preprocessor(flat), state)
        return (head if self._temperature == 1 else head / self._temperature), state

    def _act(self, flat: np.ndarray, state: np.ndarray, masks: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
        head, state = self._head(flat, state)
        return self.distribution.sample(head, self.generator, masks), state

    def _batch(self) -> Batch:
        """Collect a rollout and make a batch of it; episodes and logs are brought up to date."""
        self._temperature = np.float32(self.now("temperature"))
        rollout = self.collector.collect(self.settings["n_steps"], self._act)
        done = (rollout.terminated | rollout.truncated) & rollout.valid
        inputs = self.preprocessor(rollout.observations)
        heads, values = self.descent.evaluate(inputs, rollout.starts, rollout.state)
        masks = None if rollout.masks is None else rollout.masks.reshape(done.size, -1)
        actions = rollout.actions.reshape(done.size, *self.distribution.shape)
        evaluation = self.distribution.evaluate(heads.reshape(done.size, -1) / self._temperature, actions, masks)
        advantages = self._advantages(rollout, self._scaled(rollout, done), values, done)
        returns = advantages + values
        self.num_timesteps += int(rollout.valid.sum())
        self._count(rollout, done, evaluation.entropy.reshape(done.shape))
        if rollout.valid.any():
            unexplained, variance = (float(each[rollout.valid].var()) for each in (advantages, returns))
            self.logs["train/explained_variance"] = 1 - unexplained / max(variance, 1e-12)
        self.preprocessor.update(rollout.observations[rollout.valid])
        parts = (inputs, rollout.actions, rollout.masks, evaluation.log_prob.reshape(done.shape), advantages, returns)
        batch = Batch(*parts, rollout.starts, rollout.valid, rollout.state)
        if self.network.gru:
            return batch
        flat: Any = (None if each is None else each.reshape(done.size, *each.shape[2:]) for each in batch[:-1])
        return Batch._make([*flat, rollout.state])

    def _following(self, rollout: Rollout, values: np.ndarray) -> np.ndarray:
        """The values after each step: 0 where it terminated an episode, the last observation's where it cut one."""
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

    def _advantages(self, rollout: Rollout, rewards: np.ndarray, values: np.ndarray, done: np.ndarray) -> np.ndarray:
        """Generalised advantage estimation (Schulman et al. 2016)."""
        gamma, decay = self.settings["gamma"], np.float32(self.settings["gamma"] * self.settings["gae_lambda"])
        found = (rewards + gamma * self._following(rollout, values) - values).astype(np.float32)
        going_on = decay * (~done).astype(np.float32)
        for step in range(len(found) - 2, -1, -1):
            found[step] += going_on[step] * found[step + 1]
        return found

    def _scaled(self, rollout: Rollout, done: np.ndarray) -> np.ndarray:
        """Rewards over the running deviation of discounted returns, as SB3's VecNormalize, where this is wanted."""
        rewards = rollout.rewards
        if not self.settings["normalize_rewards"]:
            return rewards
        returns = np.empty_like(rewards)
        for step, reward in enumerate(rewards):
            self._discounted = returns[step] = self._discounted * self.settings["gamma"] + reward
            self._discounted = np.where(done[step], 0.0, self._discounted)
        self._of_returns.update(returns[rollout.valid][:, None])
        found: np.ndarray = np.clip(rewards * self._of_returns.scale(), -CLIP_REWARD, CLIP_REWARD)
        return found

    # Updates.

    def _update(self, batch: Batch) -> Logs:
        """Epochs of minibatches over a batch; logs are of each epoch's last minibatch, averaged."""
        if not batch.valid.any():
            return {}
        size, found, stop = self.settings["batch_size"], list[Logs](), False
        if self.network.gru:
            places = np.arange(batch.inputs.shape[1])
            size = max(1, round(size / len(batch.inputs))) if size else len(places)
        else:
            places = batch.valid.nonzero()[0]
            size = size or len(places)
        rate = self.now("learning_rate")
        for _ in range(self.settings.get("n_epochs", 1)):
            shuffled = batch.take(self.generator.permutation(places))
            for start in range(0, len(places), size):
                minibatch, last = shuffled.take(slice(start, start + size)), start + size >= len(places)
                logs, stop = self._minibatch(minibatch, rate, last)
                found += [logs] if logs else []
                if stop:
                    break
            self.num_updates += 1
            if stop:
                break
        means = {key: float(np.mean([each[key] for each in found])) for key in found[0]} if found else {}
        return means | {"train/learning_rate": rate, "train/n_updates": self.num_updates}

    def _minibatch(self, batch: Batch, rate: float, wanted: bool) -> tuple[Logs, bool]:
        """One step of the optimiser, unless the policy has moved too far; logs where they are wanted."""
        settings, temperature, n = self.settings, self._temperature, batch.advantages.size
        head, values = self.descent.forward(batch.inputs, batch.starts, batch.state)
        shapes = head.shape, values.shape
        if self.network.gru:  # take the valid transitions out of the sequences
            keep = batch.valid.ravel()
            if not (n := int(keep.sum())):
                return {}, False
            flat: Any = (
                None if e is None else e.reshape(len(keep), *e.shape[2:])[keep] for e in (*batch[:-1], head, values)
            )
            *parts, head, values = flat
            batch = Batch._make([*parts, batch.state])
        advantages = _normalized(batch.advantages) if settings["normalize_advantage"] and n > 1 else batch.advantages
        scaled = head if temperature == 1 else head / temperature
        evaluation = self.distribution.evaluate(scaled, batch.actions, batch.masks)
        of_log_prob, stop = self.gradient(evaluation, batch.log_prob, advantages)
        errors = values - batch.returns
        logs = self._losses(evaluation, batch.log_prob, advantages, errors) if wanted or stop else {}
        if stop:
            return logs, True
        of_head = self.distribution.gradient(evaluation, of_log_prob * np.float32(1 / n), -settings["ent_coef"] / n)
        of_values = errors * np.float32(2 * settings["vf_coef"] / n)
        if temperature != 1:
            of_head /= temperature
        if self.network.gru:
            of_head, of_values = (
                _spread(each, keep, shape) for each, shape in zip((of_head, of_values), shapes, strict=True)
            )
        self.descent.backward(of_head, of_values)
        if not self.descent.step(rate, settings["max_grad_norm"]) < np.inf:
            raise NotFiniteError(
                f"{self.rows.name}: the gradient after {self.num_timesteps} steps is not finite; the weights are those "
                "before it: lower learning_rate, or normalise observations and rewards"
            )
        return logs, False

    def _losses(self, evaluation: Evaluation, log_prob: np.ndarray, advantages: np.ndarray, errors: np.ndarray) -> Logs:
        found = self.losses(evaluation, log_prob, advantages)
        policy = found["train/policy_gradient_loss"]
        value, entropy = float(np.square(errors).mean()), float(evaluation.entropy.mean())
        total = policy - self.settings["ent_coef"] * entropy + self.settings["vf_coef"] * value
        return found | {"train/value_loss": value, "train/entropy_loss": -entropy, "train/loss": total}

    # Logs.

    def _count(self, rollout: Rollout, done: np.ndarray, entropy: np.ndarray) -> None:
        valid = rollout.valid.astype(np.float64)
        steps = {"length": valid, "return": rollout.rewards, "entropy": entropy * valid}
        actions = rollout.actions.reshape(*done.shape, -1)
        steps["action"] = actions.sum(-1) * valid
        for key, values in rollout.infos.items():
            steps[key if key.startswith(Episodes.SUMMED) else f"last:{key}"] = values
        taken = valid.sum(1).cumsum().astype(np.int64)
        ended = self.episodes.add(steps, done, self.num_timesteps - taken[-1] + taken)
        self._window = pd.concat([self._window, ended]).tail(WINDOW) if len(ended) else self._window
        if len(self._window):
            self.logs["rollout/ep_rew_mean"] = float(self._window["return"].mean())
            self.logs["rollout/ep_len_mean"] = float(self._window["length"].mean())
        for key in ended.columns if len(ended) else ():
            if "/" in key:
                self.logs[key] = float(ended[key].mean())

    def _write(self, fps: float) -> None:
        self.logs |= {"time/fps": fps, "time/total_timesteps": self.num_timesteps}
        if self.tensorboard_log is None:
            return
        if self._writer is None:
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(str(self.tensorboard_log), purge_step=self.num_timesteps)
        for key, value in self.logs.items():
            self._writer.add_scalar(key, value, self.num_timesteps)
        self._writer.flush()
        self.logs = {key: value for key, value in self.logs.items() if not key.startswith("eval/")}


def _normalized(values: np.ndarray) -> np.ndarray:
    """Values less their mean, over their deviation."""
    size = np.float32(len(values))
    values = values - np.add.reduce(values) / size
    values /= np.sqrt(values.dot(values) / (size - 1)) + np.float32(1e-8)
    return values


def _spread(values: np.ndarray, places: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Values at some places of an array `shape`, 0 elsewhere."""
    found = np.zeros((len(places), *values.shape[1:]), dtype=np.float32)
    found[places] = values
    return found.reshape(shape)
