"""Calibrated estimates of whether each expert classifies an input correctly, from what is seen before any is run.

Two estimators are fitted on `rl_train`: the mean outcome of the nearest neighbours, and a perceptron. No estimate of
these inputs uses the input's own outcome: its neighbours exclude it, and 4 perceptrons are cross-fitted, each on three
quarters of the inputs. For other inputs, the logits of the 4 perceptrons are averaged. A logistic regression for each
expert combines both estimates (stacking, Wolpert 1992).

Shape legend: B inputs, F features, E experts, I = F + E, N inputs of `rl_train`, K folds, H hidden units.
"""

from __future__ import annotations

from typing import Self

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from experts.threads import reproducible

FOLDS, WIDTH = 4, 128
COUNTS = (5, 10, 20, 50, 100)  # of neighbours, chosen by the loss on rl_train
PRIOR = 2.0  # outcomes at the expert's mean, added to the neighbours'
GATE_BOUND = 10.0
LIMIT = 1e-3  # estimates are within LIMIT..1 - LIMIT
LOOKS, PATIENCE, HELD_OUT = 200, 8, 8  # of the training of the perceptrons: at most, without gain, 1 in 8 inputs


def centred(gate_BE: torch.Tensor) -> torch.Tensor:
    """Gate logits minus their mean, clipped at +-`GATE_BOUND`."""
    return (gate_BE - gate_BE.mean(1, keepdim=True)).clip(-GATE_BOUND, GATE_BOUND)


class Estimator(nn.Module):
    """P(correct) `[B, E]` of each expert from features `[B, F]` and centred gate logits `[B, E]`.

    `points [N, F]` and `outcomes [N, E]` of 0 and 1 are those of `rl_train`; they are not part of the state dict.
    """

    points_NF: torch.Tensor
    squares_N: torch.Tensor
    outcomes_NE: torch.Tensor
    count: torch.Tensor

    def __init__(self, points: np.ndarray, outcomes: np.ndarray) -> None:
        super().__init__()
        points_NF, outcomes_NE = (torch.from_numpy(each.astype(np.float32)) for each in (points, outcomes))
        inputs, experts = points.shape[1] + outcomes.shape[1], outcomes.shape[1]
        for name, value in {"points_NF": points_NF, "squares_N": points_NF.square().sum(1)}.items():
            self.register_buffer(name, value, persistent=False)
        self.register_buffer("outcomes_NE", outcomes_NE, persistent=False)
        self.register_buffer("count", torch.tensor(COUNTS[0]))
        shapes = (inputs, WIDTH), (WIDTH, WIDTH), (WIDTH, experts)
        self.weights = nn.ParameterList(nn.Parameter(torch.zeros(FOLDS, *shape)) for shape in shapes)
        self.biases = nn.ParameterList(nn.Parameter(torch.zeros(FOLDS, 1, shape[1])) for shape in shapes)
        self.stack_3E = nn.Parameter(torch.tensor([[0.5], [0.5], [0.0]]).repeat(1, experts))

    @classmethod
    def fit(cls, points: np.ndarray, gate: np.ndarray, outcomes: np.ndarray, seed: int = 0) -> tuple[Self, np.ndarray]:
        """Fit an estimator on features `[N, F]`, gate logits `[N, E]` and outcomes `[N, E]` of `rl_train`.

        Returns it and its estimates `[N, E]` of these inputs, each without the outcomes of the input itself.
        """
        found = cls(points, outcomes)
        with reproducible(seed):
            gate_NE = centred(torch.from_numpy(gate.astype(np.float32)))
            inputs_NI = torch.cat([found.points_NF, gate_NE], dim=1)
            fold_N = torch.randperm(len(inputs_NI)) % FOLDS
            of_others_NE = found._fit_perceptrons(inputs_NI, fold_N)
            near_CNE = found._near(found.points_NF, list(COUNTS), leave_one_out=True)
            losses = [F.binary_cross_entropy(near_NE, found.outcomes_NE) for near_NE in near_CNE]
            best = int(torch.stack(losses).argmin())
            found.get_buffer("count").fill_(COUNTS[best])
            found._fit_stack(near_CNE[best], of_others_NE)
            estimates = found._combined(near_CNE[best], of_others_NE)
        return found.requires_grad_(False).eval(), estimates.detach().numpy()

    def forward(self, features_BF: torch.Tensor, gate_BE: torch.Tensor) -> torch.Tensor:
        """P(correct) of each expert, `[B, E]`."""
        near_BE = self._near(features_BF, [int(self.count)])[0]
        return self._combined(near_BE, self._perceptrons(torch.cat([features_BF, gate_BE], dim=1)).mean(0))

    def estimates(self, features: np.ndarray, gate: np.ndarray) -> np.ndarray:
        """`forward` in numpy, for features `[n, F]` and gate logits `[n, E]` of any number of inputs."""
        with reproducible(0), torch.inference_mode():
            parts = (torch.from_numpy(each.astype(np.float32)).split(1024) for each in (features, gate))
            return torch.cat([self(part, centred(logits)) for part, logits in zip(*parts, strict=True)]).numpy()

    def _near(self, features_BF: torch.Tensor, counts: list[int], leave_one_out: bool = False) -> torch.Tensor:
        """Mean outcomes of the nearest inputs for each count, `[counts, B, E]`."""
        limit = len(self.points_NF) - leave_one_out
        counts = [min(count, limit) for count in counts]
        prior_E, found = PRIOR * self.outcomes_NE.mean(0), []
        for start in range(0, len(features_BF), 512):
            part = features_BF[start : start + 512]
            distance = torch.addmm(self.squares_N, part, self.points_NF.T, alpha=-2)
            if leave_one_out:
                rows = torch.arange(len(part))
                distance[rows, rows + start] = torch.inf
            nearest = distance.topk(max(counts), dim=1, largest=False).indices
            sums = self.outcomes_NE[nearest].cumsum(1)
            found.append(torch.stack([(sums[:, count - 1] + prior_E) / (count + PRIOR) for count in counts]))
        return torch.cat(found, dim=1)

    def _perceptrons(self, inputs: torch.Tensor) -> torch.Tensor:
        """Logits of the perceptron of each fold, `[K, B, E]`, for inputs `[B, I]` or `[K, B, I]`."""
        for place, (weight, bias) in enumerate(zip(self.weights, self.biases, strict=True)):
            inputs = (inputs if place == 0 else inputs.relu()) @ weight + bias
        return inputs

    def _combined(self, near_BE: torch.Tensor, logits_BE: torch.Tensor) -> torch.Tensor:
        first_E, second_E, constant_E = self.stack_3E
        found_BE = first_E * near_BE.clamp(LIMIT, 1 - LIMIT).logit() + second_E * logits_BE + constant_E
        return found_BE.sigmoid().clamp(LIMIT, 1 - LIMIT)

    def _fit_perceptrons(self, inputs_NI: torch.Tensor, fold_N: torch.Tensor) -> torch.Tensor:
        """Train all perceptrons at once by AdamW with early stopping; returns for each input the logits `[N, E]` of
        that which was not trained on its fold."""
        of_training, held_out = [], []
        for fold in range(FOLDS):
            rows = (fold_N != fold).nonzero()[:, 0]
            rows = rows[torch.randperm(len(rows))]
            cut = max(1, len(rows) // HELD_OUT)
            held_out.append(rows[:cut])
            of_training.append(rows[cut:] if cut < len(rows) else rows)
        fewest, judged = min(map(len, of_training)), min(map(len, held_out))
        train_KT, held_KT = torch.stack([r[:fewest] for r in of_training]), torch.stack([r[:judged] for r in held_out])
        batch = min(256, max(16, fewest // 16))
        for weight in self.weights:
            nn.init.normal_(weight, std=(2 / weight.shape[1]) ** 0.5)
        optimizer = torch.optim.AdamW([*self.weights, *self.biases], lr=1e-3, weight_decay=1e-2, fused=True)
        best_K, kept, looks = torch.full((FOLDS,), torch.inf), [p.detach().clone() for p in self._trained()], 0
        for _ in range(LOOKS):
            order_KT = torch.stack([row[torch.randperm(fewest)] for row in train_KT])
            for rows_KB in order_KT.split(batch, dim=1):
                logits_KBE = self._perceptrons(inputs_NI[rows_KB])
                loss = F.binary_cross_entropy_with_logits(logits_KBE, self.outcomes_NE[rows_KB]) * FOLDS
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
            with torch.no_grad():
                logits_KTE = self._perceptrons(inputs_NI[held_KT])
                wanted_KTE = self.outcomes_NE[held_KT]
                loss_K = F.binary_cross_entropy_with_logits(logits_KTE, wanted_KTE, reduction="none").mean((1, 2))
                better_K = loss_K < best_K - 1e-5
                best_K = torch.where(better_K, loss_K, best_K)
                for mine, now in zip(kept, self._trained(), strict=True):
                    mine[better_K] = now[better_K]
            looks = 0 if better_K.any() else looks + 1
            if looks == PATIENCE:
                break
        with torch.no_grad():
            for mine, now in zip(kept, self._trained(), strict=True):
                now.copy_(mine)
            every_KNE = torch.cat([self._perceptrons(part) for part in inputs_NI.split(4096)], dim=1)
        return every_KNE[fold_N, torch.arange(len(fold_N))]

    def _trained(self) -> list[nn.Parameter]:
        return [*self.weights, *self.biases]

    def _fit_stack(self, near_NE: torch.Tensor, logits_NE: torch.Tensor) -> None:
        """Fit the logistic regressions, drawn to equal weights of both."""
        begin = self.stack_3E.detach().clone()
        optimizer = torch.optim.LBFGS([self.stack_3E], max_iter=100, line_search_fn="strong_wolfe")

        def closure() -> torch.Tensor:
            optimizer.zero_grad()
            loss = F.binary_cross_entropy(self._combined(near_NE, logits_NE), self.outcomes_NE)
            loss = loss + (self.stack_3E - begin).square().sum() / (len(near_NE) * len(begin.T))
            loss.backward()
            return loss

        optimizer.step(closure)
