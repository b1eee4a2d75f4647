"""TorchRL's PPO on MoERouting-v0. pip install . torchrl"""

import sys

import gymnasium
import torch
from tensordict.nn import TensorDictModule
from torch.distributions import OneHotCategorical
from torchrl.collectors import Collector
from torchrl.data import LazyTensorStorage, ReplayBuffer, SamplerWithoutReplacement
from torchrl.envs import GymWrapper, SerialEnv
from torchrl.modules import MLP, ProbabilisticActor, ValueOperator
from torchrl.objectives import ClipPPOLoss
from torchrl.objectives.value import GAE

from agents.evaluate import evaluate

ENV, ARGUMENTS, ROWS, ROLLOUT = (
    "moe_envs:MoERouting-v0",
    {"bundle": "digits", "cost_weight": 0.4, "observation": "features"},
    8,
    2048,
)
STEPS = int(sys.argv[1]) if len(sys.argv) > 1 else 200_000

if __name__ == "__main__":
    torch.manual_seed(0)
    env = SerialEnv(ROWS, lambda: GymWrapper(gymnasium.make(ENV, **ARGUMENTS)))
    width, actions = env.observation_spec["observation"].shape[-1], env.action_spec.shape[-1]
    net = MLP(width, actions, num_cells=[64, 64], activation_class=torch.nn.Tanh)
    head = TensorDictModule(net, in_keys=["observation"], out_keys=["logits"])
    policy = ProbabilisticActor(head, spec=env.action_spec, in_keys=["logits"], distribution_class=OneHotCategorical,
                                return_log_prob=True)  # fmt: skip
    value = ValueOperator(MLP(width, 1, num_cells=[64, 64], activation_class=torch.nn.Tanh))
    gae, loss = GAE(gamma=0.99, lmbda=0.8, value_network=value), ClipPPOLoss(policy, value, entropy_coeff=0.003)
    optimizer = torch.optim.Adam(loss.parameters(), lr=1e-3)
    memory = ReplayBuffer(storage=LazyTensorStorage(ROLLOUT), sampler=SamplerWithoutReplacement(), batch_size=512)
    for batch in Collector(
        env, policy, frames_per_batch=ROLLOUT, total_frames=STEPS, auto_register_policy_transforms=True
    ):
        for _ in range(5):
            with torch.no_grad():
                gae(batch)
            memory.extend(batch.reshape(-1))
            for part in memory:
                terms = loss(part)
                optimizer.zero_grad()
                (terms["loss_objective"] + terms["loss_critic"] + terms["loss_entropy"]).backward()
                torch.nn.utils.clip_grad_norm_(loss.parameters(), 0.5)
                optimizer.step()

    class Greedy:
        """The policy as `evaluate` wants it."""

        def predict(self, observation, state=None, episode_start=None, deterministic=True):
            with torch.no_grad():
                return net(torch.from_numpy(observation)).argmax(1).numpy(), state

    frame = evaluate(Greedy(), ENV, episodes=500, split="test", **ARGUMENTS)
    print(f"TorchRL: return {frame['return'].mean():.3f}, accuracy {frame['quality'].mean():.3f} on test")
