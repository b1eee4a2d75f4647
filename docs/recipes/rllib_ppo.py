"""RLlib's PPO on MoERouting-v0, in an environment of its own, as Ray pins gymnasium 1.2: pip install . 'ray[rllib]'."""

import sys

import gymnasium
import torch
from ray.rllib.algorithms.ppo import PPOConfig
from ray.rllib.core.columns import Columns
from ray.tune.registry import register_env

from agents.evaluate import evaluate

ENV, ARGUMENTS, BATCH = (
    "moe_envs:MoERouting-v0",
    {"bundle": "digits", "cost_weight": 0.4, "observation": "features"},
    4096,
)
STEPS = int(sys.argv[1]) if len(sys.argv) > 1 else 200_000

if __name__ == "__main__":
    register_env("routing", lambda arguments: gymnasium.make(ENV, **arguments))
    config = (
        PPOConfig()
        .environment("routing", env_config=ARGUMENTS)
        .env_runners(num_env_runners=1, num_envs_per_env_runner=16)
        .training(train_batch_size_per_learner=BATCH, minibatch_size=512, num_epochs=5, lr=1e-3, lambda_=0.8,
                  entropy_coeff=0.003)
        .rl_module(model_config={"fcnet_hiddens": [64, 64], "fcnet_activation": "tanh"})
        .debugging(seed=0)
    )  # fmt: skip
    algorithm = config.build_algo()
    for _ in range(max(1, STEPS // BATCH)):
        algorithm.train()
    module = algorithm.get_module()

    class Greedy:
        """The policy as `evaluate` wants it."""

        def predict(self, observation, state=None, episode_start=None, deterministic=True):
            with torch.no_grad():
                found = module.forward_inference({Columns.OBS: torch.from_numpy(observation)})
            return found[Columns.ACTION_DIST_INPUTS].argmax(1).numpy(), state

    frame = evaluate(Greedy(), ENV, episodes=500, split="test", **ARGUMENTS)
    print(f"RLlib: return {frame['return'].mean():.3f}, accuracy {frame['quality'].mean():.3f} on test")
    algorithm.stop()
