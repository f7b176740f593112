"""Schedules, marginals, the denoising loss and the sampler, against NumPy and closed forms."""

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from helpers import assert_close, quick_jit

from qscore import diffusion
from qscore.diffusion import SCHEDULES

VARIANCES = ["beta", "posterior"]
LEVELS = [1, 5, 50, 1000]


def integrated_rate(u):
    """The integral over [0, u] of the variance-preserving SDE's rate, 0.1 + 9.9 u."""
    return 0.1 * u + 9.9 * u**2 / 2


def reference_alpha_bar(name, levels):
    """alpha_bar of every level, from each schedule's definition and not by multiplying betas up."""
    u = np.arange(1, levels + 1) / levels
    if name == "vp":
        return np.exp(-integrated_rate(u))
    if name == "cosine":
        alpha_bar = (
            np.cos((u + 0.008) / 1.008 * np.pi / 2) / np.cos(0.008 / 1.008 * np.pi / 2)
        ) ** 2
        # the curve reaches 0 at u = 1, where the paper cuts beta off at 0.999
        alpha_bar[-1] = 0.001 * (alpha_bar[-2] if levels > 1 else 1.0)
        return alpha_bar
    log_full = np.cumsum(np.log1p(-np.linspace(1e-4, 0.02, 1000)))
    return np.exp(log_full[1000 * np.arange(1, levels + 1) // levels - 1])


@pytest.mark.parametrize("levels", LEVELS)
@pytest.mark.parametrize("name", SCHEDULES)
def test_schedule_equals_its_definition(name, levels):
    schedule = SCHEDULES[name](levels)
    alpha_bar = reference_alpha_bar(name, levels)
    previous = np.concatenate([[1.0], alpha_bar[:-1]])
    assert schedule.levels == levels
    assert_close(schedule.alpha, np.sqrt(alpha_bar))
    assert_close(schedule.sigma, np.sqrt(1.0 - alpha_bar))
    assert_close(schedule.beta, 1.0 - alpha_bar / previous)


@pytest.mark.parametrize("levels", LEVELS)
@pytest.mark.parametrize("name", SCHEDULES)
def test_schedule_preserves_variance_and_only_adds_noise(name, levels):
    beta, alpha, sigma = SCHEDULES[name](levels)
    assert_close(alpha**2 + sigma**2, np.ones(levels))
    assert np.all((np.asarray(beta) > 0.0) & (np.asarray(beta) < 1.0))
    assert np.all(np.diff(alpha) < 0.0)
    assert np.all(np.diff(sigma) > 0.0)


@pytest.mark.parametrize("levels", LEVELS)
@pytest.mark.parametrize("name", SCHEDULES)
def test_last_level_is_noise(name, levels):
    # the chain starts from N(0, I): what signal is left there is a bias of the samples
    assert SCHEDULES[name](levels).alpha[-1] < 0.1


@pytest.mark.parametrize("levels", [5, 50, 200])
def test_thinning_keeps_the_marginals_of_the_thousand_steps(levels):
    thin, full = SCHEDULES["linear"](levels), SCHEDULES["linear"](1000)
    kept = 1000 * np.arange(1, levels + 1) // levels - 1
    assert_close(thin.alpha, full.alpha[kept])
    assert_close(thin.sigma, full.sigma[kept])


@pytest.mark.parametrize("name", SCHEDULES)
def test_clean_and_noise_are_two_coordinates_of_one_thing(name):
    schedule = SCHEDULES[name](20)
    clean_key, noise_key = jr.split(jr.key(0))
    clean = jr.uniform(clean_key, (20, 3), minval=-1.0, maxval=1.0)
    noise = jr.normal(noise_key, (20, 3))
    level = jnp.arange(20)

    def over_levels(function, *args):
        return jax.vmap(lambda *args: function(schedule, *args))(*args)

    noised = over_levels(diffusion.add_noise, clean, level, noise)
    alpha, sigma = np.asarray(schedule.alpha)[:, None], np.asarray(schedule.sigma)[:, None]
    assert_close(noised, alpha * np.asarray(clean) + sigma * np.asarray(noise))
    # a rounding of the noised action is divided by alpha or by sigma, whichever is small
    why = "division by the smallest alpha or sigma"
    loosen = float(1.0 / min(alpha.min(), sigma.min()))
    to_clean = over_levels(diffusion.clean_from_noise, noised, level, noise)
    to_noise = over_levels(diffusion.noise_from_clean, noised, level, clean)
    assert_close(to_clean, clean, loosen=loosen, why=why)
    assert_close(to_noise, noise, loosen=loosen, why=why)
    back = over_levels(diffusion.noise_from_clean, noised, level, to_clean)
    assert_close(back, noise, loosen=loosen, why=why)


MEAN, SPREAD = np.array([0.4, -0.2], np.float32), 0.3


def gaussian_denoiser(schedule, mean, spread):
    """E[a_0 | a_t] for a_0 ~ N(mean, spread^2): the exact denoiser of a Gaussian."""

    def denoiser(noised, level):
        alpha, sigma = schedule.alpha[level], schedule.sigma[level]
        gain = alpha * spread**2 / (alpha**2 * spread**2 + sigma**2)
        return mean + gain * (noised - alpha * mean)

    return denoiser


def draw(denoiser, schedule, size, count, key, **kwargs):
    """`count` samples of the chain, `float64[count, size]`."""
    noise = jr.normal(key, (count, schedule.levels, size))
    sampler = jax.vmap(lambda noise: diffusion.sample(denoiser, schedule, noise, **kwargs))
    return np.asarray(jax.jit(sampler)(noise), np.float64)


def gaussian_chain(name, levels, mean, spread, variance):
    """Mean and variance that the discrete chain reaches with the exact denoiser of a Gaussian.

    The chain is then linear, so its moments obey a recursion. The step is written with the noise
    instead of the clean action (Ho et al. 2020, eq. 11), another form than the sampler's.
    """
    alpha_bar = reference_alpha_bar(name, levels)
    previous = np.concatenate([[1.0], alpha_bar[:-1]])
    beta = 1.0 - alpha_bar / previous
    m, v = 0.0, 1.0
    for t in range(levels - 1, -1, -1):
        slope = beta[t] / (alpha_bar[t] * spread**2 + 1.0 - alpha_bar[t])
        gain = (1.0 - slope) / np.sqrt(1.0 - beta[t])
        m = gain * m + slope * np.sqrt(alpha_bar[t]) * mean / np.sqrt(1.0 - beta[t])
        added = beta[t] if variance == "beta" else beta[t] * (1 - previous[t]) / (1 - alpha_bar[t])
        v = gain**2 * v + (added if t > 0 else 0.0)
    return m, v


@pytest.mark.parametrize("variance", VARIANCES)
@pytest.mark.parametrize("name", SCHEDULES)
def test_sampler_steps_are_those_of_the_paper(name, variance):
    levels, count = 10, 20_000
    schedule = SCHEDULES[name](levels)
    denoiser = gaussian_denoiser(schedule, MEAN, SPREAD)
    samples = draw(denoiser, schedule, 2, count, jr.key(2), variance=variance)
    for i in range(2):
        mean, var = gaussian_chain(name, levels, float(MEAN[i]), SPREAD, variance)
        # four standard errors of a mean and of a variance of `count` normal numbers
        assert abs(samples[:, i].mean() - mean) < 4.0 * np.sqrt(var / count)
        assert abs(samples[:, i].var() / var - 1.0) < 4.0 * np.sqrt(2.0 / count)


@pytest.mark.parametrize("variance", VARIANCES)
@pytest.mark.parametrize("name", SCHEDULES)
def test_sampler_reaches_the_gaussian(name, variance):
    # The discrete chain is off by O(1/levels); `gaussian_chain` puts its variance within 3% here,
    # and four standard errors of the estimate are 4%.
    levels, count = 1000, 20_000
    _, limit = gaussian_chain(name, levels, 0.4, SPREAD, variance)
    assert abs(limit / SPREAD**2 - 1.0) < 0.03
    schedule = SCHEDULES[name](levels)
    denoiser = gaussian_denoiser(schedule, MEAN[:1], SPREAD)
    samples = draw(denoiser, schedule, 1, count, jr.key(3), variance=variance)
    assert abs(samples.mean() - 0.4) < 4.0 * SPREAD / np.sqrt(count) + 0.001
    assert abs(samples.var() / SPREAD**2 - 1.0) < 0.07


@pytest.mark.parametrize(("name", "variance"), [("vp", "beta"), ("cosine", "posterior")])
def test_sampler_keeps_the_weights_of_two_modes(name, variance):
    weights, means, spread = np.array([0.3, 0.7]), np.array([-0.5, 0.5]), 0.15
    levels, count = 1000, 10_000
    schedule = SCHEDULES[name](levels)

    def denoiser(noised, level):
        """sum_k p(k | a_t) E[a_0 | a_t, k], one component."""
        alpha, sigma = schedule.alpha[level], schedule.sigma[level]
        var = alpha**2 * spread**2 + sigma**2
        residual = noised - alpha * jnp.asarray(means, jnp.float32)
        log_weight = jnp.log(jnp.asarray(weights, jnp.float32)) - residual**2 / (2.0 * var)
        each = jnp.asarray(means, jnp.float32) + alpha * spread**2 / var * residual
        return jnp.sum(jax.nn.softmax(log_weight) * each, keepdims=True)

    samples = draw(denoiser, schedule, 1, count, jr.key(4), variance=variance)[:, 0]
    left, right = samples[samples < 0.0], samples[samples >= 0.0]
    # the modes are 6.7 spreads apart, so the sign tells them; 4 standard errors of a share
    assert abs(left.size / count - 0.3) < 4.0 * np.sqrt(0.3 * 0.7 / count)
    for mode, mean in ((left, -0.5), (right, 0.5)):
        assert abs(mode.mean() - mean) < 4.0 * spread / np.sqrt(mode.size) + 0.001
        # discretisation narrows or widens a mode of this spread by up to 4%; 4 standard errors
        assert abs(mode.var() / spread**2 - 1.0) < 0.04 + 4.0 * np.sqrt(2.0 / mode.size)
    mean = weights @ means
    var = weights @ (means**2 + spread**2) - mean**2
    assert abs(samples.mean() - mean) < 4.0 * np.sqrt(var / count) + 0.001
    assert abs(samples.var() / var - 1.0) < 0.05


@pytest.mark.parametrize(
    ("name", "said"), [("vp", (0.25, 0.04, 0.001)), ("cosine", (0.11, 0.01, 0.0001))]
)
def test_few_levels_blur_narrow_modes_as_the_page_of_diffusion_ql_says(name, said):
    centres, spread = jnp.array([-0.7, 0.7]), 0.05
    for levels, share in zip((5, 10, 20), said, strict=True):
        schedule = SCHEDULES[name](levels)

        def denoiser(noised, level, schedule=schedule):
            alpha, sigma = schedule.alpha[level], schedule.sigma[level]
            variance = (alpha * spread) ** 2 + sigma**2
            each = centres + alpha * spread**2 / variance * (noised - alpha * centres)
            logits = -0.5 * (noised - alpha * centres) ** 2 / variance
            return jnp.sum(jax.nn.softmax(logits) * each, keepdims=True)

        def one(key, schedule=schedule, denoiser=denoiser):
            noise = jr.normal(key, (schedule.levels, 1))
            return diffusion.sample(denoiser, schedule, noise)[0]

        found = np.asarray(quick_jit(jax.vmap(one))(jr.split(jr.key(0), 200_000)))
        between = float(np.mean(np.abs(found) < 0.4))
        assert between == pytest.approx(share, rel=0.1, abs=0.5 * 10.0 ** np.floor(np.log10(share)))


def test_chain_without_noise_is_the_mean_of_the_noisy_chain():
    # the denoiser is linear, and so is every step
    schedule = SCHEDULES["cosine"](10)
    denoiser = gaussian_denoiser(schedule, MEAN, SPREAD)
    silent = diffusion.sample(denoiser, schedule, jnp.zeros((10, 2)))
    mean = [gaussian_chain("cosine", 10, float(m), SPREAD, "beta")[0] for m in MEAN]
    assert_close(silent, np.array(mean), loosen=10.0, why="ten steps, each with a division")


def test_every_noise_enters_the_chain_where_it_belongs():
    # the chain of a Gaussian around 0 is linear in its noises: one row at a time, in closed form
    levels = 4
    schedule, alpha_bar = SCHEDULES["vp"](levels), reference_alpha_bar("vp", levels)
    denoiser = gaussian_denoiser(schedule, 0.0, SPREAD)
    beta = 1.0 - alpha_bar / np.concatenate([[1.0], alpha_bar[:-1]])
    slope = beta / (alpha_bar * SPREAD**2 + 1.0 - alpha_bar)
    gain = (1.0 - slope) / np.sqrt(1.0 - beta)  # of the step from level t, as in `gaussian_chain`
    for row in range(levels):
        noise = jnp.zeros((levels, 1)).at[row].set(0.7)
        sample = diffusion.sample(denoiser, schedule, noise, variance="beta")
        added = 1.0 if row == levels - 1 else np.sqrt(beta[row + 1])
        expected = 0.7 * added * np.prod(gain[: row + 1])
        assert_close(sample, np.array([expected]), loosen=10.0, why="steps with a division each")


def test_clip_bounds_every_step_of_the_chain():
    schedule = SCHEDULES["vp"](3)

    def denoiser(noised, level):
        # far outside at first; the last step returns half of what the step before it left
        return jnp.where(level > 0, jnp.full(2, 7.0), 0.5 * noised)

    def one(clip):
        return diffusion.sample(denoiser, schedule, jnp.zeros((3, 2)), clip=clip)

    assert np.all(np.asarray(one(None)) > 1.0)
    assert_close(one(1.0), np.full(2, 0.5))
    assert_close(one(0.6), np.full(2, 0.3))
