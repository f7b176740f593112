"""Running mean and variance of what networks see, learned from the batches they learn from."""

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from qscore.types import AnyArray, Transition

SLOWEST = 1e-3
"""Least weight of a batch: the moments follow a distribution that goes on moving."""

BOUND = 10.0
"""Standardised components are kept in [-BOUND, BOUND]."""


class Moments(eqx.Module):
    """Mean and variance of each component, over the batches seen."""

    mean: Float[Array, " size"]
    variance: Float[Array, " size"]
    batches: Float[Array, ""]

    @staticmethod
    def unit(size: int) -> "Moments":
        """Mean 0 and variance 1: nothing is changed until the first batch."""
        return Moments(jnp.zeros(size), jnp.ones(size), jnp.zeros(()))


def observe(moments: Moments, batch: Float[AnyArray, "batch size"]) -> Moments:
    """The moments after one more batch: plain averages at first, exponential ones later."""
    rate = jnp.maximum(1.0 / (moments.batches + 1.0), SLOWEST)
    mean = moments.mean + rate * (jnp.mean(batch, axis=0) - moments.mean)
    spread = jnp.mean((batch - mean[None]) ** 2, axis=0)
    variance = moments.variance + rate * (spread - moments.variance)
    return Moments(mean, variance, moments.batches + 1.0)


def standardize(moments: Moments, x: Float[Array, " size"]) -> Float[Array, " size"]:
    """(x - mean) / std, clipped; gradients pass through inside the bound.

    A millionth is added to the variance, so components that hardly vary come out smaller.
    """
    unit = (x - moments.mean) * jax.lax.rsqrt(moments.variance + 1e-6)
    return jnp.clip(unit, -BOUND, BOUND)


def observe_and_standardize(moments: Moments, batch: Transition) -> tuple[Moments, Transition]:
    """The moments after the batch, and the batch as networks see it: both observations by them."""
    moments = observe(moments, batch.obs)
    obs, next_obs = (
        jax.vmap(lambda row: standardize(moments, row))(rows)
        for rows in (batch.obs, batch.next_obs)
    )
    return moments, eqx.tree_at(lambda b: (b.obs, b.next_obs), batch, (obs, next_obs))
