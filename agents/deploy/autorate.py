"""Set the learning rate of any torch training by a policy of MoEAutoRate-v0; no rate is asked for."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import nn

from agents.baselines.autorate import estimate, rule
from agents.deploy.snapshots import put_back, take, weights_of
from moe_envs.autorate.estimator import NO_PRIOR, PRIOR, observe, update
from moe_envs.autorate.signals import (
    BACK,
    DIVERGED,
    KEEP,
    LOSS_FLOOR,
    SWEEP_STEPS,
    TINY,
    RateSignals,
    changed,
    cosine,
    found_rate,
    of_window,
    signals_of,
    sweep_rates,
)

DECISIONS, LEAST_STEPS, SWEEP_SHARE = 45, 4, 0.1  # of a training; steps between two; the most that a range test takes
RULES = "default", "rule"


class AutoRate:
    """Sets the learning rate of a torch training of `steps` optimiser steps.

    Create it when model and optimiser are ready, call `step(loss)` after each `optimizer.step()`, and `finish()` at the
    end, which restores the state with the lowest validation loss. The first 60 steps, at most a tenth of all, are a
    range test, after which the weights are put back. Then a decision is made every `steps / decisions` steps: the
    policy multiplies the rate, or goes back to the best state.

    `policy` is "default" (moves to where a linear model of the signals estimates the best rate, and goes back where the
    loss is 30 % above the best one or the network died), "rule" (keeps the rate, goes back where the loss is 30 %
    above), the folder of a run of `moe-train --env MoEAutoRate-v0` or of a saved learner, or an object with `predict`.
    `validation()` returns the validation loss as a number; it is called at the start and at each decision, with
    Schedule-Free optimisers switched to `eval`.
    The rate that the optimiser was made with is ignored, but the ratios between those of its groups are kept. Buffers
    of `module`, such as a batch norm's, are put back with the weights. Takes the memory of five more copies of the
    weights and one of the optimiser's state.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        policy: Any = "default",
        *,
        validation: Callable[[], float],
        steps: int,
        decisions: int = DECISIONS,
        range_test: bool = True,
        module: nn.Module | None = None,
    ) -> None:
        if steps < 2 * LEAST_STEPS or decisions < 1:
            raise ValueError(f"steps={steps}, decisions={decisions}: at least {2 * LEAST_STEPS} steps and 1 decision")
        self.optimizer, self.validation, self.steps = optimizer, validation, steps
        self.policy, self._climb = load_policy(policy), not range_test
        self._buffers = [] if module is None else list(module.buffers())
        rates = [float(group["lr"]) for group in optimizer.param_groups]
        self._ratios = [rate / rates[0] if rates[0] > 0 else 1.0 for rate in rates]
        tested = min(SWEEP_STEPS, max(LEAST_STEPS, int(steps * SWEEP_SHARE))) if range_test else 0
        self._sweep = sweep_rates(tested) if tested else np.zeros(0)
        left = steps - len(self._sweep)
        count = max(1, min(decisions, left // LEAST_STEPS))
        self._ends = len(self._sweep) + np.linspace(0, left, count + 1).round().astype(np.int64)[1:]
        self.calls = self.decisions = self.backs = self._since_best = 0
        self.history: list[dict[str, float]] = []
        self._losses: list[float | torch.Tensor] = []
        self._logs = np.zeros((2, 0))  # logs of mean training and validation losses, newest first
        self._noted = {"slope": 0.0, "spread": 0.0, "step size": TINY, "straightness": 1.0, "turn": 0.0, "lost": 0.0}
        self._bad, self._way = 0.0, [torch.zeros_like(each) for each in weights_of(optimizer)]
        loss = self._validated()
        if not math.isfinite(loss):
            raise ValueError(f"validation() returned {loss} before the training; it must return a finite loss")
        self.first_loss = self.best_loss = max(loss, LOSS_FLOOR)
        self._logs = np.tile(np.log([[self.best_loss]]), (2, 3))
        self._best, self._best_norm = take(optimizer, self._buffers), self._norm(weights_of(optimizer))
        self._first_norm = self._best_norm
        self._start = self._before = self._best["tensors"]
        self.rate = rates[0]
        self._highest = self.rate
        self._best_rate, self._precision = math.log10(self.rate), NO_PRIOR**-2
        if range_test:
            self._set(float(self._sweep[0]))
        else:
            self._decide()

    def step(self, loss: float | torch.Tensor) -> float:
        """Note a training loss after `optimizer.step()`; returns the learning rate of the next step."""
        if self.calls >= self.steps:
            raise ValueError(f"step was called more than steps={self.steps} times")
        self.calls += 1
        self._losses.append(loss.detach() if isinstance(loss, torch.Tensor) else loss)
        if self.calls < len(self._sweep):
            self._set(float(self._sweep[self.calls]))
        elif self.calls == len(self._sweep):
            self._end_sweep()
        elif self.calls == self._ends[self.decisions - 1] - 1:
            self._before = [each.detach().clone() for each in weights_of(self.optimizer)]
        elif self.calls == self._ends[self.decisions - 1]:
            self._see()
            if self.calls < self.steps:
                self._decide()
        return float(self.optimizer.param_groups[0]["lr"])

    def finish(self) -> float:
        """Restore the state with the lowest validation loss, and return that loss."""
        put_back(self._best, self.optimizer, self._buffers)
        return self.best_loss

    def timeline(self) -> pd.DataFrame:
        """One row per decision: steps so far, action, rate without the cosine, and the validation loss after it."""
        return pd.DataFrame(self.history)

    def plot(self, path: str | Path) -> None:
        """Draw validation loss and learning rate over the steps."""
        from matplotlib.figure import Figure

        frame, figure = self.timeline(), Figure((8, 3.4), layout="constrained")
        for panel, column in zip(figure.subplots(1, 2), ("validation_loss", "rate"), strict=True):
            panel.plot(frame["step"], frame[column], "o-", ms=3)
            panel.set(xlabel="step", ylabel=column.replace("_", " "), yscale="log")
            panel.grid(alpha=0.3)
        figure.savefig(path, dpi=120)

    STATE = (
        *("calls", "decisions", "backs", "history", "first_loss", "best_loss", "rate", "_losses", "_logs", "_noted"),
        *("_bad", "_way", "_since_best", "_best", "_best_norm", "_first_norm", "_start", "_before", "_highest"),
        *("_best_rate", "_precision"),
    )

    def state_dict(self) -> dict[str, Any]:
        """State without model and optimiser, like that of a scheduler; tensors, numbers and lists only."""
        state = {name.lstrip("_"): copy.deepcopy(getattr(self, name)) for name in self.STATE}
        return state | {"logs": self._logs.tolist()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a `state_dict`; load those of model and optimiser separately, as with a scheduler."""
        for name in self.STATE:
            setattr(self, name, copy.deepcopy(state[name.lstrip("_")]))
        self._logs = np.array(state["logs"])

    def signals(self) -> RateSignals:
        """RateSignals for the policy."""
        noted = self._noted
        growth = self._norm(weights_of(self.optimizer)) / max(self._first_norm, TINY)
        values = (
            self.decisions / len(self._ends), len(self._ends), self._logs, noted["slope"], noted["spread"],
            np.log(self.first_loss), np.log(self.best_loss), self._since_best, noted["step size"],
            noted["straightness"], noted["turn"], growth, self.rate, self._highest, self._bad, self.backs,
            noted["lost"],
        )  # fmt: skip
        return RateSignals(*(np.asarray(value)[None] for value in values))

    def _decide(self) -> None:
        observation = observe(self.signals(), np.array([self._best_rate]))
        if self.decisions == 0:
            action = KEEP  # nothing has been observed
        elif self.policy == "rule":
            action = int(rule(observation, self._climb)[0])
        elif self.policy == "default":
            action = int(estimate(observation)[0])
        else:
            action = int(np.ravel(self.policy.predict(observation, deterministic=True)[0])[0])
        if action == BACK:
            self._go_back()
        self._change(action)
        self._set(self.rate * float(cosine(np.array(self.decisions / len(self._ends)))))
        self._start = [each.detach().clone() for each in weights_of(self.optimizer)]
        self._before, self._losses = self._start, []
        self.history.append({"step": self.calls, "action": action, "rate": self.rate, "validation_loss": math.nan})
        self.decisions += 1

    def _see(self) -> None:
        """Validate at the end of the steps of a decision, and note what the policy observes."""
        losses = np.array([[float(each) for each in self._losses]])
        validation = self._validated()
        weights = weights_of(self.optimizer)
        norm = self._norm(weights)
        self.history[-1]["validation_loss"] = validation
        lost = not (validation < self.first_loss * math.exp(DIVERGED) and np.isfinite(losses).all() and norm < math.inf)
        self._since_best += 1
        self._noted["lost"] = float(lost)
        if lost:
            self._estimate()
            self._go_back()
            self._change(BACK)
            return
        trained, slope, spread = of_window(losses)
        logs = np.array([[trained[0]], [np.log(max(validation, LOSS_FLOOR))]])
        self._logs = np.concatenate([logs, self._logs[:, :2]], axis=1)
        way, step = (
            torch._foreach_sub([each.detach() for each in weights], old) for old in (self._start, self._before)
        )
        length, last, before = self._norm(way), self._norm(step), self._norm(self._way)
        product = sum(float((one * other).sum()) for one, other in zip(way, self._way, strict=True))
        self._noted |= {
            "slope": float(slope[0]), "spread": float(spread[0]), "step size": last / max(norm, TINY),
            "straightness": length / max(last * losses.shape[1] ** 0.5, TINY),
            "turn": product / max(length * before, TINY),
        }  # fmt: skip
        self._way = list(way)
        if validation < self.best_loss:
            self.best_loss, self._since_best = max(validation, LOSS_FLOOR), 0
            self._best = take(self.optimizer, self._buffers)
        self._estimate()

    def _estimate(self) -> None:
        """Learn from the last steps where the best rate lies."""
        known = np.array([[self._best_rate], [self._precision], [self.rate], [self.decisions]])
        best, precision = update(known[0], known[1], signals_of(self.signals()), known[2], known[3].astype(np.int64))
        self._best_rate, self._precision = float(best[0]), float(precision[0])

    def _end_sweep(self) -> None:
        losses = np.array([[float(each) for each in self._losses]])
        put_back(self._best, self.optimizer, self._buffers)
        self.rate = self._highest = float(found_rate(losses)[0])
        self._best_rate, self._precision = math.log10(self.rate), PRIOR**-2
        self._decide()

    def _go_back(self) -> None:
        put_back(self._best, self.optimizer, self._buffers)
        self._bad, self._since_best = self.rate, 0
        self.backs += 1

    def _change(self, action: int) -> None:
        self.rate = float(changed(np.array([action]), np.array([self.rate]))[0])
        self._highest = max(self._highest, self.rate)
        if action == BACK:
            self._best_rate = min(self._best_rate, math.log10(self.rate))

    def _set(self, rate: float) -> None:
        for group, ratio in zip(self.optimizer.param_groups, self._ratios, strict=True):
            if isinstance(group["lr"], torch.Tensor):
                group["lr"].fill_(rate * ratio)
            else:
                group["lr"] = rate * ratio

    def _validated(self) -> float:
        switched = [getattr(self.optimizer, name, None) for name in ("eval", "train")]
        if switched[0] is not None:
            switched[0]()
        loss = float(self.validation())
        if switched[1] is not None:
            switched[1]()
        return loss

    @staticmethod
    def _norm(tensors: Iterable[torch.Tensor]) -> float:
        return float(nn.utils.get_total_norm([each.detach() for each in tensors]))


def load_policy(policy: Any) -> Any:
    """The policy of a folder; a rule's name, and an object with `predict`, as they are."""
    if hasattr(policy, "predict") or policy in RULES:
        return policy
    from agents import runs
    from agents.ppo import PPO

    folder = Path(policy)
    if not folder.is_dir():
        known = '"default", "rule", the folder of a run, or an object with predict'
        raise ValueError(f"policy={policy!r}: must be {known}")
    return runs.load(folder)[0] if (folder / runs.SETTINGS).exists() else PPO.load(folder)
