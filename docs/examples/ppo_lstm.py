"""RecurrentPPO of sb3-contrib on MoERouting-v0, with cost curves and its result on test images (extra contrib)."""

import sys

from sb3_contrib import RecurrentPPO
from stable_baselines3.common.utils import LinearSchedule

from agents.evaluate import evaluate
from agents.sb3 import CostLogger, make_sb3_vec

STEPS = int(sys.argv[1]) if len(sys.argv) > 1 else 500_000
env_id, kwargs = "moe_envs:MoERouting-v0", {"bundle": "digits", "cost_weight": 0.2}

if __name__ == "__main__":
    env = make_sb3_vec(env_id, 128, **kwargs)
    model = RecurrentPPO(
        "MlpLstmPolicy", env, seed=0, device="cpu", tensorboard_log="runs/ppo_lstm",
        n_steps=32, batch_size=512, n_epochs=5, gamma=0.99, gae_lambda=0.8, ent_coef=0.003,
        learning_rate=LinearSchedule(1e-3, 0, 1), policy_kwargs={"net_arch": [128], "lstm_hidden_size": 64},
    )  # fmt: skip
    model.learn(STEPS, CostLogger(), progress_bar=True)
    frame = evaluate(model, env_id, episodes=1000, **kwargs, split="test")
    print(frame[["return", "quality", "cost"]].mean())
