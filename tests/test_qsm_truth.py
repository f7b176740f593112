"""QSM against NumPy and against the Boltzmann density that it claims to sample."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
import pytest
from helpers import (
    HIDDEN,
    assert_close,
    numpy_denoiser,
    numpy_gradient,
    numpy_q,
    perturbed,
    polynomial_critics,
    quick_jit,
    random_batch,
    random_critics,
    unstack,
    wide,
)
from scipy import stats

from qscore import QSM, Spec
from qscore.bench import matmul_flops
from qscore.denoiser import score_loss
from qscore.networks import ScoreNetwork
from qscore.optimize import gradient_step

SPEC = Spec(obs_size=3, action_size=2, dt=0.05)
ROWS = 64


# What the actor is regressed onto -----------------------------------------------------------------


def actor_batch(algorithm, critics, batch, *, scale=0.0, updates=0, key):
    """(noised, level, target, running scale) of one actor update."""
    compute = quick_jit(
        lambda critics, scale, updates, batch, key: algorithm._actor_batch(
            critics, scale, updates, batch, key=key
        )
    )
    outputs = compute(critics, jnp.float32(scale), jnp.int32(updates), batch, key)
    return outputs[:4]


def marginal(algorithm, level):
    """alpha and sigma of each row's level, as columns."""
    schedule = algorithm.chain.tables
    level = np.asarray(level)
    return wide(schedule.alpha)[level][:, None], wide(schedule.sigma)[level][:, None]


def to_target(noise, noised, alpha, sigma, prediction):
    """What the network should output where it should predict `noise`."""
    if prediction == "noise":
        return noise
    return np.clip((noised - sigma * noise) / alpha, -1.0, 1.0)


RUNNING, LATER = (
    2.0,
    7,
)  # a gradient scale in the middle of a run, and an update that is not the first


@pytest.mark.parametrize(
    ("target", "prediction", "normalization", "unit"),
    [
        ("gradient", "noise", "none", lambda size: 1.0),
        ("gradient", "action", "batch", lambda size: 1.0),  # this target has no unit to normalise
        ("normalized", "noise", "none", lambda size: 1.0),
        ("normalized", "noise", "batch", lambda size: size),
        ("normalized", "action", "running", lambda size: RUNNING + 0.005 * (size - RUNNING)),
    ],
    ids=lambda value: "" if callable(value) else value,
)
@pytest.mark.parametrize("bc_weight", [0.0, 0.4])
def test_regression_target_is_the_critics_gradient_and_the_noise(
    target, prediction, normalization, unit, bc_weight
):
    algorithm = QSM(
        target=target,
        prediction=prediction,
        normalization=normalization,
        schedule="vp",
        noise_levels=10,
        score_scale=3.0,
        temperature=0.7,
        bc_weight=bc_weight,
        bc_spread=0.4,
    )
    critics = random_critics(SPEC, jr.key(0))
    batch = random_batch(SPEC, ROWS, jr.key(1))
    noised, level, actual, _ = actor_batch(
        algorithm, critics, batch, scale=RUNNING, updates=LATER, key=jr.key(2)
    )
    noised, obs, clean = wide(noised), wide(batch.obs), wide(batch.action)
    alpha, sigma = marginal(algorithm, level)

    def at(action):
        return [numpy_gradient(critic, obs, action) for critic in unstack(critics)]

    cloning = bc_weight > 0.0
    first, second = at(clean if cloning else noised)
    elsewhere = np.mean(at(noised if cloning else clean), axis=0)
    mean = (first + second) / 2.0
    size = np.mean(np.abs(mean))
    added = (noised - alpha * clean) / sigma
    # the variance of an action of variance 0.4^2 / w, given the noised one
    confined = 1.0 / (bc_weight / 0.4**2 + alpha**2 / sigma**2)
    share = alpha * confined / sigma**2 if cloning else 1.0

    def expected(gradient, sigma_factor=sigma, sign=-1.0, cloned=bc_weight, share=share):
        if target == "gradient":
            noise = sign * 3.0 * share * gradient
        else:
            noise = sign * sigma_factor * share * gradient / (0.7 * unit(size))
        return to_target(noise + cloned * added, noised, alpha, sigma, prediction)

    tolerance = {"loosen": 10.0, "why": "two layers and a division by alpha, of numbers up to 10"}
    assert_close(actual, expected(mean), **tolerance)
    mutants = {
        "ascent and descent swapped": expected(mean, sign=1.0),
        "taken at the other action": expected(elsewhere),
        "of one critic only": expected(first),
        "of the sum of critics": expected(2.0 * mean),
    }
    if target == "normalized":
        mutants["without sigma"] = expected(mean, sigma_factor=1.0)
    if bc_weight > 0.0:
        mutants["not confined"] = expected(mean, share=1.0)
        mutants["confined to the data alone"] = expected(mean, share=alpha * 0.4**2 / sigma**2)
        mutants["nothing cloned"] = expected(mean, cloned=0.0)
        mutants["away from the data"] = expected(mean, cloned=-bc_weight)
        mutants["the noise in full"] = expected(mean, cloned=1.0)
    for name, wrong in mutants.items():
        # a hundred times the tolerance above; clipping to the box hides most of some slips
        error = np.mean(np.abs(wrong - wide(actual))) / np.mean(np.abs(wide(actual)))
        assert error > 0.01, name


@pytest.mark.parametrize(("updates", "kept"), [(0, 0.0), (LATER, 0.995)])
def test_running_scale_follows_the_gradients_size(updates, kept):
    algorithm = QSM(target="normalized", normalization="running", noise_levels=10)
    critics, batch = random_critics(SPEC, jr.key(0)), random_batch(SPEC, ROWS, jr.key(1))
    noised, _, _, scale = actor_batch(
        algorithm, critics, batch, scale=RUNNING, updates=updates, key=jr.key(2)
    )
    gradients = [numpy_gradient(c, wide(batch.obs), wide(noised)) for c in unstack(critics)]
    size = np.mean(np.abs(np.mean(gradients, axis=0)))
    # the first update has no past to average with
    assert_close(scale, np.float64(kept * RUNNING + (1.0 - kept) * size))


def test_a_flat_critic_asks_for_no_noise():
    # its gradient is 0 and so is the unit: 0 / 0 must stay 0
    algorithm = QSM(target="normalized", prediction="noise", normalization="batch")
    critics = jax.tree.map(jnp.zeros_like, random_critics(SPEC, jr.key(0)))
    batch = random_batch(SPEC, ROWS, jr.key(1))
    _, _, target, _ = actor_batch(algorithm, critics, batch, key=jr.key(2))
    np.testing.assert_array_equal(np.asarray(target), np.zeros((ROWS, 2)))


def test_cloning_is_refused_where_the_target_does_not_know_the_data():
    with pytest.raises(ValueError, match="`bc_weight` is 0.5; with `target` 'posterior' it must"):
        QSM(target="posterior", bc_weight=0.5)
    assert QSM(preset="offline", target="posterior", bc_weight=0.0).bc_weight == 0.0


def test_posterior_target_is_the_mean_by_quadrature():
    spec, temperature, draws = Spec(obs_size=3, action_size=1, dt=0.05), 0.2, 4096
    settings = {
        "target": "posterior",
        "normalization": "none",
        "schedule": "cosine",
        "noise_levels": 10,
        "temperature": temperature,
        "posterior_samples": draws,
    }
    critics, batch = random_critics(spec, jr.key(3)), random_batch(spec, ROWS, jr.key(4))
    key = jr.key(5)
    by_action = actor_batch(QSM(prediction="action", **settings), critics, batch, key=key)
    by_noise = actor_batch(QSM(prediction="noise", **settings), critics, batch, key=key)
    noised, clean = wide(by_action[0]), wide(by_action[2])
    alpha, sigma = marginal(QSM(**settings), by_action[1])

    def quadrature(edge, strength):
        """E[a_0 | a_t] under exp(strength Q / temperature) on [-edge, edge].

        And the standard error of its estimate by `draws` weighted samples of strength 0: with p the
        density and q the one drawn from, its square is sum p^2 / q (a - mean)^2 / draws.
        """
        grid = np.linspace(-edge, edge, 4001)
        obs = np.repeat(wide(batch.obs)[:, None], grid.size, axis=1)
        action = np.broadcast_to(grid[None, :, None], (ROWS, grid.size, 1))
        q = np.mean([numpy_q(critic, obs, action) for critic in unstack(critics)], axis=0)
        kernel = -((noised - alpha * grid) ** 2) / (2.0 * sigma**2)

        def normalized(log_weight):
            weight = np.exp(log_weight - log_weight.max(axis=1, keepdims=True))
            return weight / weight.sum(axis=1, keepdims=True)

        drawn, weight = normalized(kernel), normalized(kernel + strength * q / temperature)
        mean = weight @ grid
        square = (grid - mean[:, None]) ** 2 * weight**2 / np.maximum(drawn, 1e-300)
        return mean[:, None], np.sqrt(square.sum(axis=1, keepdims=True) / draws)

    truth, error = quadrature(1.0, 1.0)
    z = (clean - truth) / error
    # 64 standard normal numbers, but for float32 and the bias of self-normalisation
    assert np.max(np.abs(z)) < 5.0
    assert 0.7 < np.sqrt(np.mean(z**2)) < 1.3
    for name, wrong in {
        "downhill": quadrature(1.0, -1.0),
        "without the critic": quadrature(1.0, 0.0),
        "half the temperature": quadrature(1.0, 2.0),
        "outside of the box": quadrature(3.0, 1.0),
    }.items():
        assert np.sqrt(np.mean(((clean - wrong[0]) / error) ** 2)) > 5.0, name
    # both predictions say the same thing
    np.testing.assert_array_equal(noised, wide(by_noise[0]))
    noise = (noised - alpha * clean) / sigma
    assert_close(by_noise[2], noise, loosen=20.0, why="a division by the smallest sigma, 0.09")


def test_actions_are_noised_to_their_level():
    rows = 8192
    algorithm = QSM(target="gradient", schedule="cosine", noise_levels=8)
    batch = random_batch(SPEC, rows, jr.key(6))
    noised, level, _, _ = actor_batch(
        algorithm, random_critics(SPEC, jr.key(0)), batch, key=jr.key(7)
    )
    alpha, sigma = marginal(algorithm, level)
    noise = (wide(noised) - alpha * wide(batch.action)) / sigma
    # standard normal and uniform over levels, within four standard errors
    assert abs(noise.mean()) < 4.0 / np.sqrt(2 * rows)
    assert abs(noise.var() - 1.0) < 4.0 * np.sqrt(2.0 / (2 * rows))
    assert abs(np.mean(noise[:, 0] * noise[:, 1])) < 4.0 / np.sqrt(rows)
    share = np.bincount(np.asarray(level), minlength=8) / rows
    assert share.shape == (8,)
    assert np.all(np.abs(share - 1 / 8) < 4.0 * np.sqrt(1 / 8 * 7 / 8 / rows))


# What the regression converges to -----------------------------------------------------------------


def frozen_critics(coefficients, shift):
    """A stack of two critics that differ, and whose mean is p(a - shift s)."""
    # subtracting from one what is added to the other: either alone would be a wrong landscape
    tilt = np.array([0.0, 0.0, 0.0, 2.0, 0.0])
    return polynomial_critics([np.add(coefficients, tilt), np.subtract(coefficients, tilt)], shift)


LINE = Spec(obs_size=1, action_size=1, dt=0.05)
BOLTZMANN = QSM(
    target="posterior",
    prediction="action",
    schedule="cosine",
    variance="beta",
    normalization="none",
    clip="clean",
    temperature=1.0,
    # self-normalised weights lean to where they are drawn from: 32 would leave 3% of the variance
    posterior_samples=128,
    hidden=(32, 32),
)
DRAWS = 8192


@functools.cache
def actor_trainer(levels, steps, rows, algorithm=BOLTZMANN, data=None):
    """(critics, key) -> (samples of the trained chain at -1 and 1: `[2, DRAWS]`, the actor).

    Only the actor is trained, on actions drawn uniformly from the box, or with the mean and
    standard deviation `data`.
    """
    algorithm = dataclasses.replace(algorithm, noise_levels=levels)
    optimizer = optax.adam(optax.cosine_decay_schedule(5e-3, steps))

    def train(critics, key):
        init_key, loop_key, sample_key = jr.split(key, 3)
        actor = ScoreNetwork(1, 1, algorithm.hidden, key=init_key)

        def step(carry, key):
            actor, opt_state = carry
            batch_key, actor_key = jr.split(key)
            batch = random_batch(LINE, rows, batch_key)
            batch = dataclasses.replace(batch, obs=jnp.sign(batch.obs))
            if data is not None:
                mean, std = data
                action = mean + std * jr.normal(batch_key, (rows, 1))
                batch = dataclasses.replace(batch, action=action)
            noised, level, target, _, _ = algorithm._actor_batch(
                critics, jnp.zeros(()), jnp.zeros((), jnp.int32), batch, key=actor_key
            )
            inputs = (batch.obs, noised, level, target)
            actor, opt_state, _ = gradient_step(
                score_loss, actor, optimizer, opt_state, *inputs, levels=levels
            )
            return (actor, opt_state), None

        carry = (actor, optimizer.init(actor))  # pyright: ignore[reportArgumentType]
        (actor, _), _ = jax.lax.scan(step, carry, jr.split(loop_key, steps))

        def sample(obs, key):
            return algorithm.chain.sample(actor, obs, key=key, noise_scale=1.0)

        obs, keys = jnp.array([[-1.0], [1.0]]), jr.split(sample_key, (2, DRAWS))
        return jax.vmap(jax.vmap(sample, (None, 0)))(obs, keys)[..., 0], actor

    return jax.jit(train)


@pytest.mark.parametrize(
    ("levels", "steps", "rows", "tolerance"),
    [
        # the chain's variance is 4% off, a short training's up to as much again
        (50, 2000, 128, 0.1),
        # the chain's is 2% off; training and 16384 draws leave it up to 6% off
        pytest.param(100, 5000, 512, 0.08, marks=pytest.mark.slow),
    ],
)
def test_quadratic_critic_gives_its_truncated_gaussian(levels, steps, rows, tolerance):
    # Q / tau = -(a - 0.3 s)^2 / (2 0.35^2): 2% of the Gaussian lies beyond the box
    spread, mode = 0.35, 0.3
    critics = frozen_critics([0.0, 0.0, -0.5 / spread**2, 0.0, 0.0], mode)
    samples = wide(actor_trainer(levels, steps, rows)(critics, jr.key(8))[0])
    truth = stats.truncnorm((-1.0 - mode) / spread, (1.0 - mode) / spread, mode, spread)
    # the two observations are mirror images
    folded = np.concatenate([-samples[0], samples[1]])
    assert abs(folded.mean() / truth.mean() - 1.0) < tolerance
    assert abs(folded.var() / truth.var() - 1.0) < tolerance
    assert abs(samples[0].mean() + samples[1].mean()) < 2.0 * tolerance * truth.mean()


def test_two_modes_keep_their_mass():
    # Q / tau = -35 (a^2 - 0.5^2)^2: modes at -0.5 and 0.5, a ninth as likely in between
    critics = frozen_critics([-35.0, 0.0, 2 * 35.0 * 0.25, 0.0, -35.0 * 0.25**2], 0.0)
    samples = wide(actor_trainer(50, 2000, 128)(critics, jr.key(9))[0])
    grid = np.linspace(-1.0, 1.0, 4001)
    density = np.exp(-35.0 * (grid**2 - 0.25) ** 2)
    size = density @ np.abs(grid) / density.sum()
    for row in samples:
        assert 0.35 < np.mean(row > 0.0) < 0.65
        # the modes stand where they should: the mean |a|, with the tolerance of a short training
        assert abs(np.abs(row).mean() / size - 1.0) < 0.1


# What cloning adds --------------------------------------------------------------------------------

CLONING = QSM(
    preset="offline",
    prediction="noise",
    normalization="none",
    temperature=1.0,
    noise_levels=50,
    hidden=(32, 32),
    bc_spread=0.25,
)
MEAN, STD = 0.2, 0.25  # of the data: three deviations of it lie in the box


def exact_noise(noised, level, slope=0.0, curvature=0.0):
    """What the network should say at a_t, where dQ/da = slope - curvature a: clean actions are
    E[a + v dQ/da | a_t], v the variance of a given a_t."""
    alpha, sigma = (column[0, 0] for column in marginal(CLONING, [level]))
    variance = 1.0 / (STD**-2 + (alpha / sigma) ** 2)
    middle = variance * (MEAN / STD**2 + noised * alpha / sigma**2)
    clean = middle + variance * (slope - curvature * middle)
    return (noised - alpha * clean) / sigma


def test_cloning_under_a_flat_critic_learns_the_score_of_the_noised_data():
    train = actor_trainer(50, 2000, 128, CLONING, (MEAN, STD))
    samples, actor = train(polynomial_critics([[0.0], [0.0]]), jr.key(30))
    actor, quantiles = wide(actor), stats.norm.ppf(np.linspace(0.02, 0.98, 49))[:, None]
    for level in range(CLONING.noise_levels):
        alpha, sigma = (column[0, 0] for column in marginal(CLONING, [level]))
        noised = alpha * MEAN + np.hypot(alpha * STD, sigma) * quantiles
        learned = numpy_denoiser(actor, np.ones_like(noised), noised, level)
        # of numbers of order one
        assert np.sqrt(np.mean((learned - exact_noise(noised, level)) ** 2)) < 0.1, level
    assert np.max(np.abs(np.mean(samples, axis=1) - MEAN)) < 0.02
    assert np.max(np.abs(np.std(samples, axis=1) - STD)) < 0.02


def exact_chain(**given):
    """The mean and deviation of the chain whose network is `exact_noise`."""
    beta, alpha, sigma = wide(tuple(CLONING.chain.tables))
    random = np.random.default_rng(0)
    noised = random.standard_normal(DRAWS)
    for t in range(len(beta) - 1, -1, -1):
        clean = (noised - sigma[t] * exact_noise(noised, t, **given)) / alpha[t]
        before = alpha[t - 1] if t > 0 else 1.0
        noised = np.sqrt(1.0 - beta[t]) * (1.0 - before**2) * noised
        noised = (noised + before * beta[t] * np.clip(clean, -1.0, 1.0)) / sigma[t] ** 2
        noised = noised + (t > 0) * np.sqrt(beta[t]) * random.standard_normal(DRAWS)
    noised = np.clip(noised, -1.0, 1.0)
    return np.array([np.mean(noised), np.std(noised)])


@pytest.mark.parametrize(("slope", "curvature"), [(2.4, 0.0), (-2.4, 4.0)])
def test_cloning_joins_the_data_and_the_critic(slope, curvature):
    # two critics that differ, and whose mean it is
    quadratics = [[-0.5 * curvature, slope + tilt, 0.0] for tilt in (1.0, -1.0)]
    train = actor_trainer(50, 2000, 128, CLONING, (MEAN, STD))
    samples, _ = train(polynomial_critics(quadratics), jr.key(31))
    found = np.array([np.mean(samples), np.std(samples)])
    critic = {"slope": slope, "curvature": curvature}
    assert np.max(np.abs(found - exact_chain(**critic))) < 0.03
    for name, wrong in {
        "the data alone": {},
        "half the critic": {"slope": 0.5 * slope, "curvature": 0.5 * curvature},
        "downhill": {"slope": -slope, "curvature": -curvature},
    }.items():
        assert np.max(np.abs(found - exact_chain(**wrong))) > 0.06, name

    # the density of the data times exp(Q): exactly for a linear Q, to first order in a curved one
    precision = STD**-2 + curvature
    product = np.array([(MEAN * STD**-2 + slope) / precision, precision**-0.5])
    ratio = (found[0] - MEAN) / (product[0] - MEAN)
    assert 0.9 < ratio < (1.1 if curvature == 0.0 else 1.4)
    assert 0.85 < found[1] / product[1] < 1.1


# What the critics are regressed onto --------------------------------------------------------------


def numpy_chain(schedule, network, obs):
    """The noiseless chain of a noise-predicting actor that clips its clean estimates."""
    beta, alpha, sigma = wide(tuple(schedule))
    noised = np.zeros((obs.shape[0], network.action_size))
    for t in range(len(beta) - 1, -1, -1):
        noise = numpy_denoiser(network, obs, noised, t)
        clean = np.clip((noised - sigma[t] * noise) / alpha[t], -1.0, 1.0)
        before = alpha[t - 1] if t > 0 else 1.0
        noised = before * beta[t] * clean + np.sqrt(1.0 - beta[t]) * (1.0 - before**2) * noised
        noised = noised / sigma[t] ** 2
    return np.clip(noised, -1.0, 1.0)


@pytest.mark.parametrize("pessimism", [0.0, 0.25, 1.0])
def test_critics_learn_from_the_target_critics_at_the_policys_next_action(pessimism):
    algorithm = QSM(
        pessimism=pessimism,
        prediction="noise",
        schedule="cosine",
        clip="clean",
        target_chain_noise=0.0,
        target_action_noise=0.0,
        noise_levels=5,
        discount=0.9,
        normalize_observations=False,
        hidden=HIDDEN,
    )
    state = quick_jit(lambda key: algorithm.init(SPEC, key=key))(jr.key(10))
    names = ("actor", "average_actor", "critics", "target_critics")
    state = dataclasses.replace(
        state,
        **{
            name: perturbed(getattr(state, name), key)
            for name, key in zip(names, jr.split(jr.key(11), 4), strict=True)
        },
    )
    batch = random_batch(SPEC, ROWS, jr.key(12))

    # updates on one row each report that row's target and loss
    one_row = jax.vmap(
        lambda row, key: algorithm.update(
            state, jax.tree.map(lambda leaf: leaf[None], row), key=key
        )[1]
    )
    metrics = quick_jit(one_row)(batch, jr.split(jr.key(13), ROWS))

    obs, action, next_obs = wide(batch.obs), wide(batch.action), wide(batch.next_obs)
    online, target = unstack(state.critics), unstack(state.target_critics)

    def expected(actor, critics, alive, pessimism=pessimism):
        next_action = numpy_chain(algorithm.chain.tables, wide(actor), next_obs)
        a, b = (numpy_q(critic, next_obs, next_action) for critic in critics)
        next_q = (a + b) / 2 - pessimism * np.abs(a - b) / 2
        return wide(batch.reward) + 0.9 * alive * next_q

    alive = 1.0 - wide(batch.terminated)
    y = expected(state.average_actor, target, alive)
    tolerance = {"loosen": 20.0, "why": "a chain of five networks and divisions by alpha"}
    assert_close(metrics["q_target"], y, **tolerance)
    loss = sum((numpy_q(critic, obs, action) - y) ** 2 for critic in online)
    assert_close(metrics["critic_loss"], loss, **tolerance)
    ended = np.asarray(batch.terminated)
    np.testing.assert_array_equal(
        np.asarray(metrics["q_target"])[ended], np.asarray(batch.reward)[ended]
    )
    for name, wrong in {
        "the online critics": expected(state.average_actor, online, alive),
        "optimism": expected(state.average_actor, target, alive, pessimism - 1.0),
        "the actor itself, not its average": expected(state.actor, target, alive),
        "bootstrapping through death": expected(state.average_actor, target, 1.0),
    }.items():
        assert np.mean(np.abs(wrong - y)) > 0.01, name


def test_update_moves_followers_by_their_rate_and_the_actor_against_the_new_critics():
    algorithm = QSM(
        target="normalized",
        normalization="running",
        target_rate=0.01,
        average_rate=0.2,
        critic_lr=1e-3,
        hidden=HIDDEN,
    )
    update = quick_jit(lambda state, batch, key: algorithm.update(state, batch, key=key))
    start = quick_jit(lambda key: algorithm.init(SPEC, key=key))(jr.key(14))
    batch = random_batch(SPEC, ROWS, jr.key(15))
    once, first = update(start, batch, jr.key(16))
    twice, second = update(once, batch, jr.key(17))

    def followed(network, follower, rate):
        return jax.tree.map(lambda new, old: rate * new + (1.0 - rate) * old, network, follower)

    for before, after in ((start, once), (once, twice)):
        assert_close(after.target_critics, followed(after.critics, before.target_critics, 0.01))
        assert_close(after.average_actor, followed(after.actor, before.average_actor, 0.2))
    assert (int(once.updates), int(twice.updates)) == (1, 2)

    # `gradient_scale` of a state is the running mean of the metric of that name
    assert_close(once.gradient_scale, first["gradient_scale"])
    running = 0.995 * once.gradient_scale + 0.005 * second["gradient_scale"]
    assert_close(twice.gradient_scale, running)

    # rewards reach the actor's gradient only through the critics' step, in the same update
    other = dataclasses.replace(batch, reward=batch.reward - 10.0)
    _, changed = update(start, other, jr.key(16))
    assert abs(changed["gradient_scale"] - first["gradient_scale"]) > 1e-4


def test_networks_see_standardised_observations():
    fields = {"target_action_noise": 0.0, "hidden": HIDDEN}
    scaled = QSM(normalize_observations=True, **fields)
    plain = QSM(normalize_observations=False, **fields)
    update, update_plain = (
        quick_jit(lambda state, batch, key, a=algorithm: a.update(state, batch, key=key))
        for algorithm in (scaled, plain)
    )
    first, second = random_batch(SPEC, ROWS, jr.key(20)), random_batch(SPEC, ROWS, jr.key(21))
    stretch = np.linspace(0.3, 100.0, SPEC.obs_size)
    shift = np.linspace(-50.0, 50.0, SPEC.obs_size)

    def move(obs):
        return jnp.asarray(stretch * np.asarray(obs) + shift, jnp.float32)

    def moved(batch):
        return dataclasses.replace(batch, obs=move(batch.obs), next_obs=move(batch.next_obs))

    def standardised(batch, seen):
        rows = np.concatenate([np.asarray(each.obs, np.float64) for each in seen])
        mean, std = rows.mean(axis=0), rows.std(axis=0)
        return dataclasses.replace(
            batch,
            obs=jnp.asarray((np.asarray(batch.obs) - mean) / std, jnp.float32),
            next_obs=jnp.asarray((np.asarray(batch.next_obs) - mean) / std, jnp.float32),
        )

    start = quick_jit(lambda key: scaled.init(SPEC, key=key))(jr.key(22))
    once, metrics = update(start, moved(first), jr.key(23))
    plainly, expected = update_plain(start, standardised(first, [first]), jr.key(23))
    tolerance = {"loosen": 100.0, "why": "a division by a deviation"}
    for name, value in expected.items():
        assert_close(metrics[name], value, **tolerance)
    _, raw = update_plain(start, moved(first), jr.key(23))
    assert abs(raw["critic_loss"] - expected["critic_loss"]) > 0.1

    # the moments go on with every batch: after two they are nearly those of all rows
    twice, _ = update(once, moved(second), jr.key(24))
    everything = np.concatenate([first.obs, second.obs]) * stretch + shift
    assert_close(twice.moments.mean, everything.mean(axis=0))
    spread = np.asarray(twice.moments.variance) / everything.var(axis=0)
    assert np.all((spread > 0.5) & (spread <= 1.01))

    # acting sees the same: a scale and a shift make no difference
    agent = dataclasses.replace(plainly, moments=once.moments)
    obs = jnp.full(SPEC.obs_size, 0.3)
    action, _ = scaled.act(agent, (), move(obs), key=jr.key(25), explore=False)
    one = dataclasses.replace(first, obs=jnp.broadcast_to(obs, first.obs.shape))
    seen = standardised(one, [first]).obs[0]
    assert_close(action, plain.act(agent, (), seen, key=jr.key(25), explore=False)[0], **tolerance)


# What it costs ------------------------------------------------------------------------------------


# at this many rows the encoding of 45 more levels, once per batch, is below 2% of an actor step
MANY, FEW_LEVELS, MANY_LEVELS = 4096, 5, 50


def shapes(levels):
    algorithm = QSM(target="normalized", noise_levels=levels, hidden=(256, 256))
    state = jax.eval_shape(lambda: algorithm.init(SPEC, key=jr.key(0)))
    batch = jax.eval_shape(lambda: random_batch(SPEC, MANY, jr.key(0)))
    return algorithm, state, batch


def forward_flops():
    """One evaluation of the denoiser on every row, its codes given."""
    return MANY * 2 * (SPEC.action_size * 256 + 256 * 256 + 256 * SPEC.action_size)


def actor_flops(levels):
    _, state, batch = shapes(levels)
    optimizer = optax.adam(3e-4)
    level = jax.ShapeDtypeStruct((MANY,), jnp.int32)

    def step(actor, obs, noised, level, target):
        opt_state = optimizer.init(actor)
        return gradient_step(
            score_loss, actor, optimizer, opt_state, obs, noised, level, target, levels=levels
        )

    return matmul_flops(step, state.actor, batch.obs, batch.action, level, batch.action)


def sample_flops(levels):
    algorithm, state, batch = shapes(levels)
    keys = jax.eval_shape(lambda: jr.split(jr.key(0), MANY))

    def sample(actor, obs, keys):
        return jax.vmap(lambda obs, key: algorithm.chain.sample(actor, obs, key=key))(obs, keys)

    return matmul_flops(sample, state.actor, batch.obs, keys)


def update_flops(levels):
    algorithm, state, batch = shapes(levels)
    return matmul_flops(
        lambda state, batch, key: algorithm.update(state, batch, key=key), state, batch, jr.key(0)
    )


def test_actor_step_costs_the_same_for_any_number_of_levels():
    few, many = actor_flops(FEW_LEVELS), actor_flops(MANY_LEVELS)
    assert few > 2.5 * forward_flops()  # it is the whole step, forward and backward
    assert few <= many < 1.02 * few


def test_sampling_costs_one_network_per_level():
    slope = (sample_flops(MANY_LEVELS) - sample_flops(FEW_LEVELS)) / (MANY_LEVELS - FEW_LEVELS)
    assert abs(slope / forward_flops() - 1.0) < 0.02


def test_update_never_differentiates_the_chain():
    # a level costs one forward pass in the critics' target; back-propagation would make it three
    slope = (update_flops(MANY_LEVELS) - update_flops(FEW_LEVELS)) / (MANY_LEVELS - FEW_LEVELS)
    assert abs(slope / forward_flops() - 1.0) < 0.02


# The published algorithm --------------------------------------------------------------------------


def test_official_preset_is_the_released_code():
    released = {
        "target": "gradient",
        "prediction": "noise",
        "schedule": "vp",
        "variance": "beta",
        "clip": "sample",
        "noise_levels": 5,
        "score_scale": 50.0,
        "normalization": "none",
        "target_chain_noise": 1.0,
        "target_action_noise": 0.1,
        "exploration_noise": 0.1,
        "eval_chain_noise": 1.0,
        "normalize_observations": False,
        "best_of": 1,
        "pessimism": 1.0,  # the smaller of two critics
        "discount": 0.99,
        "target_rate": 0.005,
        "average_rate": 1.0,  # the released actor has no average
        "actor_lr": 3e-4,
        "critic_lr": 3e-4,
        "critic_activation": "relu",
        "actor_decay_steps": 2_000_000,
        "batch_size": 256,
        "warmup_steps": 10_000,
        "updates_per_step": 1.0,
    }
    official = QSM(preset="official")
    assert {name: getattr(official, name) for name in released} == released


def test_fields_that_are_given_win_over_the_preset():
    given = {"schedule": "linear", "prediction": "action", "warmup_steps": 7, "average_rate": 0.5}
    official = dataclasses.asdict(QSM(preset="official"))
    mixed = dataclasses.asdict(QSM(preset="official", **given))
    assert mixed == official | given
    # also where the value is None, which is not the same as not given
    assert QSM(preset="official", actor_decay_steps=None).actor_decay_steps is None
