"""No learning rate: a range test, then decisions by what the training shows, drive a plain torch loop (extra data)."""

import torch
import torch.nn.functional as F
from torch import nn

from agents.deploy.metaopt import AutoRate
from experts import data

STEPS = 600

if __name__ == "__main__":
    torch.manual_seed(0)
    digits = data.load("digits")
    (x, y), (validation_x, validation_y) = (map(torch.from_numpy, digits[s]) for s in ("rl_train", "validation"))
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    optimizer = torch.optim.AdamW(model.parameters())

    def validation() -> float:
        with torch.no_grad():
            return float(F.cross_entropy(model(validation_x), validation_y))

    auto = AutoRate(optimizer, validation=validation, steps=STEPS)
    for _ in range(STEPS):
        rows = torch.randint(len(x), (32,))
        loss = F.cross_entropy(model(x[rows]), y[rows])
        optimizer.zero_grad(), loss.backward(), optimizer.step()
        auto.step(loss)
    print(f"accuracy {(model(validation_x).argmax(1) == validation_y).float().mean():.3f}, loss {auto.finish():.4f}")
