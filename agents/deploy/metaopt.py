"""Meta-optimisers for torch: schedule learning rates and weight decays by rules or by a learned policy.

A meta-optimiser is used like a torch learning-rate scheduler: call `update_hparams` after each validation, and save its
`state_dict`. Gate and experts must have separate parameter groups in the optimiser. For any other model, and where no
learning rate is known, there is `AutoRate`.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import nn

from agents.deploy.autorate import AutoRate
from agents.deploy.snapshots import Snapshot, put_back, take
from moe_envs.metaopt.signals import (
    DECAYS,
    DIVERGED,
    GROUPS,
    LOSS_FLOOR,
    RATES,
    RATIO_FLOOR,
    Signals,
    apply,
    distance,
    observe,
)

__all__ = ["AutoRate", "HeuristicMetaOptimizer", "MetaOptimizer", "PolicyMetaOptimizer", "Rules", "gate_metrics"]
Metrics = Mapping[str, Any]
KNOWN = (torch.optim.Adam, torch.optim.AdamW, torch.optim.SGD)  # last update can be computed from their state


class MetaOptimizer:
    """Base class of meta-optimisers. `groups` maps "gate" and "experts" to a module or to parameters.

    Every `every`-th call of `update_hparams` makes a decision. Changed rates are clamped to 1e-5 .. 0.3. With `undo`,
    the weights, module buffers and optimiser state at the last decision are restored if the next validation loss is
    above 20 or not finite, and the learning rates become half of those before that decision. If a part has several
    parameter groups, their rates change by the same factor, and decays equal to that of the first group change with it.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        groups: Mapping[str, nn.Module | Iterable[nn.Parameter]],
        every: int = 1,
        undo: bool = True,
    ) -> None:
        if set(groups) != set(GROUPS) or every < 1:
            raise ValueError(f"groups must be of {' and '.join(GROUPS)}, every >= 1; got {sorted(groups)}, {every}")
        self.optimizer, self.every, self.undo = optimizer, every, undo
        self._places = [_find(optimizer, name, groups[name]) for name in GROUPS]
        self._buffers = [b for part in groups.values() if isinstance(part, nn.Module) for b in part.buffers()]
        self.calls = self.decisions = 0
        self.history: list[dict[str, float]] = []
        self._first_norms, self._undone = self.weight_norms(), False
        self._losses = np.zeros((2, 0))  # log training and validation losses, newest first
        self._kept: Snapshot = {}
        if undo:
            self._kept = take(optimizer, self._buffers)

    def update_hparams(self, metrics: Metrics, step: int) -> dict[str, float]:
        """Make a decision after `step` steps or epochs; returns the new hyperparameters.

        `metrics` must have `validation_loss`, and may have `train_loss` or `train_losses` (of the last optimiser
        steps), `validation_accuracy`, `gate_entropy` (0 to 1) and `load` (inputs per expert); see `gate_metrics`.
        Raises `ValueError` if `validation_loss` is missing.
        """
        if "validation_loss" not in metrics:
            raise ValueError(f"metrics must have validation_loss; there are {', '.join(sorted(metrics))}")
        self.calls += 1
        if self.calls % self.every == 0:
            loss = float(metrics["validation_loss"])
            self._undone = not loss < DIVERGED
            if self._undone:
                self._restore()
                self._set(np.clip(self.rates / 2, *RATES), self.ladder)
            else:
                self._note(metrics, loss)
            if self.undo:
                self._kept = take(self.optimizer, self._buffers)
            if self._losses.size:
                self._set(*self._decide())
            self.decisions += 1
            self.history.append({"step": float(step), "validation_loss": loss, **self.hparams()})
        return self.hparams()

    def _decide(self) -> tuple[np.ndarray, np.ndarray]:
        """New learning rates and weight-decay indices, `[2]` each, from the last metrics."""
        raise NotImplementedError

    @property
    def _groups(self) -> list[list[dict[str, Any]]]:
        return [[self.optimizer.param_groups[place] for place in places] for places in self._places]

    @property
    def rates(self) -> np.ndarray:
        """Learning rates of gate and experts, `[2]`."""
        return np.array([groups[0]["lr"] for groups in self._groups])

    @property
    def ladder(self) -> np.ndarray:
        """Indices of the values in `DECAYS` closest to the weight decays, `[2]`."""
        return np.array([int(np.abs(DECAYS - groups[0]["weight_decay"]).argmin()) for groups in self._groups])

    def hparams(self) -> dict[str, float]:
        """Learning rates, weight decays and betas, if any, by group."""
        found: dict[str, float] = {}
        for name, (group, *_) in zip(GROUPS, self._groups, strict=True):
            found |= {f"{name}/lr": float(group["lr"]), f"{name}/weight_decay": float(group["weight_decay"])}
            found |= {f"{name}/beta{number + 1}": beta for number, beta in enumerate(group.get("betas", ()))}
        return found

    def timeline(self) -> pd.DataFrame:
        """One row per decision: step, validation loss, and `hparams` after it."""
        return pd.DataFrame(self.history)

    def plot(self, path: str | Path) -> None:
        """Draw validation loss, learning rates, weight decays and betas over the steps."""
        from matplotlib.figure import Figure

        frame, figure = self.timeline(), Figure((12, 3.4), layout="constrained")
        for panel, part in zip(
            figure.subplots(1, 4), ("validation_loss", "/lr", "/weight_decay", "/beta"), strict=True
        ):
            for name in frame.columns[[part in column for column in frame.columns]]:
                panel.plot(frame["step"], frame[name], "o-", ms=3, label=name)
            panel.set(xlabel="step", yscale="log" if part == "/lr" else "linear")
            panel.legend()
        figure.savefig(path, dpi=120)

    def state_dict(self) -> dict[str, Any]:
        """State without the optimiser, like that of a scheduler; tensors, numbers and lists only."""
        return {
            "calls": self.calls,
            "decisions": self.decisions,
            "history": [dict(row) for row in self.history],
            "first_norms": self._first_norms.tolist(),
            "losses": self._losses.tolist(),
            "undone": self._undone,
            "kept": copy.deepcopy(self._kept),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore a `state_dict`; load the optimiser state separately, as with a scheduler."""
        self.calls, self.decisions = state["calls"], state["decisions"]
        self.history = [dict(row) for row in state["history"]]
        self._first_norms, self._losses = np.array(state["first_norms"]), np.array(state["losses"]).reshape(2, -1)
        self._undone, self._kept = state["undone"], copy.deepcopy(state["kept"])

    def weight_norms(self) -> np.ndarray:
        """Weight norms of gate and experts, `[2]`."""
        return np.array([_norm(_parameters(groups)) for groups in self._groups])

    def _note(self, metrics: Metrics, loss: float) -> None:
        """Store finite metrics for the next decisions."""
        trained = _train_losses(metrics).mean()
        logs = np.log(np.maximum([[trained], [loss]], LOSS_FLOOR))
        before = self._losses if self._losses.size else np.repeat(logs, 2, axis=1)
        self._losses = np.concatenate([logs, before[:, :2]], axis=1)

    def _set(self, rates: np.ndarray, ladder: np.ndarray) -> None:
        now, before = self.ladder, self.rates
        for place, groups in enumerate(self._groups):
            decay = groups[0]["weight_decay"]
            for group in groups:
                if rates[place] != before[place]:
                    group["lr"] = float(group["lr"] * (rates[place] / before[place]))
                if ladder[place] != now[place] and group["weight_decay"] == decay:
                    group["weight_decay"] = float(DECAYS[ladder[place]])

    def _restore(self) -> None:
        """Go back to the last decision; weight decays stay as they are."""
        if not self._kept:
            return
        decays = [group["weight_decay"] for group in self.optimizer.param_groups]
        put_back(self._kept, self.optimizer, self._buffers)
        for group, decay in zip(self.optimizer.param_groups, decays, strict=True):
            group["weight_decay"] = decay


class Rules:
    """Rules for rates and decays.

    Halve all rates after `patience` validations without a lower loss. Raise a weight decay one step when the weight
    norm has grown by `norm_rise` since the last raise. Limit the gate rate to `gate_share` of the experts' rate, and
    halve it when the gate entropy was below `low_entropy` for `patience` validations.
    """

    def __init__(
        self, patience: int = 3, norm_rise: float = 0.25, gate_share: float = 0.5, low_entropy: float = 0.2
    ) -> None:
        self.patience, self.norm_rise, self.gate_share, self.low_entropy = patience, norm_rise, gate_share, low_entropy
        self.best, self.waited, self.low, self.norms = float("inf"), 0, 0, [float("inf")] * 2

    def __call__(
        self, metrics: Metrics, rates: np.ndarray, ladder: np.ndarray, norms: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """New learning rates and weight-decay indices, `[2]` each."""
        loss, before, rates, ladder = float(metrics["validation_loss"]), rates, rates.copy(), ladder.copy()
        self.waited = 0 if loss < self.best else self.waited + 1
        self.best = min(self.best, loss)
        if self.waited >= self.patience:
            rates, self.waited = rates / 2, 0
        self.low = self.low + 1 if metrics.get("gate_entropy", 1.0) < self.low_entropy else 0
        if self.low >= self.patience:
            rates[0], self.low = rates[0] / 2, 0
        rates[0] = min(rates[0], self.gate_share * rates[1])
        for place, norm in enumerate(norms.tolist()):
            if norm > (1 + self.norm_rise) * self.norms[place]:
                ladder[place] = min(ladder[place] + 1, len(DECAYS) - 1)
                self.norms[place] = norm
            self.norms[place] = min(self.norms[place], norm)
        return np.where(rates == before, rates, np.clip(rates, *RATES)), ladder


class HeuristicMetaOptimizer(MetaOptimizer):
    """`MetaOptimizer` that follows `Rules`; further arguments are the thresholds of the rules."""

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        groups: Mapping[str, nn.Module | Iterable[nn.Parameter]],
        every: int = 1,
        undo: bool = True,
        **thresholds: float,
    ) -> None:
        super().__init__(optimizer, groups, every, undo)
        self.rules = Rules(**thresholds)  # type: ignore[arg-type]
        self._noted: dict[str, float] = {}  # validation loss and gate entropy

    def _note(self, metrics: Metrics, loss: float) -> None:
        super()._note(metrics, loss)
        self._noted = {"validation_loss": loss, "gate_entropy": float(metrics.get("gate_entropy", 1.0))}

    def _decide(self) -> tuple[np.ndarray, np.ndarray]:
        return self.rules(self._noted, self.rates, self.ladder, self.weight_norms())

    def state_dict(self) -> dict[str, Any]:
        """All but the optimiser, as a scheduler's."""
        return super().state_dict() | {"rules": copy.deepcopy(vars(self.rules)), "noted": dict(self._noted)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a `state_dict`."""
        super().load_state_dict(state)
        vars(self.rules).update(copy.deepcopy(state["rules"]))
        self._noted = dict(state["noted"])


class PolicyMetaOptimizer(HeuristicMetaOptimizer):
    """`MetaOptimizer` that follows a policy trained in MoEMetaOpt-v0, ours or SB3's, after `warm_up` decisions by
    rules.

     `target` is the validation accuracy to reach, `max_actions` the planned number of decisions. The observed update
    norm is exact for torch's Adam, AdamW and SGD; for other optimisers, the first step after each decision is measured.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        policy: Any,
        groups: Mapping[str, nn.Module | Iterable[nn.Parameter]],
        every: int = 1,
        undo: bool = True,
        *,
        target: float,
        max_actions: int = 30,
        warm_up: int = 0,
        **thresholds: float,
    ) -> None:
        super().__init__(optimizer, groups, every, undo, **thresholds)
        self.policy, self.target, self.max_actions, self.warm_up = policy, target, max_actions, warm_up
        self._before: list[list[torch.Tensor]] = []  # weights before a measured step
        self._updates, self._watching = [0.0, 0.0], not isinstance(optimizer, KNOWN)
        if self._watching:
            optimizer.register_step_pre_hook(self._before_step)
            optimizer.register_step_post_hook(self._after_step)

    def update_hparams(self, metrics: Metrics, step: int) -> dict[str, float]:
        """Like `MetaOptimizer.update_hparams`; `metrics` must also have `validation_accuracy`."""
        if "validation_accuracy" not in metrics:
            raise ValueError("metrics must have validation_accuracy: a policy goes by its distance to the target")
        decisions, found = self.decisions, super().update_hparams(metrics, step)
        self._watching = self._watching or (self.decisions > decisions and not isinstance(self.optimizer, KNOWN))
        return found

    def state_dict(self) -> dict[str, Any]:
        """All but the optimiser, as a scheduler's."""
        return super().state_dict() | {"updates": list(self._updates), "watching": self._watching}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a `state_dict`."""
        super().load_state_dict(state)
        self._updates, self._watching = list(state["updates"]), state["watching"]

    def _before_step(self, *_: Any) -> None:
        if self._watching:
            self._before = [[p.detach().clone() for p in _parameters(groups)] for groups in self._groups]

    def _after_step(self, *_: Any) -> None:
        if self._watching:
            for place, (groups, before) in enumerate(zip(self._groups, self._before, strict=True)):
                moved = [p.detach() - old for p, old in zip(_parameters(groups), before, strict=True)]
                self._updates[place] = _norm(moved)
            self._before, self._watching = [], False

    def _note(self, metrics: Metrics, loss: float) -> None:
        super()._note(metrics, loss)
        losses, load = _train_losses(metrics), np.asarray(metrics.get("load", (1.0,)), dtype=np.float64)
        self._noted |= {
            "distance": float(distance(np.array(metrics["validation_accuracy"], dtype=np.float64), self.target)),
            "imbalance": float(load.std() / max(load.mean(), RATIO_FLOOR)),
            "spread": float(losses.std() / max(losses.mean(), RATIO_FLOOR)),
        }
        for place, (name, groups, norm) in enumerate(zip(GROUPS, self._groups, self.weight_norms(), strict=True)):
            gradients = [p.grad for p in _parameters(groups) if p.grad is not None]
            self._noted[f"{name} gradient"] = _norm(gradients)
            moved = self._update_norm(groups) if isinstance(self.optimizer, KNOWN) else self._updates[place]
            self._noted[f"{name} ratio"] = moved / max(float(norm), RATIO_FLOOR)

    def _decide(self) -> tuple[np.ndarray, np.ndarray]:
        if self.decisions < self.warm_up:
            return super()._decide()
        actions, _ = self.policy.predict(observe(self.signals()), deterministic=True)
        rates, ladder = apply(np.asarray(actions), self.rates[None], self.ladder[None])
        return rates[0], ladder[0]

    def signals(self) -> Signals:
        """Signals for the policy: last finite metrics, and current rates and decays."""
        noted, progress = self._noted, min(1.0, (self.decisions + 1) / self.max_actions)
        pairs = (np.array([[noted[f"{name} {what}"] for name in GROUPS]]) for what in ("gradient", "ratio"))
        gradients, ratio = pairs
        growth = self.weight_norms() / np.maximum(self._first_norms, RATIO_FLOOR)
        singles = noted["gate_entropy"], noted["imbalance"], noted["spread"], progress, progress, float(self._undone)
        return Signals(
            self.rates[None], self.ladder[None], self._losses[None], np.array([noted["distance"]]), gradients,
            growth[None], ratio, *(np.array([value]) for value in singles),
        )  # fmt: skip

    def _update_norm(self, groups: list[dict[str, Any]]) -> float:
        """The norm of the last update of Adam, AdamW or SGD, without weight decay."""
        total = 0.0
        for group in groups:
            for parameter in group["params"]:
                state = self.optimizer.state.get(parameter, {})
                if "exp_avg_sq" in state:
                    first, second = (1 - beta ** float(state["step"]) for beta in group["betas"])
                    root = (state["exp_avg_sq"] / second).sqrt_().add_(group["eps"])
                    total += float((state["exp_avg"] / root / first).square().sum()) * group["lr"] ** 2
                else:
                    moved = state.get("momentum_buffer", parameter.grad)
                    total += 0.0 if moved is None else float(moved.square().sum()) * group["lr"] ** 2
        return float(total**0.5)


def gate_metrics(gate_logits: torch.Tensor, top_k: int = 2) -> dict[str, Any]:
    """Compute `gate_entropy` and `load` from gate logits `[n, E]` for `update_hparams`."""
    with torch.no_grad():
        log_probabilities = gate_logits.log_softmax(1)
        entropy = -(log_probabilities.exp() * log_probabilities).sum(1).mean() / np.log(gate_logits.shape[1])
        load = torch.zeros_like(gate_logits).scatter_(1, gate_logits.topk(top_k).indices, 1.0).sum(0)
    return {"gate_entropy": float(entropy), "load": load.numpy(force=True)}


def _find(optimizer: torch.optim.Optimizer, name: str, part: nn.Module | Iterable[nn.Parameter]) -> list[int]:
    """Indices of the parameter groups that belong to one part of the model only."""
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    parameters = list(part.parameters() if isinstance(part, nn.Module) else part)
    wanted = {id(p) for p in parameters if p.requires_grad or id(p) in held}
    found = [i for i, group in enumerate(optimizer.param_groups) if {id(p) for p in group["params"]} <= wanted]
    covered = {id(p) for i in found for p in optimizer.param_groups[i]["params"]}
    if not wanted or covered != wanted:
        raise ValueError(
            f"the optimizer must have parameter groups of just the {name}: torch.optim.AdamW([{{'params': "
            "model.gate.parameters()}, {'params': model.experts.parameters()}])"
        )
    if any("weight_decay" not in optimizer.param_groups[place] for place in found):
        raise ValueError(f"{type(optimizer).__name__} has no weight decay to decide; take AdamW, Adam or SGD")
    return found


def _train_losses(metrics: Metrics) -> np.ndarray:
    """Finite training losses, or the validation loss if there are none."""
    given = np.atleast_1d(metrics.get("train_losses", metrics.get("train_loss", ())))
    losses = given[np.isfinite(given)].astype(np.float64)
    return losses if len(losses) else np.array([float(metrics["validation_loss"])])


def _parameters(groups: list[dict[str, Any]]) -> list[torch.Tensor]:
    return [parameter for group in groups for parameter in group["params"]]


def _norm(tensors: list[torch.Tensor]) -> float:
    return float(torch.nn.utils.get_total_norm([each.detach() for each in tensors])) if tensors else 1.0
