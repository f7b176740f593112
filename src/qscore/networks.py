"""Networks. Each sees one example; batch, ensemble and particle axes are added by `jax.vmap`.

Every leaf of a network is an array (activations and sizes are static), so plain `jax.jit`,
`jax.grad`, `jax.lax.scan` and Optax work on it.
"""

import math
from collections.abc import Callable, Sequence

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
from jaxtyping import Array, Float

from qscore.products import times
from qscore.types import Key

Activation = Callable[[Array], Array]
Initializer = Callable[[Key, Sequence[int]], Array]

GLOROT: Initializer = jax.nn.initializers.glorot_uniform()
LECUN: Initializer = jax.nn.initializers.lecun_normal()
"""Variance 1 / inputs, where Glorot's is 2 / (inputs + outputs): more in a widening first layer."""


@jax.custom_jvp
def mish(x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """x tanh(softplus(x)) (Misra 2019), from a single exponential.

    With e = exp(x) and n = e(e + 2), tanh(softplus(x)) = n / (n + 2). The textbook form costs
    three transcendental functions, as much as a 256-wide matrix product on a CPU.
    """
    e = jnp.exp(
        jnp.minimum(x, 20.0)
    )  # beyond 20 the ratio is 1 in float32; e * e must not overflow
    n = e * (e + 2.0)
    return x * (n / (n + 2.0))


@mish.defjvp
def _mish_jvp(primals, tangents):
    (x,), (dx,) = primals, tangents
    # from exp(-x), not exp(x): a term shared with the value would be written out and read again,
    # where this way the value and the slope are one fused loop each
    bounded = jnp.maximum(x, -20.0)  # the slope there is -4e-8; f * f * f must not overflow
    f = jnp.exp(-bounded)
    inverse = 1.0 / (1.0 + 2.0 * f * (1.0 + f))
    slope = (1.0 + 2.0 * f) * inverse + bounded * (4.0 * f * f * (1.0 + f)) * inverse * inverse
    return mish(x), slope * dx


class Linear(eqx.Module):
    """y = x W + b, with W from `initializer` and b = 0."""

    weight: Float[Array, "in out"]
    bias: Float[Array, " out"]

    def __init__(self, in_size: int, out_size: int, *, initializer: Initializer = GLOROT, key: Key):
        self.weight = initializer(key, (in_size, out_size))
        self.bias = jnp.zeros(out_size)

    def __call__(self, x: Float[Array, " in"]) -> Float[Array, " out"]:
        return times(x, self.weight) + self.bias


class MLP(eqx.Module):
    """A multi-layer perceptron on one vector; the last layer is linear."""

    layers: tuple[Linear, ...]
    activation: Activation = eqx.field(static=True)

    def __init__(
        self,
        sizes: Sequence[int],
        activation: Activation,
        *,
        initializer: Initializer = GLOROT,
        key: Key,
    ):
        keys = jr.split(key, len(sizes) - 1)
        self.layers = tuple(
            Linear(m, n, initializer=initializer, key=k)
            for m, n, k in zip(sizes[:-1], sizes[1:], keys, strict=True)
        )
        self.activation = activation

    def __call__(self, x: Float[Array, " in"]) -> Float[Array, " out"]:
        for layer in self.layers[:-1]:
            x = self.activation(layer(x))
        return self.layers[-1](x)


class Critic(eqx.Module):
    """Q(s, a): one observation and one action in [-1, 1] to one number."""

    mlp: MLP

    def __init__(
        self,
        obs_size: int,
        action_size: int,
        hidden: Sequence[int],
        *,
        activation: Activation = jax.nn.relu,
        initializer: Initializer = GLOROT,
        key: Key,
    ):
        sizes = (obs_size + action_size, *hidden, 1)
        self.mlp = MLP(sizes, activation, initializer=initializer, key=key)

    def __call__(self, obs: Float[Array, " obs"], action: Float[Array, " act"]) -> Float[Array, ""]:
        return self.mlp(jnp.concatenate([obs, action]))[0]


def mean_q(
    critics: Callable[..., Float[Array, ""]],
    obs: Float[Array, " obs"],
    action: Float[Array, " act"],
) -> Float[Array, ""]:
    """The mean of a stack of critics (leading axis) at one observation and action."""
    return jnp.mean(jax.vmap(lambda critic: critic(obs, action))(critics))


class DeterministicActor(eqx.Module):
    """a = tanh(MLP(s)): one observation to one action in [-1, 1]."""

    mlp: MLP

    def __init__(
        self,
        obs_size: int,
        action_size: int,
        hidden: Sequence[int],
        *,
        initializer: Initializer = GLOROT,
        key: Key,
    ):
        sizes = (obs_size, *hidden, action_size)
        self.mlp = MLP(sizes, jax.nn.relu, initializer=initializer, key=key)

    def __call__(self, obs: Float[Array, " obs"]) -> Float[Array, " act"]:
        return jnp.tanh(self.mlp(obs))


LOG_STD_BOUNDS = (-20.0, 2.0)
"""Where a `GaussianActor` keeps its log standard deviations, before the tanh."""


class GaussianActor(eqx.Module):
    """One observation to the (mean, log std) of a Gaussian, which `tanh_gaussian` squashes."""

    mlp: MLP

    def __init__(self, obs_size: int, action_size: int, hidden: Sequence[int], *, key: Key):
        self.mlp = MLP((obs_size, *hidden, 2 * action_size), jax.nn.relu, key=key)

    def __call__(
        self, obs: Float[Array, " obs"]
    ) -> tuple[Float[Array, " act"], Float[Array, " act"]]:
        mean, log_std = jnp.split(self.mlp(obs), 2)
        return mean, jnp.clip(log_std, *LOG_STD_BOUNDS)


def tanh_gaussian(
    mean: Float[Array, " act"], log_std: Float[Array, " act"], noise: Float[Array, " act"]
) -> tuple[Float[Array, " act"], Float[Array, ""]]:
    """a = tanh(u) with u = mean + std * noise, noise ~ N(0, I), and log pi(a) in nats.

        log pi(a) = sum_j log N(u_j; mean_j, std_j) - log(1 - tanh(u_j)^2),
        log(1 - tanh(u)^2) = 2 (log 2 - u - softplus(-2 u)).

    The second line is exact where 1 - tanh(u)^2 is 0 in floating point, from |u| of about 9.
    """
    u = mean + jnp.exp(log_std) * noise
    # from the noise: (u - mean) / std would cancel for a small std
    log_normal = -0.5 * noise**2 - log_std - 0.5 * math.log(2.0 * math.pi)
    log_slope = 2.0 * (math.log(2.0) - u - jax.nn.softplus(-2.0 * u))
    return jnp.tanh(u), jnp.sum(log_normal - log_slope)


class FourierFeatures(eqx.Module):
    """[cos(2 pi w t), sin(2 pi w t)] with learned frequencies w ~ N(0, 0.2^2), t a noise level."""

    frequencies: Float[Array, " half"]

    def __init__(self, size: int, *, key: Key):
        self.frequencies = 0.2 * jr.normal(key, (size // 2,))

    def __call__(self, level: Float[Array, ""]) -> Float[Array, " size"]:
        phase = 2.0 * jnp.pi * level * self.frequencies
        return jnp.concatenate([jnp.cos(phase), jnp.sin(phase)])


class ScoreNetwork(eqx.Module):
    """The denoiser: an observation, a noised action and a noise level to one vector per action.

    What the vector means (the noise, or the clean action) is the algorithm's choice. The first
    layer is linear in its three inputs, so it is evaluated in parts: the observation's once per
    chain (`encode_obs`), the levels' once per batch (`encode_levels`), and only the action's at
    every step. The network is `network(action, obs_code + level_codes[level])`.
    """

    features: FourierFeatures
    level_mlp: MLP
    mlp: MLP
    action_size: int = eqx.field(static=True)
    obs_size: int = eqx.field(static=True)

    def __init__(
        self,
        obs_size: int,
        action_size: int,
        hidden: Sequence[int],
        *,
        feature_size: int = 64,
        embedding: Sequence[int] = (128, 128),
        key: Key,
    ):
        features_key, level_key, mlp_key = jr.split(key, 3)
        self.features = FourierFeatures(feature_size, key=features_key)
        self.level_mlp = MLP((feature_size, *embedding), mish, key=level_key)
        sizes = (action_size + obs_size + embedding[-1], *hidden, action_size)
        self.mlp = MLP(sizes, mish, key=mlp_key)
        self.action_size, self.obs_size = action_size, obs_size

    def encode_obs(self, obs: Float[Array, " obs"]) -> Float[Array, " hidden"]:
        """The observation's share of the first layer, before the activation."""
        start = self.action_size
        return times(obs, self.mlp.layers[0].weight[start : start + self.obs_size])

    def encode_levels(self, levels: int) -> Float[Array, "{levels} hidden"]:
        """The share of each of the levels 0 ... levels-1, bias included."""
        embeddings = jax.vmap(lambda level: self.level_mlp(self.features(level)))(
            jnp.arange(levels, dtype=jnp.float32)
        )
        first = self.mlp.layers[0]
        weight = first.weight[self.action_size + self.obs_size :]
        return times(embeddings, weight) + first.bias[None]

    def __call__(
        self, action: Float[Array, " act"], code: Float[Array, " hidden"]
    ) -> Float[Array, " act"]:
        first, *middle, last = self.mlp.layers
        x = self.mlp.activation(times(action, first.weight[: self.action_size]) + code)
        for layer in middle:
            x = self.mlp.activation(layer(x))
        return last(x)
