"""Our REINFORCE with a learned baseline on MoERouting-v0, and its result on test images."""

import sys

from agents import REINFORCE
from agents.evaluate import evaluate

STEPS = int(sys.argv[1]) if len(sys.argv) > 1 else 1_000_000
kwargs = {"bundle": "digits", "cost_weight": 0.2}

if __name__ == "__main__":
    agent = REINFORCE(
        "MlpPolicy", "moe_envs:MoERouting-v0", n_envs=128, env_kwargs=kwargs, seed=0,
        tensorboard_log="runs/own_reinforce", n_steps=128, batch_size=256, learning_rate="linear 5e-4", ent_coef=0.08,
        policy_kwargs={"net_arch": [128, 128]},
    )  # fmt: skip
    agent.learn(STEPS, progress_bar=True)
    frame = evaluate(agent, "moe_envs:MoERouting-v0", episodes=1000, **kwargs, split="test")
    print(frame[["return", "quality", "cost"]].mean())
