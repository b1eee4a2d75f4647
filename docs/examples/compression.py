"""MaskablePPO of sb3-contrib (extra contrib) on MoECompression-v0; then a plan for a checkpoint."""

import sys

import torch
from sb3_contrib import MaskablePPO
from stable_baselines3.common.env_util import make_vec_env

from agents.deploy.compression import plan_of
from experts import reference_models
from experts.compression.pieces import importance

STEPS = int(sys.argv[1]) if len(sys.argv) > 1 else 100_000
env_id, kwargs = "moe_envs:MoECompression-v0", {"model": "digits-mlp"}

if __name__ == "__main__":
    quick = make_vec_env(env_id, 8, seed=0, env_kwargs={**kwargs, "evaluation": "additive"})
    policy = MaskablePPO("MlpPolicy", quick, n_steps=144, batch_size=288, gamma=1.0, seed=0, device="cpu")
    policy.learn(STEPS // 2, progress_bar=True)
    policy.set_env(make_vec_env(env_id, 8, seed=0, env_kwargs=kwargs))
    policy.learn(STEPS // 2, reset_num_timesteps=False, progress_bar=True)
    plan, model = plan_of(policy, "digits-mlp", budget=20_000), reference_models.load("digits-mlp")
    examples = reference_models.examples("digits-mlp")
    file, small = plan.compress(model, importance(model, torch.from_numpy(examples.calibration)))
    found = small(torch.from_numpy(examples.inputs)).argmax(1).numpy()
    print(len(file), "bytes, accuracy on validation", (found == examples.labels).mean(), plan.levels)
