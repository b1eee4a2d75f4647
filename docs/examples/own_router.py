"""A router and experts of one's own in a MoE layer: the second expert only where the gate is in doubt (extra data)."""

import sys

import torch
from torch import nn

from experts import data
from experts.layers import MoELayer
from experts.routers import Routing, RoutingStatistics

STEPS = int(sys.argv[1]) // 8 if len(sys.argv) > 1 else 1000


def in_doubt(logits: torch.Tensor, generator: torch.Generator | None = None) -> Routing:
    members = logits >= torch.maximum(logits.topk(2).values[:, 1:], logits.amax(1, keepdim=True) - 0.5)
    weights = logits.masked_fill(~members, -torch.inf).softmax(-1)
    return Routing(weights, members, RoutingStatistics(logits, members, members))


experts = [nn.Sequential(nn.Linear(64, 16), nn.GELU(), nn.Linear(16, 64)) for _ in range(6)]
layer, head = MoELayer(64, 16, 6, router=in_doubt, experts=experts), nn.Linear(64, 10)
optimizer = torch.optim.AdamW([*layer.parameters(), *head.parameters()], lr=3e-3)
(x, y), (test_x, test_y) = (map(torch.from_numpy, data.load("digits")[split]) for split in ("train", "test"))
for rows in torch.randint(len(x), (STEPS, 32)):
    h, statistics = layer(x[rows])
    loss = nn.functional.cross_entropy(head(h), y[rows]) + 0.02 * statistics.balance_loss
    optimizer.zero_grad(), loss.backward(), optimizer.step()
h, found = layer(test_x)
print(f"accuracy {(head(h).argmax(1) == test_y).float().mean():.3f}, experts per input {found.experts_per_input:.2f}")
