"""A learned policy drives the learning rates and weight decays of a plain torch training (extra data)."""

import sys

import torch
import torch.nn.functional as F

from agents import PPO
from agents.deploy.metaopt import PolicyMetaOptimizer, gate_metrics
from experts import data
from experts.model import MoEClassifier

STEPS = int(sys.argv[1]) if len(sys.argv) > 1 else 100_000

if __name__ == "__main__":
    policy = PPO(
        "MlpPolicy", "moe_envs:MoEMetaOpt-v0", n_envs=32, n_steps=32, batch_size=256, n_epochs=5,
        learning_rate="linear 1e-3", ent_coef=0.005, env_kwargs={"task": "digits"},
    ).learn(STEPS, progress_bar=True)  # fmt: skip
    torch.manual_seed(0)
    digits = data.load("digits")
    (x, y), (validation_x, validation_y) = (map(torch.from_numpy, digits[s]) for s in ("rl_train", "validation"))
    model = MoEClassifier(64, 10, widths=(32,) * 8)
    parts = [{"params": part.parameters()} for part in (model.gate, model.experts)]
    optimizer = torch.optim.AdamW(parts, lr=0.05)
    groups = {"gate": model.gate, "experts": model.experts}
    meta = PolicyMetaOptimizer(optimizer, policy, groups, target=0.97, max_actions=30)
    for epoch in range(30):
        losses = []
        for rows in torch.randperm(len(x)).split(64):
            loss = F.cross_entropy(model(x[rows]), y[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        with torch.no_grad():
            logits, found = model(validation_x), gate_metrics(model.gate(validation_x))
        found |= {"validation_loss": F.cross_entropy(logits, validation_y).item(), "train_losses": losses}
        found["validation_accuracy"] = (logits.argmax(1) == validation_y).float().mean().item()
        print(epoch, f"accuracy {found['validation_accuracy']:.4f}", meta.update_hparams(found, epoch))
