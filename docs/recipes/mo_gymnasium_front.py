"""A front with MO-Gymnasium: PPO for several weights of the reward vector. pip install . mo-gymnasium"""

import sys

import mo_gymnasium
import numpy as np
from mo_gymnasium.wrappers import LinearReward
from stable_baselines3 import PPO
from stable_baselines3.common.vec_env import DummyVecEnv

import moe_envs
from benchmarks.results import pareto

ID, ROWS = "mo-moe-routing-v0", 16
STEPS = int(sys.argv[1]) if len(sys.argv) > 1 else 200_000
EPISODES = int(sys.argv[2]) if len(sys.argv) > 2 else 500

if __name__ == "__main__":
    points = []
    for cost_weight in (0.05, 0.1, 0.2, 0.4):
        weight = np.array([1, *[cost_weight / 3] * 3])  # of quality, -time, -memory, -energy
        envs = DummyVecEnv([lambda w=weight: LinearReward(mo_gymnasium.make(ID, bundle="digits"), w)] * ROWS)
        learner = PPO("MlpPolicy", envs, n_steps=128, batch_size=512, n_epochs=5, gae_lambda=0.8, ent_coef=0.003,
                      learning_rate=1e-3, seed=0)  # fmt: skip
        learner.learn(STEPS)

        env = mo_gymnasium.make(ID, bundle="digits", split="test")
        found = np.zeros((EPISODES, 4))
        for episode in range(EPISODES):
            observation, ended = env.reset(seed=episode)[0], False
            while not ended:
                action, _ = learner.predict(observation, deterministic=True)
                observation, reward, ended, _, _ = env.step(action)
                found[episode] += reward
        quality, *costs = found.mean(0)
        points.append([-np.mean(costs), quality])
        print(f"cost weight {cost_weight:g}: accuracy {quality:.3f}, time {-costs[0]:.3f}, memory {-costs[1]:.3f}, "
              f"energy {-costs[2]:.3f} on test")  # fmt: skip
    print(f"hypervolume {pareto.hypervolume(np.array(points), moe_envs.find('MoERouting-v0').reference_point):.3f}")
