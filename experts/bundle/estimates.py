"""Calibrated estimates of whether each expert classifies an input correctly, from what is seen before any is run.

Two estimators are fitted on `rl_train`: the mean outcome of the nearest neighbours, and a perceptron. No estimate of
these inputs uses the input's own outcome: its neighbours exclude it, and 4 perceptrons are cross-fitted, each on three
quarters of the inputs. For other inputs, the logits of the 4 perceptrons are averaged. A logistic regression for each
expert combines both estimates (stacking, Wolpert 1992). `context` then corrects them by the batch that an input is in.

Shape legend: B inputs, F features, E experts, I = F + E, N inputs of `rl_train`, K folds, G batches of T inputs.
"""

from __future__ import annotations

from typing import Self

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from experts.bundle import context
from experts.bundle.context import FOLDS, GATE_BOUND, LIMIT, change
from experts.bundle.streams import STREAMS, deal
from experts.threads import reproducible

WIDTH = 128
COUNTS = (5, 10, 20, 50, 100)  # of neighbours, chosen by the loss on rl_train
PRIOR = 2.0  # outcomes at the expert's mean, added to the neighbours'
POINTS = 16_384  # searched for neighbours at most
SAMPLES = 512  # of inputs in a step of the context's training
LOOKS, PATIENCE, HELD_OUT = 200, 6, 8  # of trainings: looks at most, looks without gain, held out 1 in 8 inputs


def centred(gate_BE: torch.Tensor) -> torch.Tensor:
    """The first of `experts.bundle.context.gate_parts`, in torch."""
    return (gate_BE - gate_BE.mean(1, keepdim=True)).clip(-GATE_BOUND, GATE_BOUND)


class Estimator(nn.Module):
    """P(correct) `[B, E]` of each expert from features `[B, F]` and centred gate logits `[B, E]`.

    `points [N, F]` and `outcomes [N, E]` of 0 and 1 are those of `rl_train`; they are not part of the state dict. At
    most `POINTS` of them, evenly spaced, are searched for neighbours.
    """

    points_NF: torch.Tensor
    squares_N: torch.Tensor
    outcomes_NE: torch.Tensor
    count: torch.Tensor
    fold_N: torch.Tensor

    def __init__(self, points: np.ndarray, outcomes: np.ndarray) -> None:
        super().__init__()
        points_NF, outcomes_NE = (torch.from_numpy(each.astype(np.float32)) for each in (points, outcomes))
        inputs, experts = points.shape[1] + outcomes.shape[1], outcomes.shape[1]
        self.rows = np.unique(np.linspace(0, len(points) - 1, min(len(points), POINTS)).astype(np.int64))
        near_NF, near_NE = points_NF[self.rows], outcomes_NE[self.rows]
        parts = {"points_NF": near_NF, "squares_N": near_NF.square().sum(1), "outcomes_NE": near_NE}
        for name, value in parts.items():
            self.register_buffer(name, value, persistent=False)
        self.neighbours = COUNTS[0]
        self.register_buffer("count", torch.tensor(self.neighbours))
        shapes = (inputs, WIDTH), (WIDTH, WIDTH), (WIDTH, experts)
        self.weights = nn.ParameterList(nn.Parameter(torch.zeros(FOLDS, *shape)) for shape in shapes)
        self.biases = nn.ParameterList(nn.Parameter(torch.zeros(FOLDS, 1, shape[1])) for shape in shapes)
        self.stack_3E = nn.Parameter(torch.tensor([[0.5], [0.5], [0.0]]).repeat(1, experts))
        self.register_buffer("fold_N", torch.zeros(len(points), dtype=torch.uint8))
        shapes_of_context = context.shapes(experts, points.shape[1])
        self.context = nn.ParameterDict({key[8:]: torch.zeros(shape) for key, shape in shapes_of_context.items()})

    @classmethod
    def fit(
        cls, points: np.ndarray, gate: np.ndarray, outcomes: np.ndarray, labels: np.ndarray, seed: int = 0
    ) -> tuple[Self, np.ndarray]:
        """Fit an estimator on features `[N, F]`, gate logits `[N, E]`, outcomes `[N, E]` and labels of `rl_train`.

        Returns it and its estimates `[N, E]` of these inputs, each without the outcomes of the input itself.
        """
        found = cls(points, outcomes)
        with reproducible(seed):
            gate_NE = centred(torch.from_numpy(gate.astype(np.float32)))
            features_NF, wanted_NE = (torch.from_numpy(each.astype(np.float32)) for each in (points, outcomes))
            inputs_NI = torch.cat([features_NF, gate_NE], dim=1)
            fold_N = torch.randperm(len(inputs_NI)) % FOLDS
            of_others_NE = found._fit_perceptrons(inputs_NI, wanted_NE, fold_N)
            itself_N = torch.full((len(points),), -1)
            itself_N[found.rows] = torch.arange(len(found.rows))
            near_CNE = found._near(features_NF, list(COUNTS), itself_N)
            losses = [F.binary_cross_entropy(near_NE, wanted_NE) for near_NE in near_CNE]
            best = int(torch.stack(losses).argmin())
            found.count.fill_(COUNTS[best])
            found.neighbours = COUNTS[best]
            found._fit_stack(near_CNE[best], of_others_NE, wanted_NE)
            estimates = found._combined(near_CNE[best], of_others_NE).detach()
            found.fold_N.copy_(fold_N)
            seen = _seen(estimates, gate_NE.softmax(1), features_NF)
            found._fit_context(*seen, wanted_NE, labels, seed)
        return found.requires_grad_(False).eval(), estimates.numpy()

    @classmethod
    def load(cls, points: np.ndarray, outcomes: np.ndarray, weights: dict[str, torch.Tensor]) -> Self:
        """An estimator of saved `weights`; raises `RuntimeError` if they are those of another one."""
        found = cls(points, outcomes)
        found.load_state_dict(weights)
        found.neighbours = int(found.count)  # a number, as exports to ONNX need it
        return found.requires_grad_(False).eval()

    def thin(self, points: int) -> None:
        """Search `points` inputs, evenly spaced, for neighbours from now on, and fewer neighbours by the square root of
        their share: faster, with a little less to learn from."""
        if points < 1:
            raise ValueError(f"points={points}: must be at least 1")
        every = len(self.points_NF)
        rows = np.unique(np.linspace(0, every - 1, min(points, every)).astype(np.int64))
        self.points_NF, self.squares_N = self.points_NF[rows], self.squares_N[rows]
        self.outcomes_NE, self.rows = self.outcomes_NE[rows], self.rows[rows]
        self.neighbours = max(1, round(self.neighbours * (len(rows) / every) ** 0.5))

    def forward(self, features_BF: torch.Tensor, gate_BE: torch.Tensor) -> torch.Tensor:
        """P(correct) of each expert, `[B, E]`."""
        near_BE = self._near(features_BF, [self.neighbours])[0]
        return self._combined(near_BE, self._perceptrons(torch.cat([features_BF, gate_BE], dim=1)).mean(0))

    def in_batches(
        self, estimates_GTE: torch.Tensor, gate_GTE: torch.Tensor, features_GTF: torch.Tensor
    ) -> torch.Tensor:
        """P(correct) `[G, T, E]` of inputs in the context of their batches; `gate` are centred logits."""
        local_GTL, averaged_GTC = _seen(estimates_GTE, gate_GTE.softmax(-1), features_GTF)
        changes_KGTE = change(dict(self.context), local_GTL[None], averaged_GTC.mean(1)[None])
        odds_GTE = local_GTL[..., : estimates_GTE.shape[-1]] + changes_KGTE.mean(0)
        return odds_GTE.sigmoid().clamp(LIMIT, 1 - LIMIT)

    def estimates(self, features: np.ndarray, gate: np.ndarray) -> np.ndarray:
        """`forward` in numpy, for features `[n, F]` and gate logits `[n, E]` of any number of inputs."""
        with reproducible(0), torch.inference_mode():
            parts = (torch.from_numpy(each.astype(np.float32)).split(1024) for each in (features, gate))
            return torch.cat([self(part, centred(logits)) for part, logits in zip(*parts, strict=True)]).numpy()

    def _near(self, features_BF: torch.Tensor, counts: list[int], itself_B: torch.Tensor | None = None) -> torch.Tensor:
        """Mean outcomes of the nearest points for each count, `[counts, B, E]`; `itself` is the place of an input among
        the points, which is left out, or -1."""
        limit = max(1, len(self.points_NF) - (itself_B is not None))
        counts = [min(count, limit) for count in counts]
        prior_E, found = PRIOR * self.outcomes_NE.mean(0), []
        for start in range(0, len(features_BF), 512):
            part = features_BF[start : start + 512]
            distance = torch.addmm(self.squares_N, part, self.points_NF.T, alpha=-2)
            if itself_B is not None:
                places = itself_B[start : start + 512]
                rows = (places >= 0).nonzero()[:, 0]
                distance[rows, places[rows]] = torch.inf
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

    def _fit_perceptrons(self, inputs_NI: torch.Tensor, wanted_NE: torch.Tensor, fold_N: torch.Tensor) -> torch.Tensor:
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
                loss = F.binary_cross_entropy_with_logits(logits_KBE, wanted_NE[rows_KB]) * FOLDS
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
            with torch.no_grad():
                logits_KTE = self._perceptrons(inputs_NI[held_KT])
                wanted_KTE = wanted_NE[held_KT]
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

    def _fit_context(
        self, local_NL: torch.Tensor, averaged_NC: torch.Tensor, wanted_NE: torch.Tensor, labels: np.ndarray, seed: int
    ) -> None:
        """Train the networks of all folds at once, each on batches of the inputs of the other folds, drawn from both
        kinds of streams; an eighth of these inputs is held out for early stopping."""
        weights = self.context
        for name in ("local", "batch"):
            nn.init.normal_(weights[name], std=weights[name].shape[1] ** -0.5)
        optimizer = torch.optim.AdamW(weights.values(), lr=3e-3, weight_decay=0.1, fused=True)
        generator = np.random.default_rng(seed)
        of_fold = [generator.permutation((self.fold_N != fold).nonzero()[:, 0].numpy()) for fold in range(FOLDS)]
        held_out = [rows[: max(1, len(rows) // HELD_OUT)] for rows in of_fold]
        of_training = [rows[len(held) :] for rows, held in zip(of_fold, held_out, strict=True)]
        shown = min(2 * len(labels), 80 * SAMPLES)  # inputs between two looks
        judged = [self._dealt(held_out, labels, size, max(64, shown // 2 // size), generator) for size in (16, 64)]

        def loss(rows_KGT: torch.Tensor) -> torch.Tensor:
            local, batch = local_NL[rows_KGT], averaged_NC[rows_KGT].mean(2)
            odds = local[..., : wanted_NE.shape[1]] + change(dict(weights), local, batch)
            wanted = wanted_NE[rows_KGT]
            return F.binary_cross_entropy_with_logits(odds, wanted, reduction="none").mean((1, 2, 3))

        def look() -> torch.Tensor:
            with torch.no_grad():
                return torch.stack([loss(rows) for rows in judged]).mean(0)

        best_K, looks = look(), 0
        kept = {name: value.detach().clone() for name, value in weights.items()}
        for number in range(LOOKS):
            size = (32, 8, 128)[number % 3]
            dealt = self._dealt(of_training, labels, size, max(32, shown // size), generator)
            for rows_KGT in dealt.split(max(1, SAMPLES // size), dim=1):
                optimizer.zero_grad()
                loss(rows_KGT).sum().backward()
                optimizer.step()
            loss_K = look()
            better_K = loss_K < best_K - 1e-5
            best_K = torch.where(better_K, loss_K, best_K)
            for name, value in weights.items():
                kept[name][better_K] = value.detach()[better_K]
            looks = 0 if better_K.any() else looks + 1
            if looks == PATIENCE:
                break
        with torch.no_grad():
            for name, value in weights.items():
                value.copy_(kept[name])

    @staticmethod
    def _dealt(
        rows: list[np.ndarray], labels: np.ndarray, size: int, count: int, generator: np.random.Generator
    ) -> torch.Tensor:
        """Batches of given rows for each fold, alternately of both streams, `[K, count, size]`."""
        found = []
        for of_fold in rows:
            seed = int(generator.integers(2**31))
            halves = [deal(labels[of_fold], size, stream, -(-count // 2), seed) for stream in STREAMS]
            found.append(of_fold[np.stack(halves, axis=1).reshape(-1, size)[:count]])
        return torch.from_numpy(np.stack(found))

    def _trained(self) -> list[nn.Parameter]:
        return [*self.weights, *self.biases]

    def _fit_stack(self, near_NE: torch.Tensor, logits_NE: torch.Tensor, wanted_NE: torch.Tensor) -> None:
        """Fit the logistic regressions, drawn to equal weights of both."""
        begin = self.stack_3E.detach().clone()
        optimizer = torch.optim.LBFGS([self.stack_3E], max_iter=100, line_search_fn="strong_wolfe")

        def closure() -> torch.Tensor:
            optimizer.zero_grad()
            loss = F.binary_cross_entropy(self._combined(near_NE, logits_NE), wanted_NE)
            loss = loss + (self.stack_3E - begin).square().sum() / (len(near_NE) * len(begin.T))
            loss.backward()
            return loss

        optimizer.step(closure)


def _seen(estimates: torch.Tensor, gate: torch.Tensor, features: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """What an estimate in a batch depends on: of the input `[..., L]`, and to be averaged over the batch `[..., C]`."""
    local = torch.cat([estimates.clamp(LIMIT, 1 - LIMIT).logit(), gate], dim=-1)
    return local, torch.cat([estimates, gate, features], dim=-1)
