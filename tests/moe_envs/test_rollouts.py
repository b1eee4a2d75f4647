"""Nothing changes for users unannounced: rollouts of every environment are those of the commit that recorded them.

`python tests/moe_envs/test_rollouts.py` at a commit writes `rollouts.json` anew; what is there was made at e1f72dc, and
for routing when it began to observe estimates.
Sums over each array are compared, with a tolerance, as processors round differently.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest

RECORDED = Path(__file__).with_name("rollouts.json")
SPLIT = {"split": "test", "stream": "iid"}
WEIGHTS = {"cost_weight": 0.7, "time_weight": 1.0, "memory_weight": 0.0, "energy_weight": 0.0}
CASES: list[tuple[str, dict[str, Any]]] = [
    ("MoERouting-v0", {"bundle": "digits"}),
    ("MoERouting-v0", {"bundle": "digits", "action": "subset", "batch_size": 8}),
    ("MoERouting-v0", {"bundle": "digits", "action": "top-m"} | SPLIT | WEIGHTS),
    ("MoERouting-v0", {"observation": "features"}),
    ("MoERouting-v0", {}),
    ("MoEMetaOpt-v0", {}),
    ("MoEMetaOpt-v0", {"cost_weight": 0.5, "scales": [0.2, 5.0], "undo": False, "widths": [3, 8], "max_actions": 8}),
    ("MoEMetaOpt-v0", {"task": "fashion-mnist", "max_actions": 5}),
    ("MoECompression-v0", {"model": "digits-mlp"}),
    ("MoECompression-v0", {"model": "digits-mlp", "shaped": True, "quality": "loss", "budget": 20000}),
    ("MoECompression-v0", {"model": "digits-mlp", "evaluation": "additive", "granularity": "layer"}),
    ("mo-moe-routing-v0", {"bundle": "digits"}),
    ("mo-moe-metaopt-v0", {"max_actions": 5}),
    ("mo-moe-compression-v0", {"model": "digits-mlp"}),
]


def sums(value: Any) -> Iterator[float]:
    """One number for each array and scalar of what an environment returned, dicts by key."""
    if isinstance(value, dict):
        for key in sorted(value):
            yield from sums(value[key])
    elif isinstance(value, np.ndarray) and value.dtype == object:
        for each in value:
            yield from sums(each)
    elif value is not None:
        yield float(np.asarray(value, dtype=np.float64).sum())


def rollout(env_id: str, kwargs: dict[str, Any], rows: int | None) -> list[float]:
    """Twelve steps of random actions, in one environment or in so many rows."""
    name = f"moe_envs:{env_id}"
    env: Any = gymnasium.make(name, disable_env_checker=True, **kwargs) if rows is None else gymnasium.make_vec(
        name, rows, vectorization_mode="vector_entry_point", **kwargs
    )  # fmt: skip
    env.action_space.seed(7)
    found = [*sums(env.reset(seed=7)[0])]
    for _ in range(12):
        step = env.step(env.action_space.sample())
        found += [each for part in step for each in sums(part)]
        if rows is None and (step[2] or step[3]):
            found += sums(env.reset()[0])
    env.close()
    return [float(f"{each:.7g}") for each in found]


def cases() -> list[tuple[str, dict[str, Any], int | None]]:
    return [(*case, rows) for case in CASES for rows in (None, 3) if rows is None or case[0].startswith("MoE")]


@pytest.mark.parametrize(("env_id", "kwargs", "rows"), cases(), ids=str)
def test_a_rollout_is_the_one_recorded(env_id: str, kwargs: dict[str, Any], rows: int | None) -> None:
    recorded = json.loads(RECORDED.read_text())[f"{env_id} {json.dumps(kwargs)} {rows}"]
    found = rollout(env_id, kwargs, rows)
    trained = "metaopt" in env_id.lower()  # a training makes more of a rounding, here and there
    assert found == pytest.approx(recorded, rel=3e-2 if trained else 1e-3, abs=3e-2 if trained else 1e-3)
    assert np.isclose(found, recorded, rtol=1e-3, atol=1e-3).mean() > 0.95


if __name__ == "__main__":
    made = {f"{env_id} {json.dumps(kwargs)} {rows}": rollout(env_id, kwargs, rows) for env_id, kwargs, rows in cases()}
    lines = (f"{json.dumps(case)}: {json.dumps(found)}" for case, found in made.items())
    RECORDED.write_text("{\n" + ",\n".join(lines) + "\n}\n")
