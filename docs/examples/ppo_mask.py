"""MaskablePPO of sb3-contrib on MoERouting-v0 under a hard limit: at most three experts in a batch (extra contrib)."""

import sys

import gymnasium
import numpy as np
from sb3_contrib import MaskablePPO
from sb3_contrib.common.maskable.evaluation import evaluate_policy
from stable_baselines3.common.env_util import make_vec_env

STEPS = int(sys.argv[1]) if len(sys.argv) > 1 else 200_000
env_id, kwargs = "moe_envs:MoERouting-v0", {"bundle": "digits", "cost_weight": 0.2}


class AtMostThree(gymnasium.ObservationWrapper):
    def observation(self, observation):
        self.paid = observation[self.unwrapped.observation_layout["experts_used"].slice] > 0
        return observation

    def action_masks(self):
        return self.paid if self.paid.sum() == 3 else np.ones_like(self.paid)


if __name__ == "__main__":
    env = make_vec_env(env_id, 8, seed=0, wrapper_class=AtMostThree, env_kwargs=kwargs)
    model = MaskablePPO("MlpPolicy", env, n_steps=128, batch_size=256, n_epochs=5, seed=0, device="cpu")
    model.learn(STEPS, progress_bar=True)
    test = make_vec_env(env_id, 8, seed=0, wrapper_class=AtMostThree, env_kwargs={**kwargs, "split": "test"})
    print("mean return and its deviation on test images:", evaluate_policy(model, test, n_eval_episodes=500))
