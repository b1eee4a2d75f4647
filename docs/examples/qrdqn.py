"""QRDQN of sb3-contrib on MoERouting-v0: cost curves on TensorBoard, and its result on test images (extra contrib)."""

import sys

from sb3_contrib import QRDQN
from stable_baselines3.common.utils import LinearSchedule

from agents.evaluate import evaluate
from agents.sb3 import CostLogger, make_sb3_vec

STEPS = int(sys.argv[1]) if len(sys.argv) > 1 else 500_000
env_id, kwargs = "moe_envs:MoERouting-v0", {"bundle": "digits", "cost_weight": 0.2}

if __name__ == "__main__":
    env = make_sb3_vec(env_id, 32, **kwargs)
    model = QRDQN(
        "MlpPolicy", env, seed=0, device="cpu", tensorboard_log="runs/qrdqn",
        learning_rate=LinearSchedule(1e-3, 0, 1), buffer_size=200_000, learning_starts=10_000, batch_size=256,
        train_freq=4, gradient_steps=8, target_update_interval=2_000, exploration_fraction=0.3,
        exploration_final_eps=0.02, policy_kwargs={"net_arch": [128, 128], "n_quantiles": 25},
    )  # fmt: skip
    model.learn(STEPS, CostLogger(), progress_bar=True)
    frame = evaluate(model, env_id, episodes=1000, **kwargs, split="test")
    print(frame[["return", "quality", "cost"]].mean())
