"""The decisions: registered Gymnasium environments over real Mixture-of-Experts models with measured costs."""

from importlib.util import find_spec
from typing import Any

from gymnasium.envs.registration import register, registry

ENVIRONMENTS: dict[str, dict[str, Any]] = {
    "MoERouting-v0": {"entry_point": "moe_envs.routing:MoERouting"},
    "MoERoutingLive-v0": {
        "entry_point": "moe_envs.routing:MoERouting",
        "kwargs": {"costs": "live"},
        "nondeterministic": True,
    },
    "MoEMetaOpt-v0": {
        "entry_point": "moe_envs.metaopt:MoEMetaOpt",
        "vector_entry_point": "moe_envs.mixed:make_metaopt",
    },
    "MoECompression-v0": {"entry_point": "moe_envs.compression:MoECompression"},
}

MULTI_OBJECTIVE = {
    "mo-moe-routing-v0": "moe_envs.multi_objective:MORoutingEnv",
    "mo-moe-metaopt-v0": "moe_envs.multi_objective:MOMetaOptEnv",
    "mo-moe-compression-v0": "moe_envs.multi_objective:MOCompressionEnv",
}

for _id, _spec in ENVIRONMENTS.items():
    if _id not in registry:
        _point = _spec["entry_point"]
        _vector = _spec.get("vector_entry_point", f"{_point}VectorEnv")
        register(_id, **(_spec | {"entry_point": f"{_point}Env", "vector_entry_point": _vector}))

if find_spec("mo_gymnasium") is not None:
    for _id, _point in MULTI_OBJECTIVE.items():
        if _id not in registry:
            register(_id, _point)
