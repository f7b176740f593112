"""Denoising diffusion on actions: schedules, the forward marginal, the loss and the sampler.

Levels are counted 0 ... T-1 from the least to the most noise. With alpha_bar_t the running product
of 1 - beta_t, the forward marginal is

    a_t = alpha_t a_0 + sigma_t eps,   alpha_t = sqrt(alpha_bar_t),  sigma_t = sqrt(1 - alpha_bar_t)

(Ho et al. 2020, eq. 4). A denoiser is any function `(noised, level) -> clean estimate`. The clean
estimate, the noise and the score of the noised marginal are one thing in three coordinates:

    noise = (a_t - alpha_t clean) / sigma_t,     score = -noise / sigma_t.

Nothing here knows about reinforcement learning.
"""

from collections.abc import Callable
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

Denoiser = Callable[[Float[Array, " act"], Int[Array, ""]], Float[Array, " act"]]
Variance = Literal["beta", "posterior"]


class NoiseSchedule(NamedTuple):
    """The tables of a discrete noise schedule, one entry per level, all in float32.

    - `beta`: variance added at the level.
    - `alpha`, `sigma`: signal and noise amplitude of the level's marginal; alpha^2 + sigma^2 = 1.
    """

    beta: Float[Array, " levels"]
    alpha: Float[Array, " levels"]
    sigma: Float[Array, " levels"]

    @property
    def levels(self) -> int:
        return self.beta.shape[0]


def _schedule(beta: np.ndarray) -> NoiseSchedule:
    alpha_bar = np.cumprod(1.0 - beta)
    tables = (beta, np.sqrt(alpha_bar), np.sqrt(1.0 - alpha_bar))
    return NoiseSchedule(*(jnp.asarray(table, jnp.float32) for table in tables))


def vp_schedule(levels: int) -> NoiseSchedule:
    """The variance-preserving SDE with rate 0.1 to 10 over unit time, in `levels` exact steps.

    beta_i = 1 - exp(-0.1/T - 9.9 (2i - 1) / (2 T^2)),  i = 1 ... T  (Xiao et al. 2022).
    """
    step = np.arange(1, levels + 1)
    low, high = 0.1, 10.0
    return _schedule(-np.expm1(-low / levels - (high - low) * (2 * step - 1) / (2 * levels**2)))


def cosine_schedule(levels: int) -> NoiseSchedule:
    """alpha_bar(u) ~ cos^2((u + 0.008) / 1.008 * pi/2) (Nichol & Dhariwal 2021, eq. 17)."""
    u = np.linspace(0.0, 1.0, levels + 1)
    alpha_bar = np.cos((u + 0.008) / 1.008 * np.pi / 2) ** 2
    return _schedule(np.clip(1.0 - alpha_bar[1:] / alpha_bar[:-1], 0.0, 0.999))


def linear_schedule(levels: int) -> NoiseSchedule:
    """The 1000-step schedule, beta 1e-4 to 0.02 (Ho et al. 2020), thinned to `levels` levels.

    Thinning keeps the marginals of the levels that are left, so that even five levels reach noise.
    """
    full = np.cumprod(1.0 - np.linspace(1e-4, 2e-2, 1000))
    kept = np.interp(np.arange(1, levels + 1) / levels, np.arange(1, 1001) / 1000, full)
    return _schedule(1.0 - kept / np.concatenate([[1.0], kept[:-1]]))


SCHEDULES: dict[str, Callable[[int], NoiseSchedule]] = {
    "vp": vp_schedule,
    "cosine": cosine_schedule,
    "linear": linear_schedule,
}


def add_noise(
    schedule: NoiseSchedule,
    clean: Float[Array, " act"],
    level: Int[Array, ""],
    noise: Float[Array, " act"],
) -> Float[Array, " act"]:
    """a_t = alpha_t a_0 + sigma_t eps."""
    return schedule.alpha[level] * clean + schedule.sigma[level] * noise


def clean_from_noise(
    schedule: NoiseSchedule,
    noised: Float[Array, " act"],
    level: Int[Array, ""],
    noise: Float[Array, " act"],
) -> Float[Array, " act"]:
    """a_0 = (a_t - sigma_t eps) / alpha_t."""
    return (noised - schedule.sigma[level] * noise) / schedule.alpha[level]


def noise_from_clean(
    schedule: NoiseSchedule,
    noised: Float[Array, " act"],
    level: Int[Array, ""],
    clean: Float[Array, " act"],
) -> Float[Array, " act"]:
    """eps = (a_t - alpha_t a_0) / sigma_t."""
    return (noised - schedule.alpha[level] * clean) / schedule.sigma[level]


def sample(
    denoiser: Denoiser,
    schedule: NoiseSchedule,
    noise: Float[Array, "levels act"],
    *,
    variance: Variance = "posterior",
    clip: float | None = None,
) -> Float[Array, " act"]:
    """Run the reverse chain for one vector (Ho et al. 2020, algorithm 2).

    - `noise`: where the chain starts is the last row, and row t is added on arriving at level t, in
      units of that step's deviation. From standard normal rows the chain samples; from zeros it is
      the deterministic chain from the origin.
    - `variance` of each step: `"beta"` is beta_t; `"posterior"` is
      beta_t (1 - alpha_bar_{t-1}) / (1 - alpha_bar_t), that of q(a_{t-1} | a_t, a_0).
    - `clip` bounds every intermediate vector to [-clip, clip], as the published QSM code does.
    """
    alpha_bar = schedule.alpha**2
    previous = jnp.concatenate([jnp.ones(1, jnp.float32), alpha_bar[:-1]])
    remaining = 1.0 - alpha_bar
    # q(a_{t-1} | a_t, a_0) = N(on_clean a_0 + on_noised a_t, posterior), ibid. eqs. 6 and 7
    on_clean = jnp.sqrt(previous) * schedule.beta / remaining
    on_noised = jnp.sqrt(1.0 - schedule.beta) * (1.0 - previous) / remaining
    posterior = schedule.beta * (1.0 - previous) / remaining
    spread = jnp.sqrt(schedule.beta if variance == "beta" else posterior).at[0].set(0.0)

    def step(noised, inputs):
        level, added = inputs
        mean = on_clean[level] * denoiser(noised, level) + on_noised[level] * noised
        noised = mean + spread[level] * added
        return (noised if clip is None else jnp.clip(noised, -clip, clip)), None

    levels = jnp.arange(schedule.levels)
    steps = (levels, jnp.roll(noise, 1, axis=0))  # from level t one arrives at level t - 1
    # a short chain as one straight program: a seventh less time where it is differentiated
    return jax.lax.scan(step, noise[-1], steps, reverse=True, unroll=5)[0]
