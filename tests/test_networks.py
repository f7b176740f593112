"""Activations against their textbook forms."""

import jax
import jax.numpy as jnp
import numpy as np

from qscore.networks import mish


def test_mish_and_its_slope_are_right_everywhere():
    x = np.concatenate([np.linspace(-60.0, 60.0, 4001), [-1e4, 1e4]])
    value, slope = jax.vmap(jax.value_and_grad(mish))(jnp.asarray(x, jnp.float32))

    wide = x.astype(np.longdouble)
    softplus = np.logaddexp(0, wide)
    tanh = np.tanh(softplus)
    known = tanh + wide * (1 - tanh**2) * np.exp(wide - softplus)
    scale = np.maximum(1.0, np.abs(x))
    assert np.max(np.abs(np.asarray(value, np.float64) - wide * tanh) / scale) < 1e-6
    assert np.max(np.abs(np.asarray(slope, np.float64) - known)) < 1e-6
    assert np.all(np.isfinite(value)) and np.all(np.isfinite(slope))
