"""Tianshou's PPO on MoERouting-v0, in an environment of its own, as Tianshou wants pandas 2: pip install . tianshou"""

import sys

import gymnasium
import numpy as np
import torch
from tianshou.algorithm.modelfree.ppo import PPO
from tianshou.algorithm.modelfree.reinforce import DiscreteActorPolicy
from tianshou.algorithm.optim import AdamOptimizerFactory
from tianshou.data import Collector, VectorReplayBuffer
from tianshou.env import DummyVectorEnv
from tianshou.trainer import OnPolicyTrainerParams
from tianshou.utils.net.common import Net
from tianshou.utils.net.discrete import DiscreteActor, DiscreteCritic

from agents.evaluate import evaluate

ENV, ARGUMENTS, ROWS = "moe_envs:MoERouting-v0", {"bundle": "digits", "cost_weight": 0.4, "observation": "features"}, 16
STEPS = int(sys.argv[1]) if len(sys.argv) > 1 else 200_000

if __name__ == "__main__":
    torch.manual_seed(0)
    np.random.seed(0)  # noqa: NPY002
    envs = DummyVectorEnv([lambda: gymnasium.make(ENV, **ARGUMENTS)] * ROWS)
    space, actions = envs.observation_space[0], envs.action_space[0]
    actor, critic = (Net(state_shape=space.shape, hidden_sizes=[64, 64], activation=torch.nn.Tanh) for _ in range(2))
    head = DiscreteActor(preprocess_net=actor, action_shape=actions.n, softmax_output=False)
    policy = DiscreteActorPolicy(
        actor=head, dist_fn=lambda logits: torch.distributions.Categorical(logits=logits), action_space=actions,
        observation_space=space, deterministic_eval=True,
    )  # fmt: skip
    algorithm = PPO(policy=policy, critic=DiscreteCritic(preprocess_net=critic), optim=AdamOptimizerFactory(lr=1e-3),
                    gae_lambda=0.8, ent_coef=0.003, max_grad_norm=0.5)  # fmt: skip
    collector = Collector(algorithm, envs, VectorReplayBuffer(2048, ROWS))
    algorithm.run_training(OnPolicyTrainerParams(
        training_collector=collector, test_collector=None, max_epochs=1, epoch_num_steps=STEPS,
        collection_step_num_env_steps=2048, update_step_num_repetitions=5, batch_size=512,
    ))  # fmt: skip

    class Greedy:
        """The policy as `evaluate` wants it."""

        def predict(self, observation, state=None, episode_start=None, deterministic=True):
            with torch.no_grad():
                return head(observation)[0].argmax(1).numpy(), state

    frame = evaluate(Greedy(), ENV, episodes=500, split="test", **ARGUMENTS)
    print(f"Tianshou: return {frame['return'].mean():.3f}, accuracy {frame['quality'].mean():.3f} on test")
