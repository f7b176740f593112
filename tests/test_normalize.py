"""Algorithms see standardised observations: what they learn is what they would learn from those."""

import dataclasses

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from helpers import HIDDEN, assert_close, quick_jit, random_batch

from qscore import SAC, TD3, DiffusionQL, Spec
from qscore.normalize import Moments, observe, standardize

SPEC = Spec(obs_size=3, action_size=2, dt=0.05)


@pytest.mark.parametrize("kind", [SAC, TD3, DiffusionQL])
def test_update_and_act_see_standardised_observations(kind):
    scaled, plain = (kind(normalize_observations=on, hidden=HIDDEN) for on in (True, False))
    batch = random_batch(SPEC, 32, jr.key(0))
    batch = dataclasses.replace(batch, obs=9.0 * batch.obs + 4.0, next_obs=9.0 * batch.next_obs)
    start = quick_jit(lambda key: scaled.init(SPEC, key=key))(jr.key(1))
    after, metrics = quick_jit(lambda *args: scaled.update(*args, key=jr.key(2)))(start, batch)

    moments = observe(Moments.unit(SPEC.obs_size), batch.obs)
    assert_close(after.moments, moments)
    np.testing.assert_allclose(moments.mean, np.mean(batch.obs, axis=0), rtol=1e-5)
    rows = jax.vmap(lambda obs: standardize(moments, obs))
    seen = dataclasses.replace(batch, obs=rows(batch.obs), next_obs=rows(batch.next_obs))
    expected, expected_metrics = quick_jit(lambda *args: plain.update(*args, key=jr.key(2)))(
        start, seen
    )
    why = "fused operations round elsewhere, and Adam divides by small numbers"
    assert_close(metrics, expected_metrics, loosen=10.0, why=why)
    assert_close(after.critics, expected.critics, loosen=100.0, why=why)

    obs = jnp.array([30.0, -20.0, 5.0])
    for explore in (False, True):
        action, _ = scaled.act(after, (), obs, key=jr.key(3), explore=explore)
        same, _ = plain.act(after, (), standardize(moments, obs), key=jr.key(3), explore=explore)
        assert_close(action, same, loosen=10.0, why=why)
        other, _ = plain.act(after, (), obs, key=jr.key(3), explore=explore)
        assert np.max(np.abs(action - other)) > 0.01
