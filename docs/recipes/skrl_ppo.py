"""skrl's PPO on MoERouting-v0, in the native vector environment. pip install . skrl"""

import sys

import torch
from skrl.agents.torch.ppo import PPO, PPO_CFG
from skrl.envs.wrappers.torch import wrap_env
from skrl.memories.torch import RandomMemory
from skrl.trainers.torch import SequentialTrainer, SequentialTrainerCfg
from skrl.utils import set_seed
from skrl.utils.model_instantiators.torch import categorical_model, deterministic_model

from agents.evaluate import evaluate, make_rows

ENV, ARGUMENTS, ROWS = "moe_envs:MoERouting-v0", {"bundle": "digits", "cost_weight": 0.4, "observation": "features"}, 64
STEPS = int(sys.argv[1]) if len(sys.argv) > 1 else 400_000

if __name__ == "__main__":
    set_seed(0)
    env = wrap_env(make_rows(ENV, ROWS, **ARGUMENTS), wrapper="gymnasium")
    spaces = {"observation_space": env.observation_space, "action_space": env.action_space, "device": env.device}
    layers = [{"name": "net", "input": "OBSERVATIONS", "layers": [64, 64], "activations": "tanh"}]
    policy = categorical_model(**spaces, network=layers, output="ACTIONS")
    value = deterministic_model(**spaces, network=layers, output="ONE")
    settings = PPO_CFG(rollouts=32, learning_epochs=5, mini_batches=4, gae_lambda=0.8, entropy_loss_scale=0.003,
                       ratio_clip=0.2, value_clip=0.0)  # fmt: skip
    memory = RandomMemory(memory_size=32, num_envs=ROWS, device=env.device)
    agent = PPO(models={"policy": policy, "value": value}, memory=memory, cfg=settings, **spaces)
    SequentialTrainer(env=env, agents=agent, cfg=SequentialTrainerCfg(timesteps=STEPS // ROWS, headless=True)).train()

    class Greedy:
        """The policy as `evaluate` wants it."""

        def predict(self, observation, state=None, episode_start=None, deterministic=True):
            with torch.no_grad():
                _, outputs = policy.act({"observations": torch.from_numpy(observation)}, role="policy")
            return outputs["net_output"].argmax(1).numpy(), state

    frame = evaluate(Greedy(), ENV, episodes=500, split="test", **ARGUMENTS)
    print(f"skrl: return {frame['return'].mean():.3f}, accuracy {frame['quality'].mean():.3f} on test")
