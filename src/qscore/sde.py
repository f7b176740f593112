"""Controlled Ito processes, by Euler-Maruyama.

    dX = b(t, X, a) dt + S(t, X, a) dW,

with the action a held over a control step. The score-driven action process dA = Psi dt + sigma dB
has no control of its own: it is the same thing with a field that ignores `a`. Fields are
callables on one state; paths are added by `jax.vmap`. Euler-Maruyama is of strong order 1/2, and
of order 1 where S does not depend on the state; its weak order is 1 (Kloeden & Platen 1992, 10.2).
Nothing here knows about reinforcement learning.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import jax.random as jr
from jaxtyping import Array, Float

from qscore.types import Key

Drift = Callable[
    [Float[Array, ""], Float[Array, " state"], Float[Array, " act"]], Float[Array, " state"]
]
Diffusion = Callable[
    [Float[Array, ""], Float[Array, " state"], Float[Array, " act"]], Float[Array, "state noise"]
]
Rate = Callable[[Float[Array, ""], Float[Array, " state"], Float[Array, " act"]], Float[Array, ""]]


class SDE(NamedTuple):
    """dX = drift(t, X, a) dt + diffusion(t, X, a) dW, with `noises` Brownian motions W."""

    drift: Drift
    diffusion: Diffusion
    noises: int


def euler_step(
    sde: SDE,
    time: Float[Array, ""],
    state: Float[Array, " state"],
    action: Float[Array, " act"],
    dt: Float[Array, ""],
    increment: Float[Array, " noise"],
) -> Float[Array, " state"]:
    """X + b dt + S dW, given the Brownian increment dW ~ N(0, dt I)."""
    drift = sde.drift(time, state, action)
    return state + drift * dt + sde.diffusion(time, state, action) @ increment


def advance(
    sde: SDE,
    reward_rate: Rate,
    time: Float[Array, ""],
    state: Float[Array, " state"],
    action: Float[Array, " act"],
    dt: Float[Array, ""],
    *,
    key: Key,
    substeps: int = 1,
    discount_rate: float = 0.0,
) -> tuple[Float[Array, " state"], Float[Array, ""]]:
    """One control step of length `dt` (seconds) in `substeps` Euler-Maruyama steps, action held.

    Returns the next state and the step's reward, int_0^dt e^{-discount_rate u} r du, by the
    trapezoidal rule over the sub-steps. With `discount_rate` 0 that is the plain integral.
    """
    h = dt / substeps
    noise = jnp.sqrt(h) * jr.normal(key, (substeps, sde.noises))

    def step(carry, dw):
        u, x, rate, total = carry
        x = euler_step(sde, time + u, x, action, h, dw)
        u = u + h
        next_rate = jnp.exp(-discount_rate * u) * reward_rate(time + u, x, action)
        return (u, x, next_rate, total + 0.5 * h * (rate + next_rate)), None

    start = (jnp.zeros_like(h), state, reward_rate(time, state, action), jnp.zeros_like(h))
    (_, state, _, total), _ = jax.lax.scan(step, start, noise)
    return state, total


def accumulate(
    sde: SDE,
    reward_rate: Rate,
    state: Float[Array, " state"],
    *,
    dt: float,
    steps: int,
    key: Key,
    discount_rate: float = 0.0,
) -> Float[Array, ""]:
    """int_0^{steps dt} e^{-discount_rate t} r(t, X) dt along one path of an uncontrolled process.

    The fields get an empty action: the joint process of a state and its score-driven action is
    one. By the left-point rule; the path itself is not kept.
    """
    held = jnp.zeros(0, state.dtype)

    def step(carry, i):
        x, total = carry
        time = i.astype(state.dtype) * dt
        total = total + jnp.exp(-discount_rate * time) * reward_rate(time, x, held) * dt
        dw = jnp.sqrt(dt) * jr.normal(jr.fold_in(key, i), (sde.noises,), state.dtype)
        return (euler_step(sde, time, x, held, jnp.asarray(dt, state.dtype), dw), total), None

    start = (state, jnp.zeros((), state.dtype))
    (_, total), _ = jax.lax.scan(step, start, jnp.arange(steps))
    return total


def simulate(
    sde: SDE,
    state: Float[Array, " state"],
    increments: Float[Array, "steps noise"],
    *,
    dt: float,
    time: float = 0.0,
) -> Float[Array, "steps+1 state"]:
    """The path of an uncontrolled process under given Brownian increments dW ~ N(0, dt I)."""
    held = jnp.zeros(0, state.dtype)
    length = jnp.asarray(dt, state.dtype)

    def step(x, inputs):
        i, dw = inputs
        x = euler_step(sde, time + i * length, x, held, length, dw)
        return x, x

    counts = jnp.arange(increments.shape[0], dtype=state.dtype)
    _, rest = jax.lax.scan(step, state, (counts, increments))
    return jnp.concatenate([state[None], rest])
