"""A module with residual, norm and head becomes a bundle, an environment, and is deployed, as it answers itself."""

from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from torch import nn

from agents import PPO
from agents.deploy.routing import RoutedMoE
from cost.profile import measure_experts
from experts import bundle
from experts.adapter import AdaptedMoE


class Residual(nn.Module):
    """Encoder, top-2 MoE of wider experts that return features, residual, norm and head."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(6, 8), nn.Tanh())
        self.moe = nn.ModuleDict({
            "router": nn.Linear(8, 3),
            "ffn": nn.ModuleList(nn.Sequential(nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 8)) for _ in range(3)),
        })  # fmt: skip
        self.norm, self.classifier = nn.LayerNorm(8), nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, None]:
        h = self.encoder(x)
        weights, chosen = self.moe["router"](h).topk(2)
        every = torch.stack([expert(h) for expert in self.moe["ffn"]], dim=1)  # type: ignore[union-attr]
        mixed = (weights.softmax(-1).unsqueeze(-1) * every.gather(1, chosen.unsqueeze(-1).expand(-1, -1, 8))).sum(1)
        return self.classifier(self.norm(h + mixed)), None


def adapted(module: Residual, **changes: Any) -> AdaptedMoE:
    def head(h: torch.Tensor, mixed: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = module.classifier(module.norm(h + mixed))
        return found

    parts = {"trunk": "encoder", "gate": "moe.router", "experts": "moe.ffn", "head": head}
    return AdaptedMoE(module, **(parts | {"examples": torch.randn(16, 6)} | changes))


def test_parts_that_compute_something_else_are_refused() -> None:
    torch.manual_seed(0)
    module = Residual()
    assert adapted(module).check(torch.randn(50, 6)) < 1e-5
    for wrong in ({"k": 1}, {"head": lambda h, mixed: module.classifier(module.norm(mixed))}):
        with pytest.raises(ValueError, match=r"other logits than the module, by up to \d"):
            adapted(module, **wrong)
    with pytest.raises(ValueError, match=r"logits of \(16, 8\), the module \(16, 4\)"):
        adapted(module, head=None)


def test_a_module_of_any_shape_is_tabulated_and_deployed() -> None:
    torch.manual_seed(1)
    module, generator = Residual(), np.random.default_rng(0)
    inputs = generator.normal(size=(300, 6)).astype(np.float32)
    model = adapted(module)
    labels = model(torch.from_numpy(inputs)).argmax(1).numpy()
    built = bundle.build("shaped", inputs, labels, model=model, profile=measure_experts, progress=False)
    assert built.metadata["accuracy"]["test/top-2"] == 1.0
    split = built.split("test")
    outcomes = np.unpackbits(split.outcomes, axis=1, count=8, bitorder="little")
    gate = torch.from_numpy(split.gate_logits)
    pairs = [(1 << torch.topk(row, 2).indices).sum().item() for row in gate]
    assert outcomes[np.arange(len(outcomes)), pairs].all()
    np.testing.assert_array_equal(outcomes[:, [1, 2, 4]], split.singles)
    assert (split.logits.argmax(-1) == split.labels[:, None])[split.singles == 1].mean() > 0.97
    kwargs = {"bundle": str(built.path), "batch_size": 4}
    gymnasium.make("moe_envs:MoERouting-v0", **kwargs).reset(seed=0)
    policy = PPO("MlpPolicy", "moe_envs:MoERouting-v0", env_kwargs=kwargs, n_envs=2)
    policy.network.weights["policy.bias"][:] = [0, 100, 0]
    fresh = Residual()
    routed = RoutedMoE(built, policy, kwargs, module=adapted(fresh))
    x = torch.from_numpy(inputs[:8])
    with torch.no_grad():
        h = module.encoder(x)
        alone = module.classifier(module.norm(h + module.moe["ffn"][1](h)))  # type: ignore[index]
        torch.testing.assert_close(routed(x), alone, rtol=1e-4, atol=1e-4)
