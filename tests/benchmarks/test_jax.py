"""PPO in JAX: its environment is ours, and it learns."""

import gymnasium
import numpy as np
import pytest

jax = pytest.importorskip("jax")
from benchmarks.programs import jax_ppo  # noqa: E402


def test_its_environment_is_ours() -> None:
    theirs, ours = (
        jax_ppo.Environment(4),
        gymnasium.make_vec("moe_envs:MoERouting-v0", 4, "vector_entry_point", observation="features"),
    )
    env: object = ours.unwrapped
    seen, _ = ours.reset(seed=0)
    zeros = np.zeros(4, dtype=np.int32)
    batch = env.batch.copy()  # type: ignore[attr-defined]
    rows = jax_ppo.Steps(batch * 33, zeros, zeros + theirs.first_ledger, zeros.astype(np.float32), batch)
    generator = np.random.default_rng(0)
    for _ in range(31):
        np.testing.assert_allclose(theirs.observe(rows), seen, atol=1e-6)
        actions = generator.integers(8, size=4)
        rows, reward, done = theirs.step(rows, actions, jax.random.key(0))
        seen, wanted, ended, _, _ = ours.step(actions)
        np.testing.assert_allclose(reward, wanted, atol=1e-6)
        np.testing.assert_array_equal(done, ended)
    assert theirs.step(rows, actions, jax.random.key(0))[2].all()


def test_it_learns() -> None:
    train, state = jax_ppo.make(64, 32, 512, updates=40)
    _, returns = train(state, jax.random.key(0))
    assert np.asarray(returns)[-1] > 0.5 > np.asarray(returns)[0]
