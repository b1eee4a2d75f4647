"""Our PPO on MoERouting-v0, with curves, a saved agent, and its result on test images."""

import sys

from agents import PPO
from agents.evaluate import evaluate

STEPS = int(sys.argv[1]) if len(sys.argv) > 1 else 1_000_000
kwargs = {"bundle": "digits", "cost_weight": 0.2}

if __name__ == "__main__":
    agent = PPO(
        "MlpPolicy", "moe_envs:MoERouting-v0", n_envs=128, env_kwargs=kwargs, seed=0, tensorboard_log="runs/own_ppo",
        n_steps=32, batch_size=512, n_epochs=5, learning_rate="linear 1e-3", gae_lambda=0.8, ent_coef=0.003,
        policy_kwargs={"net_arch": [128, 128]},
    )  # fmt: skip
    agent.learn(STEPS, progress_bar=True)
    agent.save("runs/own_ppo/agent")
    frame = evaluate(PPO.load("runs/own_ppo/agent"), "moe_envs:MoERouting-v0", episodes=1000, **kwargs, split="test")
    print(frame[["return", "quality", "cost"]].mean())
