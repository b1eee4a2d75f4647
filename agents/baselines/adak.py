"""Ada-K: a linear allocator in each layer decides how many experts a token gets (Yue et al. 2024, arXiv 2410.10456).

As in the paper: the reward of a token is its log-likelihood after the last layer, the advantage is taken against the
default number of experts and discounted from the last layer down, PPO makes two epochs a batch, and the allocators
start from the counts of a top-p rule. Instead of a weight on the expected number of experts, their price is charged.
Budgets, and that the best weights on validation are kept, are ours.

Shape legend: N tokens, D width, K the most experts of a token, L layers, B passages, T tokens of a passage.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from agents.baselines.layertopk import OF_RULES, Judge, Watching
from agents.evaluate import make_rows
from cost.timing import torch_threads
from experts.language import LanguageModel


@dataclass(frozen=True, kw_only=True)
class AdaKSettings:
    """`gamma` discounts the advantage by layers from the last one; `start_p` is the sum of probabilities at which the
    top-p rule of the start stops; weights are judged `looks` times after the start."""

    steps: int = 300
    looks: int = 5
    batch_size: int = 16
    epochs: int = 2
    start_steps: int = 50
    start_p: float = 0.6
    learning_rate: float = 1e-3
    clip_range: float = 0.2
    gamma: float = 0.99
    dual_rate: float = 1e-3
    seed: int = 0


class AdaK(Watching):
    """Allocators of a model, to be given to it as `k`: `model.generate(text, k=allocators)`.

    In MoELayerTopK-v0 it decides by the layer's inputs in the watched environment.
    """

    kind = "learner"

    def __init__(self, model: LanguageModel, seed: int = 0) -> None:
        settings = model.settings
        self.model, self.k = model, settings.k
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.allocators = nn.ModuleList(nn.Linear(settings.d_model, settings.k + 1) for _ in range(settings.layers))

    def __call__(self, layer: int, inputs_ND: torch.Tensor, logits_NE: torch.Tensor) -> torch.Tensor:
        """The most likely numbers of experts `[N]`."""
        with torch.no_grad():
            found: torch.Tensor = self.allocators[layer](inputs_ND).argmax(-1)
        return found

    def numbers(self, observation: np.ndarray) -> np.ndarray:
        """Numbers of experts `[n]`, before the budget."""
        layer, inputs = self.env.places()[1], torch.from_numpy(self.env.inputs())
        with torch.no_grad():
            each = torch.stack([allocator(inputs).argmax(-1) for allocator in self.allocators], 1)
        return np.asarray(each.numpy()[np.arange(len(layer)), layer])

    def learn(
        self, ids: np.ndarray, prices: np.ndarray, settings: AdaKSettings | None = None, budget: float | None = None,
        report: Callable[[float], object] = lambda share: None, *, by_divergence: bool = False,
        judge: Callable[[], float] | None = None,
    ) -> AdaK:  # fmt: skip
        """Train on passages `[B, T + 1]`; `prices [L, K + 1]` are what numbers of experts cost a token, in nats.

        Under a `budget` an expert costs more and more while too many run in the mean (dual ascent). With
        `by_divergence` a token's reward is minus the divergence from what the default number predicts. The weights with
        the best score by `judge` are kept, or those after the last step.
        """
        own = settings or AdaKSettings()
        random, draw = np.random.default_rng(own.seed), torch.Generator().manual_seed(own.seed)
        optimizer = torch.optim.Adam(self.allocators.parameters(), lr=own.learning_rate)
        charged, price = torch.from_numpy(prices).float(), 0.0
        each, best = torch.arange(self.k + 1), -np.inf
        kept: tuple[dict[str, torch.Tensor], float] | None = None
        looks = {own.start_steps + own.steps * look // own.looks for look in range(own.looks + 1)}
        with torch_threads(1):
            for step in range(own.start_steps + own.steps):
                batch = ids[random.integers(len(ids), size=own.batch_size)]
                if step < own.start_steps:
                    self._imitate(batch, own, optimizer)
                else:
                    experts = self._improve(batch, own, optimizer, charged + price * each, draw, by_divergence)
                    if budget is not None:
                        price = max(0.0, price + own.dual_rate * (experts - budget))
                if judge is not None and step + 1 in looks and (score := judge()) > best:
                    best, kept = score, (copy.deepcopy(self.allocators.state_dict()), self.reserve)
                report((step + 1) / (own.start_steps + own.steps))
        if kept is not None:
            self.allocators.load_state_dict(kept[0])
            self.reserve = kept[1]
        return self

    def _imitate(self, ids: np.ndarray, own: AdaKSettings, optimizer: torch.optim.Optimizer) -> None:
        """A step towards the numbers of the top-p rule."""
        losses = []

        def watched(layer: int, inputs_ND: torch.Tensor, logits_NE: torch.Tensor) -> torch.Tensor:
            odds = logits_NE.softmax(-1).sort(-1, descending=True).values[:, : self.k]
            wanted = (odds.cumsum(-1) - odds < own.start_p).sum(-1)
            with torch.enable_grad():
                losses.append(F.cross_entropy(self.allocators[layer](inputs_ND.clone()), wanted.clone()))
            return torch.full((len(logits_NE),), self.k)

        with torch.no_grad():
            self.model.network(torch.from_numpy(ids[:, :-1]), watched)
        _descend(torch.stack(losses).mean(), optimizer)

    def _improve(
        self, ids: np.ndarray, own: AdaKSettings, optimizer: torch.optim.Optimizer, prices: torch.Tensor,
        draw: torch.Generator, by_divergence: bool,
    ) -> float:  # fmt: skip
        """PPO on numbers drawn for each token and layer of the passages; returns their mean."""
        inputs, taken, before = [], [], []

        def drawn(layer: int, inputs_ND: torch.Tensor, logits_NE: torch.Tensor) -> torch.Tensor:
            logs = self.allocators[layer](inputs_ND).log_softmax(-1)
            k = torch.multinomial(logs.exp(), 1, generator=draw)
            inputs.append(inputs_ND)
            taken.append(k)
            before.append(logs.gather(-1, k)[:, 0])
            return k[:, 0]

        with torch.no_grad():
            gained_N = self._gained(torch.from_numpy(ids), drawn, by_divergence)
        for _ in range(own.epochs):
            loss = torch.zeros(())
            for layer, allocator in enumerate(self.allocators):
                logs = allocator(inputs[layer]).log_softmax(-1)
                ratio = (logs.gather(-1, taken[layer])[:, 0] - before[layer]).exp()
                advantage = gained_N * own.gamma ** (len(inputs) - 1 - layer)
                clipped = ratio.clip(1 - own.clip_range, 1 + own.clip_range)
                loss = loss - torch.minimum(ratio * advantage, clipped * advantage).mean()
                loss = loss + (logs.exp() * prices[layer]).sum(-1).mean()
            _descend(loss, optimizer)
        return float(torch.cat(taken).float().mean())

    def _gained(self, ids_BT: torch.Tensor, k: Any, by_divergence: bool) -> torch.Tensor:
        """What tokens gain by k instead of the default number, `[N]` in nats."""
        full_NV, few_NV = (
            self.model.network(ids_BT[:, :-1], each).logits.flatten(0, 1).log_softmax(-1) for each in (None, k)
        )
        if by_divergence:
            return -F.kl_div(few_NV, full_NV, reduction="none", log_target=True).sum(-1)
        return (few_NV - full_NV).gather(-1, ids_BT[:, 1:].reshape(-1, 1))[:, 0]


def trained(env_id: str, seed: int, steps: int = AdaKSettings.steps, **env_kwargs: Any) -> AdaK:
    """Ada-K for MoELayerTopK-v0 with these arguments, trained on `rl_train`; the weights, and under a budget the
    `reserve`, are those that are best on validation."""
    own = {key: value for key, value in env_kwargs.items() if key not in OF_RULES}
    env: Any = make_rows(env_id, 1, **{**own, "split": "rl_train", "granularity": "layer"}).unwrapped
    ids = env.stepped.passages.ids
    prices = env.prices() - env.scarcity() * np.arange(env.k + 1)  # learned instead
    agent, judge = AdaK(env.stepped.model, seed), Judge(own)
    return agent.learn(
        ids, prices, AdaKSettings(seed=seed, steps=steps), env_kwargs.get("budget"), by_divergence=env.by_divergence,
        judge=lambda: judge.reserved(agent),
    )  # fmt: skip


def _descend(loss: torch.Tensor, optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
