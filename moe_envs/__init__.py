"""The decisions: registered Gymnasium environments over real Mixture-of-Experts models with measured costs."""

from gymnasium.envs.registration import register, registry

ENVIRONMENTS = {"MoERouting-v0": "moe_envs.routing:MoERouting"}

for _id, _entry_point in ENVIRONMENTS.items():
    if _id not in registry:
        register(_id, entry_point=f"{_entry_point}Env", vector_entry_point=f"{_entry_point}VectorEnv")
