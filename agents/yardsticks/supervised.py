"""Supervised predictors for yardsticks: a small perceptron stopped on validation, and nearest neighbours."""

from collections.abc import Callable

import numpy as np
import torch
from torch import nn

Predictor = Callable[[np.ndarray], np.ndarray]


def fit_perceptron(
    train: tuple[np.ndarray, np.ndarray],
    validation: tuple[np.ndarray, np.ndarray],
    loss: nn.Module,
    epochs: int = 20,
    width: int = 128,
    batch_size: int = 256,
) -> nn.Module:
    """A perceptron with two hidden layers, AdamW, the weights of the epoch of least validation loss.

    `train` and `validation` are inputs `[n, d]` and targets `[n, k]`.
    """
    x, y, validation_x, validation_y = (torch.from_numpy(a.astype(np.float32)) for a in (*train, *validation))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        layers = [nn.Linear(x.shape[1], width), nn.ReLU(), nn.Linear(width, width), nn.ReLU()]
        network = nn.Sequential(*layers, nn.Linear(width, y.shape[1]))
        optimizer = torch.optim.AdamW(network.parameters(), lr=1e-3, weight_decay=1e-2)
        least, best = float("inf"), network.state_dict()
        for _ in range(epochs):
            for rows in torch.randperm(len(x)).split(batch_size):
                optimizer.zero_grad()
                loss(network(x[rows]), y[rows]).backward()
                optimizer.step()
            with torch.no_grad():
                error = float(loss(network(validation_x), validation_y))
            if error < least:
                least, best = error, {name: value.clone() for name, value in network.state_dict().items()}
    network.load_state_dict(best)
    return network


def probabilities(train: tuple[np.ndarray, np.ndarray], validation: tuple[np.ndarray, np.ndarray]) -> Predictor:
    """P(target = 1 | x) for each of k binary targets, by a perceptron on the cross-entropy."""
    network = fit_perceptron(train, validation, nn.BCEWithLogitsLoss())
    return lambda x: _forward(network, x, torch.sigmoid)


def values(train: tuple[np.ndarray, np.ndarray], validation: tuple[np.ndarray, np.ndarray]) -> Predictor:
    """E(target | x) for each of k real targets, by a perceptron on the squared error."""
    network = fit_perceptron(train, validation, nn.MSELoss())
    return lambda x: _forward(network, x, lambda y: y)


def nearest_neighbours(x: np.ndarray, y: np.ndarray, k: int) -> Predictor:
    """The mean target of the k nearest rows of `x` (Euclidean, the row itself left out); answers are kept for reuse."""
    squares = (x**2).sum(1)
    known: dict[bytes, np.ndarray] = {}

    def predict(queries: np.ndarray) -> np.ndarray:
        new = [row for row in queries if row.tobytes() not in known]
        for part in np.array_split(np.array(new), len(new) // 500 + 1) if new else []:
            distance = squares - 2 * part @ x.T + (part**2).sum(1, keepdims=True)
            distance[distance < 1e-4] = np.inf
            nearest = distance.argpartition(k, axis=1)[:, :k]
            known.update(zip((row.tobytes() for row in part), y[nearest].mean(1), strict=True))
        return np.array([known[row.tobytes()] for row in queries])

    return predict


def _forward(network: nn.Module, x: np.ndarray, head: Callable[[torch.Tensor], torch.Tensor]) -> np.ndarray:
    with torch.no_grad():
        return head(network(torch.from_numpy(x.astype(np.float32)))).numpy()
